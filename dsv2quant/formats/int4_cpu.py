"""Choosing INT4 scales and codes on the CPU, compiled (numba).

Sixteen rows are searched at a time and the innermost loop runs over rows: each row's sum then adds in order of its
columns, so that the result does not depend on the processor's vector width. One thread each; the GIL is released.
"""

from __future__ import annotations

import numpy as np

from dsv2quant.formats.compiled import compiled

# Candidate scales in units of amax / 7. 1 comes first and stays where no error tells candidates apart.
FACTORS = np.roll(np.linspace(0.45, 1.05, 61), 6).astype(np.float32)
LARGEST_FLOAT16 = np.float32(65280)  # that BF16 holds too
_LANES = 16


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 → the nearest BF16 value, ties to even, as float32; x must be finite."""
    bits = x.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)).view(
        np.float32
    )


def round_to_float16(x: np.ndarray) -> np.ndarray:
    """float32 → a near positive value that BF16 and float16 both hold, from 2^-24 to 65280, as float32.

    Rounded to BF16 first: below 2^-17, where float16's spacing is 2^-24, it has no more bits than BF16 either.
    """
    return np.clip(round_to_bf16(x), np.float32(2.0**-24), LARGEST_FLOAT16).astype(np.float16).astype(np.float32)


def rtn_scales(weight: np.ndarray, group: int) -> np.ndarray:
    """amax / 7.5 of each group, rounded to BF16: weight float32 [rows, cols] → [rows, cols / group].

    The range is that of 16 levels (compressed-tensors, quantization/utils/helpers.py, calculate_qparams). All-zero
    groups get scale 1.
    """
    scales = round_to_bf16(group_amax(weight, group) / np.float32(7.5))
    return np.where(scales > 0, scales, np.float32(1))


def search_scales(weight: np.ndarray, importance: np.ndarray, group: int) -> np.ndarray:
    """The BF16 scale of each group with the least Σ importance · (code × scale − weight)², of `FACTORS` × amax / 7.

    weight float32 [rows, cols], importance float32 [1 or rows, cols] → float32 [rows, cols / group].
    """
    unit = group_amax(weight, group) / np.float32(7)
    candidates = round_to_bf16(unit[:, :, None] * FACTORS)  # [rows, groups, factors]
    candidates = np.where(candidates > 0, candidates, np.float32(1))
    best = candidates[:, :, 0].copy()
    _search(np.ascontiguousarray(weight), np.ascontiguousarray(importance), candidates, best)
    return best


def nearest_codes(weight: np.ndarray, scales: np.ndarray, low: int = -8, high: int = 7) -> np.ndarray:
    """int8 codes from `low` to `high` nearest to weight / scale, ties to even."""
    codes = np.empty(weight.shape, np.int8)
    _round(np.ascontiguousarray(weight), scales, codes, np.float32(low), np.float32(high))
    return codes


def group_amax(weight: np.ndarray, group: int) -> np.ndarray:
    """The largest magnitude of each group, float32 [rows, cols / group]."""
    return np.abs(weight).reshape(len(weight), -1, group).max(-1)


@compiled
def _round(weight, scales, codes, low, high):  # type: ignore[no-untyped-def]
    rows, cols = weight.shape
    group = cols // scales.shape[1]
    for i in range(rows):
        for g in range(scales.shape[1]):
            scale = scales[i, g]
            for j in range(g * group, (g + 1) * group):
                codes[i, j] = np.int8(min(max(np.rint(weight[i, j] / scale), low), high))


@compiled
def _search(weight, importance, candidates, best):  # type: ignore[no-untyped-def]
    rows, cols = weight.shape
    groups, factors = candidates.shape[1], candidates.shape[2]
    group = cols // groups
    tile = np.zeros((group, _LANES), np.float32)
    weights = np.zeros((group, _LANES), np.float32)
    scale, error = np.ones(_LANES, np.float32), np.empty(_LANES, np.float32)
    least = np.empty(_LANES, np.float32)
    for first in range(0, rows, _LANES):
        lanes = min(_LANES, rows - first)
        for g in range(groups):
            for lane in range(lanes):
                row = first + lane
                at = row if importance.shape[0] > 1 else 0
                for k in range(group):
                    tile[k, lane] = weight[row, g * group + k]
                    weights[k, lane] = importance[at, g * group + k]
            least[:] = np.inf
            for f in range(factors):
                for lane in range(lanes):
                    scale[lane] = candidates[first + lane, g, f]
                _errors(tile, weights, scale, error)
                for lane in range(lanes):
                    if error[lane] < least[lane]:
                        least[lane] = error[lane]
                        best[first + lane, g] = scale[lane]


@compiled
def _errors(tile, weights, scale, error):  # type: ignore[no-untyped-def]
    """error[lane] = Σ_k weights · (code × scale − tile)²."""
    error[:] = 0
    for k in range(tile.shape[0]):
        for lane in range(_LANES):
            x = tile[k, lane]
            code = min(max(np.rint(x / scale[lane]), np.float32(-8)), np.float32(7))
            off = code * scale[lane] - x
            error[lane] += weights[k, lane] * off * off
