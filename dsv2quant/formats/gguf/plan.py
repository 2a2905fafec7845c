"""The plan of a GGUF file: what each tensor becomes, from headers alone, and the bytes before the data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from gguf import GGUFValueType

from dsv2quant.checkpoint import Checkpoint, Weight
from dsv2quant.errors import UsageError
from dsv2quant.formats.gguf import asked, blocks, imatrix, presets, types
from dsv2quant.formats.gguf.container import Metadata, TensorHeader, Value, pack_header, padded
from dsv2quant.formats.gguf.file_types import ALIASES, FILE_TYPES, NAMES, NOT_WRITTEN, PRESETS
from dsv2quant.formats.gguf.imatrix import Imatrix
from dsv2quant.formats.gguf.loadable import check_loadable, warnings
from dsv2quant.formats.gguf.tensors import Tensor, model_tensors
from dsv2quant.formats.gguf.types import Overrides
from dsv2quant.writer import PARTIAL


@dataclass(frozen=True)
class Options:
    """What `--gguf` is asked for: a file type or preset (`file_types`), types for single tensors, and an importance
    matrix. `shrink` evens out those of experts with few tokens."""

    file_type: str
    overrides: Overrides = Overrides()  # noqa: RUF009
    drop_expert_groups: bool = False
    imatrix: Imatrix | None = None
    shrink: bool = False

    @property
    def number(self) -> int:
        """`general.file_type`; a preset's is that of the mix whose bytes it spends."""
        return FILE_TYPES[PRESETS.get(self.file_type, (self.file_type,))[0]].number


@dataclass(frozen=True)
class Line:
    """One tensor of the file: its type, and why that is not what was wished for."""

    tensor: Tensor
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
    checkpoint: Checkpoint
    options: Options
    lines: tuple[Line, ...]
    notes: tuple[str, ...]

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """The checkpoint's weights by name."""
        return {weight.slot.name: weight for weight in self.checkpoint.weights}

    @property
    def bytes_in(self) -> int:
        return sum(weight.nbytes for weight in self.checkpoint.weights)

    @property
    def bytes_out(self) -> int:
        """Bytes of the tensors, without what is before them."""
        return sum(padded(line.nbytes) for line in self.lines)

    @property
    def parameters(self) -> int:
        return sum(weight.slot.size for weight in self.checkpoint.weights)

    def importance(self, tensor: Tensor) -> np.ndarray | None:
        """float32 [matrices, cols], or None without an importance matrix of this tensor."""
        found = self.options.imatrix
        return None if found is None else found.importance(tensor, shrink=self.options.shrink)


@dataclass(frozen=True)
class File:
    """One file of the artifact: its path, everything before its data, and the lines in it with their first byte."""

    path: Path
    header: bytes
    lines: tuple[tuple[Line, int], ...]

    @property
    def partial(self) -> Path:
        """What it is called while it is written."""
        return self.path.with_name(self.path.name + PARTIAL)

    @property
    def nbytes(self) -> int:
        line, begin = self.lines[-1]
        return begin + padded(line.nbytes)

    def end(self, done: int) -> int:
        """The first byte behind `done` tensors and what fills them up."""
        return self.lines[done][1] if done < len(self.lines) else self.nbytes

    @property
    def is_written(self) -> bool:
        """Whether it is there, under its own name."""
        return self.path.exists() and self.path.stat().st_size == self.nbytes


def make_gguf_plan(checkpoint: Checkpoint, options: Options) -> GgufPlan:
    """Plan a GGUF file. Raises InputError where llama.cpp could not load it or the importance matrix is of another
    model or lacks what the file type requires, and UsageError where a type asked for decides nothing, or a tensor's
    rows don't fit it."""
    config = checkpoint.config
    check_loadable(config, checkpoint.model, drop_expert_groups=options.drop_expert_groups)
    checkpoint.check_source()
    tensors = model_tensors(config)
    if options.imatrix is not None:
        imatrix.check_model(tensors, options.imatrix)
    asked.check_types(tensors, options.file_type, options.overrides)
    if options.file_type in PRESETS:
        choices = presets.choose(tensors, options.file_type, config, options.overrides)
    else:
        weighted = options.imatrix is not None
        choices = types.choose(tensors, options.file_type, config, has_imatrix=weighted, overrides=options.overrides)
    lines = tuple(Line(tensor, kind, reason) for tensor, (kind, reason) in zip(tensors, choices, strict=True))
    for line in lines:
        _check_type(line)
    notes = [*warnings(checkpoint), *asked.importance_notes(lines, options.file_type, options.imatrix)]
    return GgufPlan(checkpoint, options, lines, tuple(notes))


def _check_type(line: Line) -> None:
    if line.tensor.shape[-1] % blocks.TYPES[line.type].values:
        what = f"{line.name} can't be {line.type}: its rows have {line.tensor.shape[-1]} columns"
        raise UsageError(what, fix="give another type")


def lay_out(plan: GgufPlan, out: Path, metadata: Metadata, split_max_size: int | None = None) -> list[File]:
    """The artifact's files in order: `out`, or where it is larger than `split_max_size` bytes the shards
    `out-00001-of-0000N.gguf`, cut where llama-gguf-split cuts. The first has all metadata, which isn't counted.

    Raises UsageError where a tensor alone is larger.
    """
    largest = max(plan.lines, key=lambda line: line.nbytes)
    if split_max_size is not None and padded(largest.nbytes) > split_max_size:
        what = f"--split-max-size {split_max_size:,}: {largest.name} alone takes {padded(largest.nbytes):,} bytes"
        raise UsageError(what, fix="tensors are not cut: give at least that")
    groups: list[list[Line]] = [[]]
    size = 0
    for line in plan.lines:
        nbytes = padded(line.nbytes)
        if split_max_size is not None and groups[-1] and size + nbytes > split_max_size:
            groups.append([])
            size = 0
        groups[-1].append(line)
        size += nbytes
    if len(groups) == 1:
        return [_file(out, metadata, groups[0])]
    files = []
    for number, lines in enumerate(groups):
        split = {
            "split.no": Value(GGUFValueType.UINT16, number),
            "split.tensors.count": Value(GGUFValueType.INT32, len(plan.lines)),
            "split.count": Value(GGUFValueType.UINT16, len(groups)),
        }
        path = out.with_name(f"{out.stem}-{number + 1:05d}-of-{len(groups):05d}.gguf")
        files.append(_file(path, {**metadata, **split} if number == 0 else split, lines))
    return files


def _file(path: Path, metadata: Metadata, lines: Sequence[Line]) -> File:
    headers: list[TensorHeader] = []
    begin = 0
    for line in lines:
        headers.append(TensorHeader(line.name, line.type, line.tensor.shape, begin, line.nbytes))
        begin += padded(line.nbytes)
    header = pack_header(metadata, headers)
    return File(path, header, tuple((line, len(header) + h.begin) for line, h in zip(lines, headers, strict=True)))


def parse_file_type(name: str) -> str:
    """'q4_k_m' → 'Q4_K_M'. Raises UsageError for a type that is none, or is not written."""
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
