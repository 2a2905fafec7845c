"""The plan of a GGUF file: what each tensor becomes, from headers alone, and the bytes before the data.

Whether what a plan was asked for takes effect: types for tensors, and an importance matrix.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.spec import K_B, V_B, GgufTensor
from dsv2quant.checkpoint.checkpoint import Checkpoint, HfCheckpoint, Weight
from dsv2quant.errors import InputError, UsageError, listing
from dsv2quant.formats.gguf import blocks, imatrix
from dsv2quant.formats.gguf.file_types import ALIASES, FILE_TYPES, NAMES, NOT_WRITTEN, PRESETS
from dsv2quant.formats.gguf.imatrix import Imatrix, older_names
from dsv2quant.planning import gguf_recipe
from dsv2quant.planning import gguf_types as types
from dsv2quant.planning.gguf_loadable import check_loadable
from dsv2quant.planning.gguf_metadata import warnings
from dsv2quant.planning.gguf_mixes import PLAIN
from dsv2quant.planning.gguf_presets import choose_preset
from dsv2quant.planning.gguf_recipe import GgufRecipe
from dsv2quant.planning.gguf_types import Overrides, is_tied, quantizable
from dsv2quant.storage.gguf import Metadata, TensorHeader, pack_header, padded
from dsv2quant.storage.gguf_split import split_keys, split_name, spread


@dataclass(frozen=True)
class Options:
    """What `--gguf` is asked for: a file type or preset (`file_types`) or a recipe, types for single tensors, and an
    importance matrix. `shrink` evens out those of experts with few tokens."""

    mix: str | GgufRecipe
    overrides: Overrides = Overrides()  # noqa: RUF009
    drop_expert_groups: bool = False
    imatrix: Imatrix | None = None
    shrink: bool = False

    @property
    def file_type(self) -> str:
        """The mix's name."""
        return self.mix if isinstance(self.mix, str) else self.mix.name


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: its type, and why that is not what was wished for."""

    tensor: GgufTensor
    type: str
    reason: str | None

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def nbytes(self) -> int:
        return blocks.nbytes(self.type, self.tensor.shape)


@dataclass(frozen=True)
class GgufPlan:
    """A whole conversion into GGUF. `asked` are the options it was made with, as the command line spells them."""

    checkpoint: HfCheckpoint
    options: Options
    entries: tuple[Entry, ...]
    notes: tuple[str, ...]
    asked: tuple[str, ...] = ()

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """The checkpoint's weights by name."""
        return {weight.spec.name: weight for weight in self.checkpoint.weights}

    @property
    def file_type(self) -> int:
        """`general.file_type`; a preset's is that of the mix whose bytes it spends, and a recipe's that of the mix
        whose default is the type of most weights."""
        mix = self.options.mix
        if isinstance(mix, str):
            return FILE_TYPES[PRESETS.get(mix, mix)].number
        held: Counter[str] = Counter()
        for entry in self.entries:
            held[entry.type] += entry.tensor.size
        most = held.most_common(1)[0][0]
        return next((t.number for t in FILE_TYPES.values() if t.default == most), FILE_TYPES["F16"].number)

    @property
    def bytes_in(self) -> int:
        return sum(weight.nbytes for weight in self.checkpoint.weights)

    @property
    def bytes_out(self) -> int:
        """Bytes of the tensors, without what is before them."""
        return sum(padded(entry.nbytes) for entry in self.entries)

    @property
    def parameters(self) -> int:
        return sum(weight.spec.size for weight in self.checkpoint.weights)

    def keeps(self, entry: Entry, weight: Weight) -> bool:
        """Whether the codes and scales of a weight of this tensor stay as the source has them, on the type's grid."""
        as_stored = entry.tensor.kind not in (K_B, V_B) and weight.spec.gguf_heads is None
        return as_stored and blocks.keeps(entry.type, weight.scheme, weight.parts)

    def importance(self, tensor: GgufTensor) -> np.ndarray | None:
        """float32 [matrices, cols], or None without an importance matrix of this tensor."""
        found = self.options.imatrix
        return None if found is None else found.importance(tensor, shrink=self.options.shrink)


@dataclass(frozen=True)
class File:
    """One file of the artifact: its path, everything before its data, and the lines in it with their first byte."""

    path: Path
    header: bytes
    entries: tuple[tuple[Entry, int], ...]


def make_gguf_plan(checkpoint: Checkpoint, options: Options) -> GgufPlan:
    """Plan a GGUF file. Raises InputError where llama.cpp could not load it or the importance matrix is of another
    model or lacks what the file type requires, and UsageError where a type asked for decides nothing, or a tensor's
    rows don't fit it."""
    config = checkpoint.config
    check_loadable(config, checkpoint.model, drop_expert_groups=options.drop_expert_groups)
    checkpoint = checkpoint.as_source().language_model()
    tensors = architecture(config).gguf_tensors()
    if options.imatrix is not None:
        imatrix.check_model(tensors, options.imatrix)
    check_types(tensors, options.file_type, options.overrides)
    if isinstance(options.mix, GgufRecipe):
        choices = options.mix.choose(tensors, options.overrides)
    else:
        choose = choose_preset if options.file_type in PRESETS else types.choose
        weighted = options.imatrix is not None
        choices = choose(tensors, options.file_type, config, has_imatrix=weighted, overrides=options.overrides)
    entries = tuple(Entry(tensor, kind, reason) for tensor, (kind, reason) in zip(tensors, choices, strict=True))
    for entry in entries:
        if entry.tensor.shape[-1] % blocks.TYPES[entry.type].values:
            what = f"{entry.name} can't be {entry.type}: its rows have {entry.tensor.shape[-1]} columns"
            raise UsageError(what, fix="give another type")
    notes = [*warnings(checkpoint), *importance_notes(entries, options.file_type, options.imatrix)]
    if isinstance(options.mix, GgufRecipe):
        notes += [f"recipe {options.mix.name}: {line}" for line in options.mix.idle_rules(tensors)]
    plan = GgufPlan(checkpoint, options, entries, tuple(notes))
    kept = Counter(x.type for x in entries for spec in x.tensor.specs if plan.keeps(x, plan.weights[spec.name]))
    notes += [f"{n} matrices keep the codes and scales that the source has, as {kind}" for kind, n in kept.items()]
    return replace(plan, notes=tuple(notes))


def lay_out(plan: GgufPlan, out: Path, metadata: Metadata, split_max_size: int | None = None) -> list[File]:
    """The artifact's files in order: `out`, or where it is larger than `split_max_size` bytes the shards
    `out-00001-of-0000N.gguf`, cut where llama-gguf-split cuts. The first has all metadata, which isn't counted.

    Raises UsageError where a tensor alone is larger.
    """
    if split_max_size is None:
        return [_file(out, metadata, plan.entries)]
    groups = spread([(entry.name, entry.nbytes) for entry in plan.entries], split_max_size, "--split-max-size")
    if len(groups) == 1:
        return [_file(out, metadata, plan.entries)]
    files = []
    for number, group in enumerate(groups):
        keys = split_keys(number, len(groups), len(plan.entries))
        path = out.with_name(split_name(out.stem, number, len(groups)))
        files.append(_file(path, {**metadata, **keys} if number == 0 else keys, [plan.entries[i] for i in group]))
    return files


def _file(path: Path, metadata: Metadata, entries: Sequence[Entry]) -> File:
    headers: list[TensorHeader] = []
    begin = 0
    for entry in entries:
        headers.append(TensorHeader(entry.name, entry.type, entry.tensor.shape, begin, entry.nbytes))
        begin += padded(entry.nbytes)
    header = pack_header(metadata, headers)
    return File(path, header, tuple((entry, len(header) + h.begin) for entry, h in zip(entries, headers, strict=True)))


def parse_mix(name: str) -> str | GgufRecipe:
    """'q4_k_m' → 'Q4_K_M'; a recipe of a YAML file. Raises UsageError for a type that is none, or is not written."""
    if name.endswith((".yaml", ".yml")):
        return gguf_recipe.load(name)
    known = ALIASES.get(name.upper(), name.upper())
    if known in NAMES:
        return known
    what = f"{known} is a file type of llama-quantize's that is not written here"
    raise UsageError(what if known in NOT_WRITTEN else f"unknown file type {name!r}", fix=f"one of {', '.join(NAMES)}")


def parse_type(name: str) -> str:
    """'q8_0' → 'Q8_0', a type that can be encoded. Raises UsageError."""
    if name.upper() not in blocks.TYPES:
        raise UsageError(f"unknown type {name!r}", fix=f"one of {', '.join(blocks.TYPES)}")
    return name.upper()


def parse_tensor_type(text: str) -> tuple[str, str]:
    """'ffn_down_exps=q6_k' → (pattern, type), as llama-quantize's --tensor-type. Raises UsageError."""
    pattern, equals, kind = text.partition("=")
    try:
        re.compile(pattern.lower())
    except re.error as error:
        raise UsageError(f"--tensor-type {text}: {error}", fix="give a regular expression") from None
    if not pattern or not equals:
        raise UsageError(f"--tensor-type {text!r}", fix="write it as PATTERN=TYPE, as ffn_down_exps=q6_k")
    return pattern, parse_type(kind)


_UNMEASURED = ("embed", "lm_head")  # the first has no input; llama-imatrix skips the other if not asked for it
# Types that are useless without importance (tensor_requires_imatrix); in a Q2_K_S, Q2_K is, too.
_NEEDY = ("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
_LOSSY = ("Q3_K_S", "IQ3_M", "IQ3_S", "Q2_K")
_TERNARY = ("TQ1_0", "TQ2_0")
_HOW = "make one with `calibrate --imatrix` or llama-imatrix"


def check_types(tensors: Sequence[GgufTensor], file_type: str, overrides: Overrides) -> None:
    """Raise UsageError where one of the overrides decides no tensor's type."""
    is_plain = file_type in FILE_TYPES and FILE_TYPES[file_type].default in PLAIN
    if overrides.tensor_types and is_plain:  # llama-quantize ignores them
        raise UsageError(f"--tensor-type goes with a quantized file type, not {file_type}", fix="leave it out")
    matrices = [tensor for tensor in tensors if quantizable(tensor)]
    deciding = {overrides.pattern(tensor) for tensor in matrices}
    for number, (pattern, kind) in enumerate(overrides.tensor_types):
        if number not in deciding:
            found = [tensor for tensor in tensors if re.search(pattern.lower(), tensor.name)]
            if not found:
                what, fix = "no tensor's name matches", "`plan --gguf TYPE -v` lists them"
            elif not any(map(quantizable, found)):
                what, fix = "it matches norms, biases or routers, which stay F32", "leave it out"
            else:
                what, fix = "options before it decide for all that it matches", "the first that matches decides"
            raise UsageError(f"--tensor-type {pattern}={kind.lower()}: {what}", fix=fix)
    if overrides.output_type is not None and is_tied(tensors):
        embedding = next(tensor for tensor in tensors if tensor.role == "embed")
        is_given = overrides.token_embedding_type is not None or overrides.pattern(embedding) is not None
        if is_plain or is_given:
            what = f"--output-type: the model's output is its embedding, {embedding.name}"
            what += ", whose type is given" if is_given else ""
            raise UsageError(what, fix="give --token-embedding-type alone")


def importance_notes(entries: Sequence[Entry], file_type: str, imatrix: Imatrix | None) -> Iterator[str]:
    """What the user should know of tensors that are quantized without importance.

    Raises UsageError or InputError where llama-quantize would refuse to, because the result would be useless.
    """
    weighted = [
        entry for entry in entries if entry.type not in blocks.UNWEIGHTED and entry.tensor.role not in _UNMEASURED
    ]
    lacking = [entry for entry in weighted if imatrix is None or entry.name not in imatrix.entries]
    needy = [entry for entry in entries if _needs_importance(entry, file_type, imatrix)]
    names, kinds = listing([entry.name for entry in needy]), ", ".join(sorted({entry.type for entry in needy}))
    if file_type in _TERNARY:
        yield f"{file_type} has three values a block: it is for models that were trained with such weights"
    if imatrix is None:
        if needy:
            what = f"{file_type} needs an importance matrix for {kinds}: {names}"
            raise UsageError(what, fix=f"give --imatrix FILE: {_HOW}")
        if file_type in _LOSSY:
            yield f"{file_type} without an importance matrix loses much: see `calibrate --imatrix`"
        return
    if needy:
        what = f"lacks {names}, which {file_type} makes {kinds}"
        raise InputError(what, where=imatrix.source, fix=f"{_HOW}, or give a wider type by --tensor-type")
    if lacking:
        names = listing([entry.name for entry in lacking])
        yield f"{imatrix.source} lacks {len(lacking)} of {len(weighted)} tensors, quantized without it: {names}"
    if older := sorted(imatrix.entries.keys() & set(older_names([entry.tensor for entry in entries]))):
        what = f"{imatrix.source} has {len(older)} tensors that the model has not: {listing(older)}"
        yield f"{what} (an older llama.cpp measured attn_k_b and attn_v_b as one)"


def _needs_importance(entry: Entry, file_type: str, imatrix: Imatrix | None) -> bool:
    """Whether a tensor lacks importance that its type needs: for the embedding and the output llama-quantize does
    without where ggml can."""
    if imatrix is not None and entry.name in imatrix.entries:
        return False
    if entry.tensor.role in _UNMEASURED:
        return entry.type in blocks.NEEDY
    return entry.type in _NEEDY or (file_type, entry.type) == ("Q2_K_S", "Q2_K")
