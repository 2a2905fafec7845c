"""Importance matrices, as llama-imatrix writes them and llama-quantize reads them.

A GGUF file (tools/imatrix/imatrix.cpp, save_imatrix; common/imatrix-loader.cpp). Per tensor of the model, by name:

    <name>.in_sum2   F32 [n, columns]   Σ x² of each input channel over tokens
    <name>.counts    F32 [n, 1]         those tokens

n is 1 (and then left out) for a dense tensor, whose per-head matrices lie side by side in `columns`, and the number of
experts for stacked ones, each of which counts the tokens that were routed to it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType

from dsv2quant.arch.spec import K_B, GgufTensor
from dsv2quant.errors import InputError, listing
from dsv2quant.storage import engine
from dsv2quant.storage import gguf as container
from dsv2quant.storage.gguf import TensorHeader, Value

SUMS, COUNTS = ".in_sum2", ".counts"
# Tokens by which an expert's matrix is drawn toward its layer's. On dsv2-mini, of 512 to 16,384 tokens against 142,848,
# 64 to 128 leave the smallest error of the logarithm in every case. (KLD of Q3_K_M and Q2_K stays within its error.)
PRIOR_TOKENS = 64
_TEXT = 127  # bytes that llama-quantize keeps of a name (include/llama.h, llama_model_kv_override)
_OTHER = "give the imatrix of this model"
_AGAIN = "make it again, with `dsv2quant calibrate --imatrix` or llama-imatrix"


@dataclass(frozen=True)
class FileEntry:
    """One tensor's Σ x², float32 [n, columns], and its tokens, float32 [n]."""

    sums: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix: entries by tensor name, the texts it was measured on, and their chunks of `chunk_size`
    tokens. `source` is what messages call it."""

    entries: Mapping[str, FileEntry]
    datasets: tuple[str, ...]
    chunk_count: int
    chunk_size: int
    source: str = "imatrix"

    @cached_property
    def digest(self) -> str:
        """sha256 of the file that `write` makes of it."""
        found = hashlib.sha256()
        for part in _pack(self):
            found.update(part)
        return found.hexdigest()

    def importance(self, tensor: GgufTensor, *, shrink: bool) -> np.ndarray | None:
        """Mean square of each input channel, float32 [matrices, columns]; None where there is no entry.

        Without `shrink` these are llama-quantize's values to the bit: sums over tokens, and ones where no token came by
        (tools/quantize/quantize.cpp, load_imatrix; src/llama-quant.cpp). With it an expert's are `_shrunk`.
        Raises InputError where the entry is for a tensor of another size.
        """
        entry = self.entries.get(tensor.name)
        if entry is None or not self._fits(tensor, entry):
            return None
        tokens = _whole(entry.counts)[:, None]
        if shrink and len(entry.counts) > 1:
            values = _shrunk(entry.sums, tokens, are_own=tensor.role == "routed.down_proj")
        else:
            values = np.where(tokens > 0, entry.sums / np.maximum(tokens, 1), np.float32(1))
        return values.reshape(tensor.matrices, tensor.shape[-1])

    def _fits(self, tensor: GgufTensor, entry: FileEntry) -> bool:
        wanted = tensor.matrices * tensor.shape[-1]
        if entry.sums.size == wanted:
            return True
        if tensor.role == "embed":  # a row lookup has no input; llama-quantize ignores it, too
            return False
        what = f"of another model: {tensor.name} has {entry.sums.size:,} values there, {wanted:,} in the model"
        raise InputError(what, where=self.source, fix=_OTHER)


def _whole(counts: np.ndarray) -> np.ndarray:
    """C's lround: half away from zero. float32, because llama-quantize divides by that."""
    return np.copysign(np.floor(np.abs(counts.astype(np.float64)) + 0.5), counts).astype(np.float32)


def _shrunk(sums: np.ndarray, tokens: np.ndarray, are_own: bool) -> np.ndarray:
    """Mean squares of experts, each drawn toward the layer's as if by PRIOR_TOKENS tokens, [experts, columns].

    `sums` are [experts, columns], `tokens` [experts, 1]. The layer's is the mean over all experts' tokens, scaled to
    the expert's own level; or flat where the channels `are_own`, so that those of two experts have nothing in common.
    An expert without tokens has the layer's alone.
    """
    wide, tokens = sums.astype(np.float64), np.maximum(tokens, 0).astype(np.float64)
    total = wide.sum(0) if not are_own and wide.any() else np.ones(wide.shape[1])
    shape = total / total.mean()
    layer_level = (wide.mean(1).sum() / max(tokens.sum(), 1)) or 1.0
    level = np.where(wide.any(1, keepdims=True), wide.mean(1, keepdims=True) / np.maximum(tokens, 1), layer_level)
    shrunk: np.ndarray = ((wide + PRIOR_TOKENS * level * shape) / (tokens + PRIOR_TOKENS)).astype(np.float32)
    return shrunk


def check_model(tensors: Sequence[GgufTensor], imatrix: Imatrix) -> None:
    """Raise InputError where the imatrix is of another model: it has tensors that the model has not, but for
    `older_names`, or of another size."""
    known = {tensor.name for tensor in tensors}
    if unknown := sorted(imatrix.entries.keys() - known - set(older_names(tensors))):
        what = f"of another model: {len(unknown)} of its {len(imatrix.entries)} tensors are not in this one: "
        raise InputError(what + listing(unknown), where=imatrix.source, fix=_OTHER)
    for tensor in tensors:
        if tensor.name in imatrix.entries:
            imatrix._fits(tensor, imatrix.entries[tensor.name])


def older_names(tensors: Sequence[GgufTensor]) -> list[str]:
    """What llama-imatrix measured before llama.cpp stored kv_b_proj's halves, and llama-quantize ignores."""
    return [str(tensor.specs[0].gguf_name) for tensor in tensors if tensor.kind == K_B]


def metadata(path: str | Path, imatrix: Imatrix) -> dict[str, Value]:
    """What llama-quantize says of an imatrix in the file it makes with it, in its order (tools/quantize)."""
    texts = {"file": str(path)}
    if imatrix.datasets:
        texts["dataset"] = imatrix.datasets[0]
    numbers = {"entries_count": len(imatrix.entries)}
    if imatrix.chunk_count:
        numbers["chunks_count"] = imatrix.chunk_count
    values = {key: Value(GGUFValueType.STRING, _first_bytes(text)) for key, text in texts.items()}
    values |= {key: Value(GGUFValueType.UINT32, number) for key, number in numbers.items()}
    return {f"quantize.imatrix.{key}": value for key, value in values.items()}


def _first_bytes(text: str) -> str:
    return text.encode()[:_TEXT].decode(errors="ignore")  # where the cut splits a character, without it


def write(path: Path, imatrix: Imatrix) -> None:
    """Write llama-imatrix's bytes: under `<path>.partial`, and under its own name when it is durable. Raises InputError
    where the disk fails."""
    parts = _pack(imatrix)
    header = next(parts)
    size = len(header) + sum(container.padded(array.nbytes) for _, array in _arrays(imatrix.entries))

    def jobs() -> Iterator[engine.Job]:
        begin = len(header)
        for part in parts:
            placed, end = [(begin, np.frombuffer(part, np.uint8))], begin + len(part)
            yield engine.Job(0, path.name, ((begin, end),), 0, len(part), partial(iter, placed))
            begin = end

    engine.write(jobs(), [engine.Written(engine.File(path, header, (size,)))])


def is_written(path: Path, imatrix: Imatrix) -> bool:
    """Whether the file has the bytes that `write` would give it."""
    with path.open("rb") as file:
        return all(file.read(len(part)) == part for part in _pack(imatrix)) and not file.read(1)


def _pack(imatrix: Imatrix) -> Iterator[bytes]:
    values = {
        "general.type": Value(GGUFValueType.STRING, "imatrix"),
        "imatrix.datasets": Value(GGUFValueType.STRING, list(imatrix.datasets), True),
        "imatrix.chunk_count": Value(GGUFValueType.UINT32, imatrix.chunk_count),
        "imatrix.chunk_size": Value(GGUFValueType.UINT32, imatrix.chunk_size),
    }
    arrays = dict(_arrays(imatrix.entries))
    headers: list[TensorHeader] = []
    position = 0
    for name, array in arrays.items():
        headers.append(TensorHeader(name, "F32", array.shape, position, array.nbytes))
        position += container.padded(array.nbytes)
    yield container.pack_header(values, headers)
    for array in arrays.values():
        yield array.tobytes().ljust(container.padded(array.nbytes), b"\0")


def _arrays(entries: Mapping[str, FileEntry]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and contents of the file's tensors. ggml drops leading dimensions of 1."""
    for name, entry in sorted(entries.items()):
        sums, counts = entry.sums.astype("<f4", copy=False), entry.counts.astype("<f4")[:, None]
        yield f"{name}{SUMS}", sums if len(sums) > 1 else sums[0]
        yield f"{name}{COUNTS}", counts if len(counts) > 1 else counts[0]


def read(path: Path) -> Imatrix:
    """Open an imatrix, ours or llama.cpp's. Raises InputError where it is none, is damaged or holds NaN or infinity."""
    if not path.is_file():
        raise InputError("is a folder" if path.is_dir() else "no such file", where=path, fix="give a *.gguf imatrix")
    if _is_legacy(path):
        fix = f"make it again, or convert it: llama-imatrix -m MODEL.gguf --in-file {path.name} -o {path.stem}.gguf"
        raise InputError("a legacy imatrix, not a GGUF one", where=path, fix=fix)
    file = container.read(path)
    arrays: dict[str, dict[str, np.ndarray]] = {SUMS: {}, COUNTS: {}}
    data = np.memmap(path, np.uint8, "r")
    for tensor in file.tensors:
        name, _, suffix = tensor.name.rpartition(".")
        if f".{suffix}" in arrays:
            if tensor.type != "F32":
                raise InputError(f"{tensor.name} is {tensor.type}, not F32", where=path, fix=_AGAIN)
            begin = file.data_start + tensor.begin
            arrays[f".{suffix}"][name] = data[begin : begin + tensor.nbytes].view("<f4")
    sums, counts = arrays[SUMS], arrays[COUNTS]
    if not sums:
        raise InputError("not an imatrix: it holds no *.in_sum2", where=path, fix=_AGAIN)
    if odd := sorted(sums.keys() ^ counts.keys()):
        raise InputError(f"{odd[0]} has sums or counts alone", where=path, fix=_AGAIN)
    return Imatrix(
        {name: _entry(path, name, sums[name], counts[name]) for name in sums},
        tuple(_value(file, "imatrix.datasets", "a list of strings", GGUFValueType.STRING, is_array=True)),
        int(_value(file, "imatrix.chunk_count", "a number", GGUFValueType.UINT32)),
        int(_value(file, "imatrix.chunk_size", "a number", GGUFValueType.UINT32)),
        str(path),
    )


def _entry(path: Path, name: str, sums: np.ndarray, counts: np.ndarray) -> FileEntry:
    if len(sums) % len(counts):
        what = f"{name} has {len(sums):,} sums of {len(counts):,} matrices"
        raise InputError(what, where=path, fix=_AGAIN)
    if not all(np.isfinite(array).all() and (array >= 0).all() for array in (sums, counts)):
        raise InputError(f"{name} is not finite, or negative", where=path, fix=_AGAIN)
    return FileEntry(sums.reshape(len(counts), -1), counts)


def _value(file: container.Container, key: str, what: str, kind: GGUFValueType, *, is_array: bool = False) -> Any:
    found = file.metadata.get(key)
    if found is None or (found.type, found.is_array) != (kind, is_array):
        raise InputError(f"its {key} is missing or not {what}", where=file.path, fix=_AGAIN)
    return found.value


def _is_legacy(path: Path) -> bool:
    """Whether a file begins as the older .dat: number of entries, length of the first name, name (int32, int32)."""
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8 or head[:4] == container.MAGIC:
            return False
        _, length = struct.unpack("<ii", head)
        return 0 < length < 256 and file.read(length).endswith(b".weight")
