"""`dsv2quant bench model`: a model's speed on the GPU at hand, and the memory traffic that bounds it; the published
models' configurations, and the matrices that a fused runtime multiplies by.

A model of random weights, quantized on the device as they are made, is what runs without a checkpoint. Each weight is
normal, as wide as keeps activations at the size they have (norms are 1), rounded to BF16 and encoded as `convert` does
by `rtn`; the same name and seed give the same weight on the same kind of device. One weight's temporaries are in memory
at a time.

Prefill is of one prompt. Decoding takes the likeliest token of each sequence again and again behind a filled cache, the
whole step in one CUDA graph; the clock is the host's. A step's floor is the time in which the memory, at the rate it
reached in the same run, gives out what the step can't do without.
"""

from __future__ import annotations

import json
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.arch.spec import TensorSpec
from dsv2quant.bench.device import append, check_device, limits, measured_on
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import UsageError
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.fused_model import FusedModel
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.quantized import CheckpointSource, Source
from dsv2quant.planning import recipe
from dsv2quant.planning.recipe import Recipe

MODELS = ("v2", "v2-lite")  # deepseek-ai/DeepSeek-V2 and DeepSeek-V2-Lite
CACHE_BYTES = 2  # of a number in the cache: BF16
PROMPT = 2048  # tokens
WINDOWS, STEPS = 5, 32  # of decoding: the median over windows of so many steps
GIB = 1 << 30
DEVICE = "cuda"


def configuration(model: str) -> ModelConfig:
    """Of one of MODELS: what its config.json says, without what does not concern the model."""
    text = resources.files("dsv2quant").joinpath("bench", "configs", f"{model}.json").read_text(encoding="utf-8")
    return model_config(json.loads(text), f"{model}.json")


def matrices(config: ModelConfig, unit: int = 1) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every weight but the routed experts', those that have an input in common as one, in which each
    has rows in multiples of `unit`."""
    model = architecture(config)
    groups: dict[str, list[TensorSpec]] = {}
    for layer in dict.fromkeys((config.num_hidden_layers - 1, 0)):  # an MoE, and a dense one
        for spec in model.layer(layer):
            if not spec.keep and spec.expert is None:
                groups.setdefault(str(spec.site), []).append(spec)

    def rows(specs: list[TensorSpec]) -> int:
        return specs[0].shape[0] if len(specs) == 1 else sum(-(-spec.shape[0] // unit) * unit for spec in specs)

    return {_label(specs): (rows(specs), specs[0].shape[1]) for specs in groups.values()}


def _label(specs: list[TensorSpec]) -> str:
    """'q_a + kv_a', 'shared gate + up'."""
    ffn, _, _ = specs[0].role.rpartition(".")
    names = " + ".join(spec.role.rpartition(".")[2].partition("_proj")[0] for spec in specs)
    return f"{ffn} {names}".strip()


class RandomWeights:
    """The weights of a configuration under a recipe, by the interface of model/quantized.py."""

    def __init__(self, config: ModelConfig, recipe: Recipe | None, device: str = "cuda", seed: int = 0) -> None:
        self.name, self.config = "random weights", config
        self.recipe, self.device, self.seed = recipe, device, seed
        self.dtype = torch.bfloat16
        self._specs = {spec.name: spec for spec in architecture(config).specs()}

    def scheme(self, module: str) -> str:
        """The recipe's, or bf16 where a weight's shape can't have it."""
        spec = self._specs[f"{module}.weight"]
        scheme = self.recipe.assign(spec)[0] if self.recipe else "bf16"
        return "bf16" if CODECS[scheme].refusal(spec.shape) else scheme

    def stored(self, module: str) -> tuple[str, dict[str, torch.Tensor]]:
        spec = self._specs[f"{module}.weight"]
        scheme = self.scheme(module)
        return scheme, CODECS[scheme].encode_tensor(self._random(spec))

    def plain(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        spec = self._specs.get(name)
        return None if spec is None else self._random(spec).to(dtype or self.dtype)

    def activation(self, scheme: str) -> str | None:
        return CODECS[scheme].activation

    def kv_scale(self, layer: int) -> torch.Tensor | None:
        """None: an FP8 cache has scale 1."""
        return None

    def _random(self, spec: TensorSpec) -> torch.Tensor:
        """In BF16."""
        if spec.role in ("norm", "bias", "router_bias"):
            return torch.full(spec.shape, float(spec.role == "norm"), dtype=torch.bfloat16, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(spec.name.encode(), self.seed))
        weight = torch.empty(spec.shape, dtype=torch.bfloat16, device=self.device)
        return weight.normal_(std=spec.shape[1] ** -0.5, generator=generator)


class Subject(NamedTuple):
    """A model: `nbytes` says what a weight takes as it is stored, `load` makes the runtime."""

    name: str
    scheme: str
    config: ModelConfig
    nbytes: Callable[[TensorSpec], int]
    load: Callable[[], FusedModel]


def random(name: str, scheme: str) -> Subject:
    """Random weights in the shape of one of MODELS, under a recipe of the package, or in BF16."""
    source = RandomWeights(configuration(name), None if scheme == "bf16" else recipe.builtin(scheme))

    def nbytes(spec: TensorSpec) -> int:
        return sum(part.nbytes for part in CODECS[source.scheme(spec.module)].layout(spec.shape))

    return Subject(name, scheme, source.config, nbytes, lambda: _fused(source))


def stored(model: str, **hub: Any) -> Subject:
    """A checkpoint, an artifact or a GGUF file. Raises InputError as open_checkpoint does."""
    checkpoint = open_checkpoint(model, **hub)
    nbytes = {weight.spec: weight.nbytes for weight in checkpoint.weights}
    schemes = ", ".join(sorted({weight.scheme for weight in checkpoint.weights}))
    return Subject(
        checkpoint.model, schemes, checkpoint.config, nbytes.__getitem__,
        lambda: _fused(CheckpointSource(checkpoint, "cuda")),
    )  # fmt: skip


def _fused(source: Source) -> FusedModel:
    return FusedModel(source, LoadOptions(torch.bfloat16, "cuda", backend="kernels"))


def bytes_per_step(config: ModelConfig, nbytes: Callable[[TensorSpec], int], batch: int, context: int) -> int:
    """What decoding one token of each of `batch` sequences must read, behind `context` tokens of each.

    All weights once but those of layers for prediction, of the embedding one row a sequence, of the routed experts as
    many as are expected where each token chooses any with the same probability; and the cache, in BF16.
    """
    c = config
    active = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** batch if c.n_routed_experts else 0.0
    total = batch * context * c.num_hidden_layers * sum(c.cached_widths) * CACHE_BYTES
    experts = 0
    for spec in architecture(c).specs():
        if spec.is_prediction:
            continue
        if spec.role.startswith("routed."):
            experts += nbytes(spec)
        elif spec.role == "embed" and not c.tie_word_embeddings:
            total += batch * nbytes(spec) // c.vocab_size
        else:
            total += nbytes(spec)
    return total + round(active * experts)


def run(
    subject: Subject, batches: Sequence[int], context: int, results: Path | None, say: Callable[[str], object]
) -> dict[str, Any]:
    """Measure prefill, and decoding of each batch; `say` gets a line, `results` a row for each.

    Raises UsageError without a Hopper GPU, where the model's context is shorter, or where its memory doesn't suffice.
    """
    check_device()
    if context + WINDOWS * STEPS + 1 > subject.config.max_position_embeddings:
        raise UsageError(f"--context {context} is more than the {subject.config.max_position_embeddings} tokens of "
                         f"{subject.name} leave room for", fix="take a shorter one")  # fmt: skip
    reached, where = limits(), measured_on()
    torch.cuda.empty_cache()
    started = time.perf_counter()
    try:
        model = subject.load()
    except torch.OutOfMemoryError as error:
        raise _too_large(subject.name, error) from None
    torch.cuda.synchronize()
    loaded, weights = time.perf_counter() - started, torch.cuda.memory_allocated()
    about = {"model": subject.name, "scheme": subject.scheme, "load s": round(loaded, 1), "weights GiB": _gib(weights)}
    say(f"{where['GPU']}, {reached}: {subject.name} {subject.scheme}, {_gib(weights)} GiB in {loaded:.1f} s")
    rows = []
    for batch in (None, *batches):
        torch.cuda.reset_peak_memory_stats()
        what = "prefill" if batch is None else f"batch {batch} at {context} tokens"
        try:
            found = prefill(model, subject) if batch is None else decode(model, subject, batch, context, reached.read)
        except torch.OutOfMemoryError as error:
            raise _too_large(f"{subject.name}, {what}", error) from None
        memory = {"memory GiB": _gib(torch.cuda.max_memory_allocated())}
        rows.append(about | found | memory | {"limits": str(reached)} | where)
        say(_line(rows[-1]))
        append(results, rows[-1:])
    return {"read_bytes_per_s": reached.read, "rows": rows}


def prefill(model: FusedModel, subject: Subject) -> dict[str, Any]:
    """Of one prompt, the median of three after one."""
    tokens = _random_tokens(subject.config, 1, PROMPT)
    taken = statistics.median(
        [_seconds(lambda: model.next_logits(tokens, model.caches(1, PROMPT))) for _ in range(4)][1:]
    )
    return {
        "phase": "prefill", "batch": 1, "context": PROMPT, "tokens/s": round(PROMPT / taken, 1),
        "ms": round(taken * 1e3, 3), "GB": "", "floor ms": "", "ratio": "",
    }  # fmt: skip


def decode(model: FusedModel, subject: Subject, batch: int, context: int, read: float) -> dict[str, Any]:
    """Of a batch whose cache is filled with random numbers, as large as their norm makes latents."""
    caches = model.caches(batch, context + WINDOWS * STEPS + 1)
    for cache in caches:
        cache.store.normal_()
        cache.length = context
    step = model.decoder(caches)
    tokens = step(_random_tokens(subject.config, batch, 1).flatten()).argmax(-1)

    def steps() -> None:
        nonlocal tokens
        for _ in range(STEPS):
            tokens = step(tokens).argmax(-1)

    taken = statistics.median(_seconds(steps) for _ in range(WINDOWS)) / STEPS
    nbytes = bytes_per_step(subject.config, subject.nbytes, batch, context)
    floor = nbytes / read
    return {
        "phase": "decode", "batch": batch, "context": context, "tokens/s": round(batch / taken, 1),
        "ms": round(taken * 1e3, 3), "GB": round(nbytes / 1e9, 3), "floor ms": round(floor * 1e3, 3),
        "ratio": round(floor / taken, 3),
    }  # fmt: skip


def _random_tokens(config: ModelConfig, batch: int, count: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, count), device=DEVICE)


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _too_large(what: str, error: torch.OutOfMemoryError) -> UsageError:
    reason = str(error).partition(". ")[0]
    return UsageError(f"{what} does not fit: {reason}", fix="take a smaller --batch or --context, or another --scheme")


def _gib(nbytes: int) -> float:
    return round(nbytes / GIB, 2)


def _line(row: dict[str, Any]) -> str:
    floor = f", floor {row['floor ms']} ms for {row['GB']} GB ({row['ratio']})" if row["phase"] == "decode" else ""
    what = f"{row['phase']}, batch {row['batch']}, {row['context']} tokens"
    return f"{what}: {row['tokens/s']} tokens/s, {row['ms']} ms{floor}, {row['memory GiB']} GiB"
