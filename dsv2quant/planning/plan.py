"""The plan: recipe × checkpoint, one line per tensor, made from headers alone.

It fixes every output byte's place before a weight is read: schemes, with the rule behind each fallback, output tensors,
shards and sizes. Its digest covers all that determines the output bytes, so that a resumed run continues the same plan.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.multimodal import Names
from dsv2quant.arch.spec import CACHING_ROLES, TensorSpec
from dsv2quant.checkpoint.checkpoint import Checkpoint, HfCheckpoint, Weight
from dsv2quant.errors import InputError, listing
from dsv2quant.formats.quant_config import Within, kv_scale_parts, one_method, quantization_config
from dsv2quant.formats.schemes import CODECS, UNQUANTIZED
from dsv2quant.planning import consumers as targets
from dsv2quant.planning.consumers import Parallel
from dsv2quant.planning.kept import POWERS_OF_TWO, has_powers_of_two, mark_kept
from dsv2quant.planning.recipe import CALIBRATED, MEASURED, Recipe
from dsv2quant.planning.smoothing import smoothing_pairs
from dsv2quant.storage.safetensors import DEFAULT_SHARD_SIZE, SINGLE_FILE, Output, Part, Shard, StoredTensor, aligned
from dsv2quant.version import __version__

Choice = tuple[str, str, str | None]  # scheme, method, reason
SMOOTHED = "fold"  # the method of a tensor that is only scaled, because AWQ scales its neighbour


@dataclass(frozen=True)
class Entry:
    """One weight: what it is, what it becomes, and why where that is not what the recipe asked for. Behind the parts of
    a kv_a_proj_with_mqa or k_proj, `outputs` has its layer's KV-cache scales, if the plan has them."""

    weight: Weight
    scheme: str
    method: str
    reason: str | None
    outputs: tuple[Output, ...]

    @property
    def spec(self) -> TensorSpec:
        return self.weight.spec

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def needs_inputs(self) -> bool:
        """Whether encoding needs statistics of the weight's inputs."""
        return self.method in MEASURED or CODECS[self.scheme].activation == "static"

    @property
    def kv_scales(self) -> tuple[Output, ...]:
        """The layer's KV-cache scales that are stored beside it."""
        return tuple(output for output in self.outputs if not output.name.startswith(f"{self.module}."))

    @property
    def module(self) -> str:
        """The module that holds the weight, as the artifact names it."""
        return self.outputs[0].name.rpartition(".")[0]

    @property
    def encoding(self) -> str:
        """The method that the codec is asked for."""
        return "rtn" if self.method == SMOOTHED else self.method

    @property
    def is_copy(self) -> bool:
        """Whether the stored bytes pass through unchanged, because the source has this very scheme and layout."""
        stored = [(part.dtype, part.shape) for part in self.weight.parts.values()]
        same = self.scheme == self.weight.scheme and self.method == "rtn"
        return same and stored == [(o.dtype, o.shape) for o in self.outputs]

    @property
    def is_kept(self) -> bool:
        """Whether the source's codes and scales stay, be it in another layout: it has them on the scheme's grid."""
        return self.method == "rtn" and CODECS[self.scheme].keeps(self.weight.scheme, self.weight.parts)


@dataclass(frozen=True)
class Step:
    """Lines encoded together: one, or the fused group that shares a scale. `shard` is where their outputs go."""

    entries: tuple[Entry, ...]
    shard: int

    @property
    def bytes_in(self) -> int:
        return sum(entry.weight.nbytes for entry in self.entries)

    @property
    def bytes_out(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class Copy:
    """A tensor beside the language model, whose bytes pass through as they are."""

    stored: StoredTensor
    shard: int

    @property
    def output(self) -> Output:
        return Output(self.stored.name, self.stored.dtype, self.stored.shape, self.stored.nbytes)


@dataclass(frozen=True)
class Plan:
    """A whole conversion. `asked` are the options it was made with, as the command line spells them; `copies` are what
    a multimodal model has beside its language model, which all else is said of. `base_model` is a hub id for the
    card."""

    checkpoint: HfCheckpoint
    recipe: Recipe
    targets: tuple[str, ...]
    parallel: Parallel
    entries: tuple[Entry, ...]
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    config: dict[str, Any]
    copies: tuple[Copy, ...] = ()
    asked: tuple[str, ...] = ()
    base_model: str | None = None

    @property
    def bytes_in(self) -> int:
        return sum(step.bytes_in for step in self.steps) + self.bytes_copied

    @property
    def bytes_copied(self) -> int:
        return sum(copy.stored.nbytes for copy in self.copies)

    @property
    def bytes_out(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def parameters(self) -> int:
        return sum(entry.spec.size for entry in self.entries)

    @property
    def bits_per_weight(self) -> float:
        """Of the language model."""
        return 8 * (self.bytes_out - self.bytes_copied) / self.parameters

    @property
    def schemes(self) -> set[str]:
        return {entry.scheme for entry in self.entries} - UNQUANTIZED

    @cached_property
    def digest(self) -> str:
        """sha256 over what determines the output bytes, the weights' values aside."""
        content = {
            "dsv2quant": __version__,
            "config": self.config,
            "recipe": self.recipe.text,
            "targets": [self.targets, self.parallel.tp, *([self.parallel.ep] if self.parallel.ep > 1 else [])],
            "lines": [[x.spec.name, x.weight.scheme, x.weight.stored.dtype, x.scheme, x.method] for x in self.entries],
            "steps": [[[entry.spec.name for entry in step.entries], step.shard] for step in self.steps],
            "shards": [[s.file, hashlib.sha256(s.header).hexdigest()] for s in self.shards],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def index(self) -> dict[str, Any] | None:
        """The content of model.safetensors.index.json; None for a single file, which needs none."""
        if len(self.shards) == 1:
            return None
        weight_map = {output.name: shard.file for shard in self.shards for output in shard.outputs}
        total = sum(output.nbytes for shard in self.shards for output in shard.outputs)
        return {"metadata": {"total_size": total}, "weight_map": weight_map}


def make_plan(
    checkpoint: Checkpoint,
    recipe: Recipe,
    *,
    for_targets: Sequence[str] | None = None,
    tp: int = 1,
    ep: int = 1,
    max_shard_size: int = DEFAULT_SHARD_SIZE,
    kv_scales: bool = False,
) -> Plan:
    """Plan a conversion for some targets, or for all that load what the recipe makes; `kv_scales` adds a KV cache's.

    Raises InputError where the checkpoint or the recipe can't give one artifact that they load, and UsageError where
    `tp` and `ep` do not split the model or a target does not load what the recipe makes.
    """
    checkpoint = checkpoint.as_source()
    routed = {recipe.assign(weight.spec)[0] for weight in checkpoint.weights if weight.spec.expert is not None}
    chosen = targets.choose(for_targets, recipe.schemes, checkpoint.config, routed)
    parallel = Parallel(tp, ep)
    if set(chosen) & set(targets.ENGINES):
        targets.check_parallel(checkpoint.config, parallel, chosen)
    where = f"recipe {recipe.name}"
    stored = {weight.spec: weight.scheme for weight in checkpoint.weights}
    schemes = choose_schemes(stored, recipe, chosen, parallel)
    mark_kept(checkpoint.weights, schemes)
    _check_prediction(schemes, where)
    _mark_folded(checkpoint, recipe, schemes)
    planned = {weight.spec: schemes[weight.spec][0] for weight in checkpoint.weights}
    try:
        kinds = {(spec.role, spec.layer): spec for spec in planned}.values()
        one_method(recipe.assign(spec)[0] for spec in kinds)  # what falls back must not hide it
        quantization = quantization_config(planned, kv_scales, _spelling(checkpoint))
    except ValueError as error:
        raise InputError(str(error), where=where) from None
    targets.check_unquantized(planned, chosen, parallel)
    targets.check_nameless(planned, chosen, checkpoint.config)
    _check_listed(checkpoint, planned, quantization, chosen)
    kv_parts = kv_scale_parts(quantization)
    if kv_scales and not kv_parts:
        what = "its artifact can't declare KV-cache scales"
        raise InputError(what, where=where, fix="take a recipe in the compressed-tensors or AutoFP8 layout")
    entries = tuple(_line(weight, *schemes[weight.spec], kv_parts, checkpoint.names) for weight in checkpoint.weights)
    blocks = [entry.is_kept for entry in entries if entry.scheme == "fp8-block"]
    if quantization is not None and has_powers_of_two(checkpoint.config.quantization, blocks):
        quantization["scale_fmt"] = POWERS_OF_TWO
    steps, copies, shards = _lay_out(entries, checkpoint.others, chosen, max_shard_size)
    config = _out_config(checkpoint, quantization)
    return Plan(checkpoint, recipe, chosen, parallel, entries, steps, shards, config, copies)


def _spelling(checkpoint: HfCheckpoint) -> Within | None:
    """What a quantization_config must know of a multimodal model."""
    if checkpoint.whole is None:
        return None
    matrices = (tensor.name.rpartition(".") for tensor in checkpoint.others if len(tensor.shape) == 2)
    return Within(checkpoint.names, tuple(module for module, _, suffix in matrices if suffix == "weight"))


def _check_listed(
    checkpoint: HfCheckpoint,
    planned: Mapping[TensorSpec, str],
    quantization: Mapping[str, Any] | None,
    chosen: Sequence[str],
) -> None:
    """Raise InputError where a target would take a BF16 linear for a quantized one, because it looks for other names
    in this layout's list."""
    lost = [] if checkpoint.whole is None else [t for t in checkpoint.whole.unlisted if t in chosen]
    plain = [spec for spec, scheme in planned.items() if scheme == "bf16" and not spec.keep]
    if lost and plain and quantization is not None and quantization["quant_method"] in ("fp8", "awq"):
        what = f"{lost[0]} would not find {listing([spec.module for spec in plain])} among what is unquantized"
        raise InputError(what, where=checkpoint.model, fix="take a recipe in the compressed-tensors layout")


def choose_schemes(
    stored: Mapping[TensorSpec, str], recipe: Recipe, chosen: Sequence[str], parallel: Parallel
) -> dict[TensorSpec, Choice]:
    """What every tensor becomes, of those `stored` in schemes: the recipe's wish, or what the targets leave of it.

    Fused modules are decided as one: the first member that a target refuses takes the others along. Layers for
    multi-token prediction keep the scheme that they are in where it is one of the recipe's.
    """
    modules: dict[str, list[TensorSpec]] = defaultdict(list)
    assigned: dict[tuple[str, int | None], tuple[str, str]] = {}
    for spec, held in stored.items():
        if (spec.role, spec.layer) not in assigned:
            kept = spec.is_prediction and held in recipe.schemes - UNQUANTIZED
            assigned[spec.role, spec.layer] = (held, "rtn") if kept else recipe.assign(spec)
        modules[targets.fused_module(spec, chosen) or spec.name].append(spec)
    decided: dict[TensorSpec, Choice] = {}
    for members in modules.values():
        wishes = {spec: assigned[spec.role, spec.layer] for spec in members}
        scheme = wishes[members[0]][0]
        odd = next((spec for spec in members if wishes[spec][0] != scheme), None)
        if odd is not None:
            reason = f"the recipe gives the fused {members[0].role} and {odd.role} different schemes"
            decided |= {s: ("bf16", "rtn", reason if wishes[s][0] != "bf16" else None) for s in members}
            continue
        reasons: dict[TensorSpec, str] = {}
        while scheme not in UNQUANTIZED:
            refusals = {spec: targets.refusal(spec, scheme, chosen, parallel) for spec in members}
            first = next(((spec, r) for spec, r in refusals.items() if r is not None), None)
            if first is None:
                break
            culprit, refused = first
            for spec, own in refusals.items():
                reasons[spec] = own.reason if own else f"fused with {culprit.role}, which falls back: {refused.reason}"
            scheme = refused.instead
        possible = CODECS[scheme].methods
        for spec in members:
            wished = wishes[spec][1]
            decided[spec] = (scheme, wished if wished in possible else "rtn", reasons.get(spec))
    return decided


def _check_prediction(schemes: Mapping[TensorSpec, Choice], where: str) -> None:
    """Raise InputError where a layer that calibration does not see is to be calibrated."""
    for spec, (scheme, method, _) in schemes.items():
        if spec.is_prediction and (method != "rtn" or CODECS[scheme].activation == "static"):
            what = f"layer {spec.layer} predicts further tokens: no calibration text goes through it"
            raise InputError(what, where=where, fix="give it a scheme with the method rtn, or leave it out")


def _mark_folded(checkpoint: Checkpoint, recipe: Recipe, schemes: dict[TensorSpec, Choice]) -> None:
    """Give what AWQ scales along with its tensors a method of its own: such tensors are no copies."""
    methods = {method for _, method, _ in schemes.values()}
    if "awq" not in methods:
        return
    if methods & set(CALIBRATED):
        what = "mixes awq with gptq, which calibrates on unscaled layers"
        raise InputError(what, where=f"recipe {recipe.name}", fix="use one of them in all rules")
    for layer in range(checkpoint.config.num_hidden_layers):
        for pair in smoothing_pairs(checkpoint.config, layer):
            if any(schemes[spec][1] == "awq" for spec in pair.consumers):
                for spec in (*pair.consumers, pair.producer):
                    scheme, method, reason = schemes[spec]
                    if method == "rtn":
                        schemes[spec] = scheme, SMOOTHED, reason


def _line(
    weight: Weight, scheme: str, method: str, reason: str | None, kv_parts: Sequence[Part], names: Names
) -> Entry:
    spec = weight.spec
    parts = CODECS[scheme].layout(spec.shape)
    outputs = tuple(Output(names.stored(spec.part_name(p.suffix)), p.dtype, p.shape, p.nbytes) for p in parts)
    if spec.role in CACHING_ROLES and not spec.is_prediction:  # calibration sees no cache of such a layer
        at = names.stored(spec.parent)
        outputs += tuple(Output(f"{at}.{p.suffix}", p.dtype, p.shape, p.nbytes) for p in kv_parts)
    return Entry(weight, scheme, method, reason, outputs)


def _lay_out(
    entries: Sequence[Entry], others: Sequence[StoredTensor], chosen: Sequence[str], max_shard_size: int
) -> tuple[tuple[Step, ...], tuple[Copy, ...], tuple[Shard, ...]]:
    """Group lines into steps and fill shards in order, with the others behind; a step never spans two shards."""
    grouped: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        group = targets.scale_group(entry.spec, chosen) if CODECS[entry.scheme].shares_scale else None
        grouped[group or entry.spec.name].append(entry)
    filled: list[list[Output]] = [[]]
    size = 0

    def place(outputs: Sequence[Output]) -> int:
        """The shard that has room for these."""
        nonlocal size
        nbytes = sum(output.nbytes for output in outputs)
        if filled[-1] and size + nbytes > max_shard_size:
            filled.append([])
            size = 0
        size += nbytes
        filled[-1] += outputs
        return len(filled) - 1

    steps = tuple(
        Step(tuple(members), place([output for entry in members for output in entry.outputs]))
        for members in grouped.values()
    )
    copies = tuple(Copy(tensor, place([Copy(tensor, 0).output])) for tensor in others)
    if len(filled) == 1:
        return steps, copies, (Shard(SINGLE_FILE, aligned(filled[0])),)
    name = SINGLE_FILE.replace(".safetensors", "")
    files = [f"{name}-{i:05d}-of-{len(filled):05d}.safetensors" for i in range(1, len(filled) + 1)]
    return steps, copies, tuple(Shard(f, aligned(outputs)) for f, outputs in zip(files, filled, strict=True))


def _out_config(checkpoint: HfCheckpoint, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """config.json of the artifact: the source's, without remote code, in BF16, with the schemes declared: of a
    multimodal model in the whole's, where vLLM (config/model.py), SGLang (checkpoint_quantization.py) and transformers
    look first."""
    config = _plain_config(checkpoint.raw_config, checkpoint.config)
    if checkpoint.whole is not None:
        config[checkpoint.whole.key] = _plain_config(config[checkpoint.whole.key], checkpoint.config)
    if quantization is not None:
        config["quantization_config"] = quantization
    return config


def _plain_config(raw: Mapping[str, Any], read: ModelConfig) -> dict[str, Any]:
    config = {k: v for k, v in raw.items() if k not in ("quantization_config", "auto_map")}
    if "num_nextn_predict_layers" in config:  # where their tensors were left out before, nothing must look for them
        config["num_nextn_predict_layers"] = read.num_nextn_predict_layers
    config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16"
    return config
