"""The GGUF sink: one file, or several that it is split into, and the jobs that fill them in their own order.

The manifest of finished files, `<name>.gguf.json`, lies beside them. A file can be gone on with behind every tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsv2quant.arch.spec import K_B, V_B, TensorSpec
from dsv2quant.checkpoint.checkpoint import HfCheckpoint, Weight
from dsv2quant.checkpoint.identity import Source
from dsv2quant.conversion.sink import Sink, check_decoded, check_stored
from dsv2quant.errors import InputError, PlanViolation
from dsv2quant.formats.codec import as_float32
from dsv2quant.formats.cpu import widen
from dsv2quant.formats.gguf import blocks
from dsv2quant.formats.gguf.heads import as_pairs
from dsv2quant.formats.gguf.imatrix import metadata as imatrix_metadata
from dsv2quant.formats.int4 import PACKED, unpack_codes
from dsv2quant.planning.gguf_metadata import model_metadata
from dsv2quant.planning.gguf_plan import Entry, GgufPlan, lay_out
from dsv2quant.progress import Progress
from dsv2quant.storage.durable import PARTIAL, sync_folder
from dsv2quant.storage.engine import File, Job
from dsv2quant.storage.files import Scratch
from dsv2quant.storage.gguf import Metadata, padded
from dsv2quant.storage.manifest import gguf_manifest
from dsv2quant.storage.safetensors import HELD_AS
from dsv2quant.storage.verified import record_path
from dsv2quant.version import __version__

_one_at_a_time = threading.Lock()


def metadata_of(plan: GgufPlan) -> Metadata:
    """Every key of the file."""
    found, imatrix = plan.options, plan.options.imatrix
    metadata = model_metadata(plan.checkpoint, plan.file_type, drop_expert_groups=found.drop_expert_groups)
    return metadata if imatrix is None else metadata | imatrix_metadata(imatrix.source, imatrix)


class GgufFiles(Sink):
    """The file `out`, or with `split_max_size` bytes those that it is split into."""

    schema = "dsv2quant.gguf-manifest/1"
    kind, other, of_another, units = "file", "another name", "was made from", "tensors"

    def __init__(
        self,
        plan: GgufPlan,
        out: Path,
        split_max_size: int | None,
        device: str,
        *,
        force: bool,
        inputs: Iterable[Path],
        progress: Progress,
        calibration: Mapping[str, Any] | None = None,
        aside: int = 0,
    ) -> None:
        self.plan, self._device, imatrix = plan, device, plan.options.imatrix
        with progress(0, "", "prepare"):
            self._layout = lay_out(plan, out, metadata_of(plan), split_max_size)
            source = Source.of(plan.checkpoint, {})  # all else that is read is in the header
        made = {
            "schema": "dsv2quant.gguf-state/2",
            "version": __version__,
            "headers": [hashlib.sha256(file.header).hexdigest() for file in self._layout],
            "imatrix": [imatrix.digest, plan.options.shrink] if imatrix is not None else None,
        }
        digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
        files = [
            File(file.path, file.header, tuple(begin + padded(entry.nbytes) for entry, begin in file.entries))
            for file in self._layout
        ]
        read = [*plan.checkpoint.inputs, *([Path(imatrix.source)] if imatrix is not None else []), *inputs]
        super().__init__(
            out, gguf_manifest(out), files, digest, source, force=force, inputs=read, progress=progress,
            stream=plan.checkpoint.stream, calibration=calibration, aside=aside,
        )  # fmt: skip

    @property
    def counted(self) -> tuple[int, int]:
        return sum(written.done for written in self.written), sum(len(w.file.marks) for w in self.written)

    def about(self) -> dict[str, Any]:
        return {"versions": {"dsv2quant": __version__}}

    def _check_names(self, inputs: list[Path]) -> None:
        super()._check_names(inputs)
        for path in (written.file.path for written in self.written if written.file.path.exists()):
            if not path.is_file():
                what = "is a folder" if path.is_dir() else "is no regular file"
                raise InputError(what, where=path, fix="give the name of a file")
        if os.path.lexists(self.manifest) and super()._own_manifest() is None:
            raise InputError("is there, and no manifest of dsv2quant's", where=self.manifest, fix="move it away")

    def _own_manifest(self) -> dict[str, Any] | None:
        is_there = any(written.file.path.exists() for written in self.written)
        return super()._own_manifest() if is_there else None

    def _refuse(self, lines: Sequence[Mapping[str, Any]]) -> None:
        fix = f"give {self.other}, or --force to start over"
        for written in self.written:
            if written.file.path.exists():
                raise InputError("is there already", where=written.file.path, fix=fix)
        if not self._is_void(lines):
            raise InputError("an unfinished conversion with another plan or source", where=self._state, fix=fix)

    def _clear(self, names: list[str], manifest: Mapping[str, Any] | None, inputs: list[Path]) -> None:
        partial = re.compile(rf"{re.escape(self.out.stem)}(-\d{{5}}-of-\d{{5}})?\.gguf{re.escape(PARTIAL)}")
        for name in os.listdir(self._folder):
            if partial.fullmatch(name):
                os.unlink(self._folder / name)
        for path in (*(written.file.path for written in self.written), record_path(self.manifest), self.manifest):
            path.unlink(missing_ok=True)
        sync_folder(self._folder)

    def _keep(self, recorded: list[dict[str, Any]], progress: Progress) -> None:
        known = {line.get("file") for line in recorded if line.get("done")}
        for number, written in enumerate(self.written):
            if number not in known and written.file.path.exists():
                fix = f"give {self.other}, or --force to start over"
                raise InputError("is there already", where=written.file.path, fix=fix)
        super()._keep(recorded, progress)

    def _is_void(self, lines: Sequence[Mapping[str, Any]]) -> bool:
        return not any(line.get("done") for line in lines[1:])

    def jobs(self, progress: Progress) -> Iterator[Job]:
        for number, file in enumerate(self._layout):
            for entry, first in file.entries:
                importance = self.plan.importance(entry.tensor)
                row_bytes = blocks.nbytes(entry.type, entry.tensor.shape[-1:])
                for piece in pieces(self.plan, entry):
                    begin = first + piece.begin * row_bytes
                    end = begin + piece.count * row_bytes
                    padding = padded(entry.nbytes) - entry.nbytes if end == first + entry.nbytes else 0
                    encode = partial(self._encode, piece, importance, begin, padding)
                    span = (begin, end + padding)
                    reads = frozenset(part.file for part in piece.weight.parts.values())
                    yield Job(number, entry.name, (span,), piece.bytes_in, piece.memory, encode, reads)

    def _encode(
        self, piece: Piece, importance: np.ndarray | None, begin: int, padding: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Read a piece and encode it, to be written from byte `begin` on; with what fills the tensor up behind it."""
        for data, is_held in self._blocks(piece, importance):
            if not is_held:
                what = f"{piece.weight.spec.name} has values too large for {piece.entry.type}"
                raise InputError(what, where=self.plan.checkpoint.model, fix="give it a wider type by --tensor-type")
            yield begin, data.reshape(-1)
            begin += data.nbytes
        if padding:
            yield begin, np.zeros(padding, np.uint8)

    def _blocks(self, piece: Piece, importance: np.ndarray | None) -> Iterator[tuple[np.ndarray, bool]]:
        """(blocks of some rows, whether they hold all values) of a piece, a part after the other."""
        kind, checkpoint = piece.entry.type, self.plan.checkpoint
        if self.plan.keeps(piece.entry, piece.weight):
            arrays = checkpoint.arrays(piece.weight)
            for suffix, stored in arrays.items():
                check_stored(checkpoint, piece.weight, piece.weight.parts[suffix], stored.reshape(-1), 0)
            data = blocks.of_int4(unpack_codes(arrays[PACKED]), as_float32(arrays["weight_scale"]))
            yield data, blocks.first_bad_block(kind, data) is None
            return
        for rows in read_rows(checkpoint, piece, CACHED if self._device == "cpu" else PIECE):
            data = _encode_rows(piece, rows, importance, self._device)
            row_bytes = blocks.nbytes(kind, rows.shape[-1:])
            if data.dtype != np.uint8 or data.shape != (len(rows), row_bytes):
                what = f"{data.dtype} {list(data.shape)} came, uint8 {[len(rows), row_bytes]} was planned"
                raise PlanViolation(f"{self.out}: {piece.entry.name} as {kind}: {what}")
            yield data, blocks.holds(kind, rows, data)


def _encode_rows(piece: Piece, rows: np.ndarray, importance: np.ndarray | None, device: str) -> np.ndarray:
    """float32 [rows, cols] → uint8 [rows, bytes of a row], each matrix with its own importance [matrices, cols]."""
    kind = piece.entry.type
    encode = blocks.encode if device == "cpu" else partial(_encode_on, device)
    if importance is None:
        return encode(kind, rows)
    per_matrix = piece.entry.tensor.shape[-2]
    if len(rows) <= per_matrix:
        return encode(kind, rows, importance[piece.matrix])
    split = np.split(rows, len(rows) // per_matrix)
    return np.concatenate([encode(kind, r, i) for r, i in zip(split, importance, strict=True)])


def _encode_on(device: str, kind: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """As `blocks.encode`, on a CUDA device where there are kernels of the type. Triton compiles a kernel at its first
    use: one thread at a time."""
    import torch

    from dsv2quant.kernels.gguf_encode import ENCODED, encode

    if kind not in ENCODED:
        return blocks.encode(kind, rows, importance)
    with _one_at_a_time, torch.cuda.device(device):
        weights = None if importance is None else torch.from_numpy(importance).to(device)
        found: np.ndarray = encode(kind, torch.from_numpy(rows).to(device), weights).cpu().numpy()
    return found


PIECE = 1 << 22  # weights that one worker encodes at a time, unless they can't be cut
CACHED = 1 << 18  # weights that are widened and encoded while they are in a core's cache
_stored, _widened = Scratch(), Scratch()


@dataclass(frozen=True)
class Piece:
    """Rows `first` … `first + count` − 1 of matrix `matrix` of a tensor, from `weight`; of kv_b_proj's halves, the rows
    of all matrices."""

    entry: Entry
    weight: Weight
    matrix: int
    first: int
    count: int

    @property
    def begin(self) -> int:
        """Its first row, counted over all matrices."""
        shape = self.entry.tensor.shape
        return self.matrix * (shape[-2] if len(shape) > 1 else 1) + self.first

    @property
    def bytes_in(self) -> int:
        """Its share of the weight's stored bytes."""
        size = self.count * self.entry.tensor.shape[-1]
        return self.weight.nbytes * size // self.weight.spec.size

    @property
    def memory(self) -> int:
        """What reading it takes, in bytes: its stored rows, or where it is read as a whole, twice that in float32."""
        is_cut = self.weight.scheme == "bf16" and self.entry.tensor.kind not in (K_B, V_B)
        return self.bytes_in if is_cut else 2 * 4 * self.weight.spec.size


def pieces(plan: GgufPlan, entry: Entry) -> Iterator[Piece]:
    """A tensor cut into pieces, in the order of the file. kv_b_proj's halves, and weights that are decoded as a whole,
    are not cut."""
    tensor = entry.tensor
    weights = [plan.weights[spec.name] for spec in tensor.specs]
    if tensor.kind in (K_B, V_B) or len(tensor.shape) == 1:
        yield Piece(entry, weights[0], 0, 0, math.prod(tensor.shape[:-1]))
        return
    rows, cols = tensor.shape[-2:]
    for matrix, weight in enumerate(weights):
        step = _whole_heads(weight.spec, PIECE // cols) if weight.scheme == "bf16" else rows
        for first in range(0, rows, step):
            yield Piece(entry, weight, matrix, first, min(step, rows - first))


def read_rows(checkpoint: HfCheckpoint, piece: Piece, weights: int = CACHED) -> Iterator[np.ndarray]:
    """A piece's rows in order, about `weights` elements at a time: float32 [rows, cols], valid until the next are asked
    for.

    Raises InputError naming the weight and index where it is NaN or infinite.
    """
    tensor, weight = piece.entry.tensor, piece.weight
    step = _whole_heads(weight.spec, weights // tensor.shape[-1])
    if tensor.kind in (K_B, V_B):
        whole = np.concatenate([rows.copy() for rows in _floats(checkpoint, weight, 0, weight.spec.shape[0], step)])
        yield _half(tensor.kind, tensor.shape, whole)
        return
    for rows in _floats(checkpoint, weight, piece.first, piece.count, step):
        yield rows if weight.spec.gguf_heads is None else _paired(weight.spec, rows)


def _whole_heads(spec: TensorSpec, rows: int) -> int:
    """About so many rows, at least one; of heads whose rows are put in another order, those of whole heads."""
    width = 1 if spec.gguf_heads is None else spec.shape[0] // spec.gguf_heads
    return max(1, rows // width) * width


def _paired(spec: TensorSpec, rows: np.ndarray) -> np.ndarray:
    """Whole heads' rows of a matrix, or a vector, in a GGUF file's order."""
    assert spec.gguf_heads is not None
    elements = rows.reshape(-1, *spec.shape[1:])
    return as_pairs(elements, len(elements) * spec.gguf_heads // spec.shape[0]).reshape(rows.shape)


def _half(kind: str, shape: tuple[int, ...], kv_b: np.ndarray) -> np.ndarray:
    """kv_b [heads · (nope + v), latent] → k_b [heads · latent, nope] or v_b [heads · v, latent]."""
    per_head = kv_b.reshape(shape[0], -1, kv_b.shape[1])
    if kind == K_B:
        return np.ascontiguousarray(per_head[:, : shape[2]].swapaxes(1, 2)).reshape(-1, shape[2])
    return np.ascontiguousarray(per_head[:, -shape[1] :]).reshape(-1, shape[2])


def _floats(checkpoint: HfCheckpoint, weight: Weight, first: int, count: int, step: int) -> Iterator[np.ndarray]:
    """`count` rows of a weight from row `first`, `step` at a time; a vector is one row."""
    cols, part = weight.spec.shape[-1], weight.stored
    if weight.scheme != "bf16":
        values = checkpoint.encodable(weight)
        check_decoded(checkpoint, weight, values)
        yield values
        return
    width = part.nbytes // weight.spec.size
    buffer = _stored.take(count * cols * width)
    stored = checkpoint.read(part, first * cols * width, count * cols * width, buffer).reshape(count, -1)
    for row in range(0, count, step):
        some = stored[row : row + step].reshape(-1)
        bits = some.view(HELD_AS[part.dtype])
        if part.dtype == "BF16":
            values = _widened.take(bits.size * 4).view(np.float32)
            check_stored(checkpoint, weight, part, bits, (first + row) * cols)
            widen(bits, values)
        else:
            values = bits.astype(np.float32, copy=False)
            check_stored(checkpoint, weight, part, values, (first + row) * cols)
        yield values.reshape(-1, cols)
