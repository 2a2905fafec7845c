"""What a block stores, taken out and put back: codes, what multiplies them, and the float16 scales of whole blocks.

Values come out as the gguf library's own dequantize has them, bit for bit (layouts.py says where all of it lies).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsv2quant.formats.compiled import compiled
from dsv2quant.formats.gguf.blocks import count_blocks
from dsv2quant.formats.gguf.layouts import HALVES, SPECS, Plane, Spec
from dsv2quant.formats.gguf.ternary import pack_tq1_0, unpack_tq1_0

_PIECES, _SHIFTS = "IQ1_M", np.arange(0, 16, 4, dtype=np.uint16)  # its scale: four bits of each of four words


class Levels(NamedTuple):
    """A matrix as code · step + offset, in float32; a group is consecutive columns of a row, columns / groups of them.

    Codes are `low` to `high`; where there is a `table`, of its values alone.
    """

    codes: np.ndarray  # int8 [rows, columns]
    step: np.ndarray  # float32 [rows, groups]
    offset: np.ndarray | None  # float32 [rows, groups]
    low: int
    high: int
    table: np.ndarray | None  # int8 [16], by the number that is stored; MXFP4's has 0 twice


def levels(name: str, blocks: np.ndarray) -> Levels | None:
    """Of `blocks`, uint8 [rows, bytes of a row] of a block type; None where the type has no codes: floats, points of a
    grid (IQ1 to IQ3), and what is only read (Q1_0, Q2_0, NVFP4).

    Raises ValueError where a row is not whole blocks.
    """
    spec = SPECS.get(name)
    if spec is None:
        return None
    rows, data = len(blocks), _flat(name, blocks)
    codes = np.empty((len(data), spec.values), np.int8)
    values = _values(spec)
    _read(data, _planes(spec.codes), _wanted(spec.codes), values, codes)
    step, *offset = (part.reshape(rows, -1) for part in _steps(spec, data))
    return Levels(
        codes.reshape(rows, -1), step, offset[0] if offset else None,
        int(values.min()), int(values.max()), values if spec.table else None,
    )  # fmt: skip


def with_codes(name: str, blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """A copy of `blocks`, uint8 [rows, bytes of a row], with these codes, int8 [rows, columns], and its own scales.

    What MXFP4 has as −0 becomes 0. Raises ValueError where the type has no codes, a row is not whole blocks, or codes
    are of another shape or dtype or not among those that `levels` names.
    """
    if name not in SPECS:
        raise ValueError(f"{name} has no codes")
    spec, shape = SPECS[name], (len(blocks), count_blocks(name, blocks) * SPECS[name].values)
    if codes.shape != shape or codes.dtype != np.int8:
        raise ValueError(f"codes are {codes.dtype} {codes.shape}; blocks of {name} have int8 {shape}")
    numbers = np.full(256, -1, np.int16)  # of each code, from −128
    values = _values(spec)
    numbers[values[::-1].astype(np.int16) + 128] = np.arange(len(values))[::-1]  # the first of equals
    out = _flat(name, blocks).copy()
    if not _write(np.ascontiguousarray(codes).reshape(-1, spec.values), numbers, _planes(spec.codes), out):
        raise ValueError(f"{name} does not have all of these codes")
    return out.reshape(blocks.shape)


def has_scale(name: str) -> bool:
    """Whether blocks of this type have a float16 scale: all but floats, MXFP4 and NVFP4."""
    return name in HALVES or name == _PIECES


def with_factors(name: str, blocks: np.ndarray, factors: np.ndarray) -> np.ndarray | None:
    """A copy of `blocks`, uint8 [rows, bytes of a row], with each block's values times a factor.

    factors float32 [rows, blocks of a row] go to the float16 scales, d and with it dmin or m, and are rounded there to
    nearest. Where that would make one 0 or infinite, the block stays as it was. None where the type has no such scale.

    Raises ValueError where a row is not whole blocks or factors are not one for each.
    """
    if not has_scale(name):
        return None
    shape = (len(blocks), count_blocks(name, blocks))
    if factors.shape != shape:
        raise ValueError(f"factors have shape {factors.shape}; blocks of {name} need {shape}")
    out = _flat(name, blocks).copy()
    _put_scales(name, out, _multiplied(_scales(name, out), factors.reshape(-1, 1)))
    return out.reshape(blocks.shape)


def _flat(name: str, blocks: np.ndarray) -> np.ndarray:
    """A row for each block."""
    return np.ascontiguousarray(blocks).reshape(len(blocks) * count_blocks(name, blocks), -1)


def _values(spec: Spec) -> np.ndarray:
    """The code of each number, int8; Q8_0's are bytes with a sign."""
    return np.array(spec.table or np.arange(spec.numbers) - spec.zero).astype(np.int8)


def _steps(spec: Spec, data: np.ndarray) -> list[np.ndarray]:
    """The steps and, if any, offsets of each block's groups, float32 [blocks, groups], multiplied as ggml does."""
    if not spec.halves:
        return [np.ldexp(np.float32(1), data[:, :1].astype(np.int32) - 128)]  # half of it: codes are in half units
    halves = [data[:, at : at + 2].view(np.float16).astype(np.float32) for at in spec.halves]
    if not spec.multiples:
        return halves
    multiples = np.empty((len(data), len(halves) * spec.values // spec.group), np.int8)
    values = (np.arange(256) + spec.low).astype(np.int8)
    _read(data, _planes(spec.multiples), _wanted(spec.multiples), values, multiples)
    step, *offset = (half * part for half, part in zip(halves, np.split(multiples, len(halves), 1), strict=True))
    return [step, *(-part for part in offset)]


def _scales(name: str, data: np.ndarray) -> np.ndarray:
    """float16 [blocks, 1 or 2]."""
    if name == _PIECES:
        pieces = data[:, 48:].view(np.uint16) >> 12 << _SHIFTS
        return np.bitwise_or.reduce(pieces, 1, keepdims=True).view(np.float16)
    return np.concatenate([data[:, at : at + 2].view(np.float16) for at in HALVES[name]], 1)


def _put_scales(name: str, data: np.ndarray, scales: np.ndarray) -> None:
    if name == _PIECES:
        words = data[:, 48:].view(np.uint16)
        words[:] = words & 0x0FFF | (scales.view(np.uint16) >> _SHIFTS & 15) << 12
        return
    for i, at in enumerate(HALVES[name]):
        data[:, at : at + 2] = np.ascontiguousarray(scales[:, i : i + 1]).view(np.uint8)


def _multiplied(scales: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """float16 [blocks, 1 or 2] times [blocks, 1], a block's together or not at all. float64 holds the product exactly:
    it is rounded once."""
    with np.errstate(over="ignore", invalid="ignore"):
        products = (scales.astype(np.float64) * factors).astype(np.float16)
    fits = np.isfinite(products) & ((products != 0) | (scales == 0))
    return np.where(fits.all(1, keepdims=True), products, scales)


def _planes(planes: tuple[Plane, ...]) -> np.ndarray:
    """begin, end, width and bits of each, int64 [planes, 4]."""
    return np.array([plane[:4] for plane in planes], np.int64).reshape(-1, 4)


def _wanted(planes: tuple[Plane, ...]) -> np.ndarray:
    """Which of the sequences wanted each one of a plane is, −1 none, int64 [planes, 32]."""
    wanted = np.full((len(planes), 32), -1, np.int64)
    for row, plane in zip(wanted, planes, strict=True):
        order = plane.order or range(32)
        row[list(order)] = np.arange(len(order))
    return wanted


@compiled
def _read(blocks, planes, wanted, values, out):  # type: ignore[no-untyped-def]
    """blocks uint8 [blocks, bytes] → out int8 [blocks, numbers], each number's value."""
    numbers = np.empty(260, np.uint8)
    for i in range(len(blocks)):
        numbers[:] = 0
        if len(planes) == 0:
            unpack_tq1_0(blocks[i], numbers)
        shift = 0
        for p in range(len(planes)):
            begin, end, width, bits = planes[p]
            sequence = 0
            for first in range(begin, end, width):
                for low in range(0, 8, bits):
                    at = wanted[p, sequence] * width
                    sequence += 1
                    for k in range(width if at >= 0 else 0):
                        numbers[at + k] |= (blocks[i, first + k] >> low & ((1 << bits) - 1)) << shift
            shift += bits
        for k in range(out.shape[1]):
            out[i, k] = values[numbers[k]]


@compiled
def _write(codes, numbers, planes, out):  # type: ignore[no-untyped-def]
    """codes int8 [blocks, values] into `out` uint8 [blocks, bytes]; False where one has no number, from −128 on."""
    found = np.zeros(260, np.uint8)
    for i in range(len(codes)):
        least = np.int16(0)
        for k in range(codes.shape[1]):
            number = numbers[np.int64(codes[i, k]) + 128]
            least = min(least, number)
            found[k] = number
        if least < 0:
            return False
        if len(planes) == 0:
            pack_tq1_0(found, out[i])
        shift = 0
        for p in range(len(planes)):
            begin, end, width, bits = planes[p]
            at = 0
            out[i, begin:end] = 0
            for first in range(begin, end, width):
                for low in range(0, 8, bits):
                    for k in range(width):
                        out[i, first + k] |= (found[at + k] >> shift & ((1 << bits) - 1)) << low
                    at += width
            shift += bits
    return True
