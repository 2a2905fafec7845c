"""Rows of a GGUF tensor, read from the checkpoint's weights as float32."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dsv2quant.checkpoint import Checkpoint, Weight
from dsv2quant.formats.amax_cpu import widen
from dsv2quant.formats.gguf.plan import GgufPlan, Line
from dsv2quant.formats.gguf.tensors import K_B, V_B
from dsv2quant.formats.part import NonFiniteError
from dsv2quant.formats.plain import check_finite
from dsv2quant.scratch import Scratch

PIECE = 1 << 22  # weights that one worker encodes at a time, unless they can't be cut
CACHED = 1 << 18  # weights that are widened and encoded while they are in a core's cache
_stored, _widened = Scratch(), Scratch()


@dataclass(frozen=True)
class Piece:
    """Rows `first` … `first + count` − 1 of matrix `matrix` of a tensor, from `weight`; of kv_b_proj's halves, the rows
    of all matrices."""

    line: Line
    weight: Weight
    matrix: int
    first: int
    count: int

    @property
    def begin(self) -> int:
        """Its first row, counted over all matrices."""
        shape = self.line.tensor.shape
        return self.matrix * (shape[-2] if len(shape) > 1 else 1) + self.first

    @property
    def bytes_in(self) -> int:
        """Its share of the weight's stored bytes."""
        size = self.count * self.line.tensor.shape[-1]
        return self.weight.nbytes * size // self.weight.slot.size


def pieces(plan: GgufPlan, line: Line) -> Iterator[Piece]:
    """A tensor cut into pieces, in the order of the file. kv_b_proj's halves, and weights that are decoded as a whole,
    are not cut."""
    tensor = line.tensor
    weights = [plan.weights[slot.name] for slot in tensor.slots]
    if tensor.kind in (K_B, V_B) or len(tensor.shape) == 1:
        yield Piece(line, weights[0], 0, 0, math.prod(tensor.shape[:-1]))
        return
    rows, cols = tensor.shape[-2:]
    for matrix, weight in enumerate(weights):
        step = max(1, PIECE // cols) if weight.scheme == "bf16" else rows
        for first in range(0, rows, step):
            yield Piece(line, weight, matrix, first, min(step, rows - first))


def read_rows(checkpoint: Checkpoint, piece: Piece, weights: int = CACHED) -> Iterator[np.ndarray]:
    """A piece's rows in order, about `weights` elements at a time: float32 [rows, cols], valid until the next are asked
    for.

    Raises InputError naming the weight and index where it is NaN or infinite.
    """
    tensor, weight = piece.line.tensor, piece.weight
    if tensor.kind in (K_B, V_B):
        whole = np.concatenate([rows.copy() for rows in _floats(checkpoint, weight, 0, weight.slot.shape[0], CACHED)])
        yield _half(tensor.kind, tensor.shape, whole)
    else:
        yield from _floats(checkpoint, weight, piece.first, piece.count, weights)


def _half(kind: str, shape: tuple[int, ...], kv_b: np.ndarray) -> np.ndarray:
    """kv_b [heads · (nope + v), latent] → k_b [heads · latent, nope] or v_b [heads · v, latent]."""
    per_head = kv_b.reshape(shape[0], -1, kv_b.shape[1])
    if kind == K_B:
        return np.ascontiguousarray(per_head[:, : shape[2]].swapaxes(1, 2)).reshape(-1, shape[2])
    return np.ascontiguousarray(per_head[:, -shape[1] :]).reshape(-1, shape[2])


def _floats(checkpoint: Checkpoint, weight: Weight, first: int, count: int, weights: int) -> Iterator[np.ndarray]:
    """`count` rows of a weight from row `first`; a vector is one row."""
    cols = weight.slot.shape[-1]
    if weight.scheme != "bf16":
        values = checkpoint.encodable(weight)
        _check(checkpoint, weight, values.reshape(-1), 0)
        yield values
        return
    part = weight.stored
    width = part.nbytes // weight.slot.size
    buffer = _stored.take(count * cols * width)
    stored = checkpoint.read(part, first * cols * width, count * cols * width, buffer).reshape(count, -1)
    step = max(1, weights // cols)
    for row in range(0, count, step):
        some = stored[row : row + step].reshape(-1)
        bits = some.view({"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[part.dtype])
        if part.dtype == "BF16":
            values = _widened.take(bits.size * 4).view(np.float32)
            _check(checkpoint, weight, bits, (first + row) * cols)
            widen(bits, values)
        else:
            values = bits.astype(np.float32, copy=False)
            _check(checkpoint, weight, values, (first + row) * cols)
        yield values.reshape(-1, cols)


def _check(checkpoint: Checkpoint, weight: Weight, values: np.ndarray, begin: int) -> None:
    """Raise InputError where flat `values`, which begin at element `begin` of the weight, are not finite."""
    try:
        check_finite(values)
    except NonFiniteError as error:
        index = np.unravel_index(begin + error.index[0], weight.slot.shape)
        raise checkpoint.not_finite(weight, [int(i) for i in index]) from None
