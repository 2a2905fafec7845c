"""The grids of IQ1, IQ2 and IQ3: points that groups of 4 or 8 levels may be, for every other group its neighbours, and
which of these is the nearest to a group of values.

The points are gguf-py's (gguf/quants.py; tables of ggml/src/ggml-common.h), and their order is that of the codes. A
group's neighbours are all points at its few smallest distances, by distance and then by code (ggml/src/ggml-quants.c,
iq2xs_init_impl and iq3xs_init_impl). They lie in chunks of `CHUNK`, values side by side, so that a vector unit measures
a chunk at a time.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from gguf import quants

from dsv2quant.formats.compiled import compiled

CHUNK = 16
_MOST = np.int64(0x7FFFFFFFFFFFFFFF)
_SHELLS = {"IQ1_S": 3, "IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ3_XXS": 2, "IQ3_S": 3}  # of neighbours


class Grid(NamedTuple):
    """A group is known by its key: level i of 8 at bit 2 i, or of 4 at bit 3 i."""

    codes: np.ndarray  # int32 [keys]: the point's code, or where the group is none, −1 − its first chunk
    ends: np.ndarray  # int32 [chunks]: of a group's first chunk, the one behind its last
    keys: np.ndarray  # int32 [chunks, CHUNK], of points; the last of a group is repeated to the end of its chunk
    values: np.ndarray  # int8 [chunks, width, CHUNK], of those points: 2 · level + 1, of IQ1 level − 1


@cache
def grid(name: str) -> Grid:
    """That of a type; IQ1_M has IQ1_S's. It takes up to 0.2 s to make."""
    source = getattr(quants, name)
    source.init_grid()
    levels = np.searchsorted(np.float32(source.grid_map), source.grid[0, 0]).astype(np.int8)
    width, choices, shells = levels.shape[1], len(source.grid_map), _SHELLS[name]
    bits = 2 if width == 8 else 3
    codes = np.zeros(1 << bits * width, np.int32)
    ends = np.empty(_survey(levels, bits, choices, shells, codes), np.int32)
    nearest = np.empty((len(ends), CHUNK), np.int32)
    _gather(levels, bits, shells, codes, ends, nearest)
    values = levels - np.int8(1) if name == "IQ1_S" else levels * np.int8(2) + np.int8(1)
    keys = (levels.astype(np.int32) << np.arange(0, bits * width, bits)).sum(1).astype(np.int32)
    return Grid(codes, ends, keys[nearest], np.ascontiguousarray(values[nearest].swapaxes(1, 2)))


@compiled
def _measure(levels, bits, key, distances):  # type: ignore[no-untyped-def]
    """distances[code]: the square of that of a point from the group of this key."""
    distances[:] = 0
    for i in range(levels.shape[1]):
        level = (key >> bits * i) & ((1 << bits) - 1)
        for code in range(len(levels)):
            off = np.int32(levels[code, i]) - np.int32(level)
            distances[code] += off * off


@compiled
def _reach(distances, shells):  # type: ignore[no-untyped-def]
    """The largest of the `shells` smallest distances, and how many points are no farther."""
    counts, near, reach = np.bincount(distances), 0, 0
    for distance in range(len(counts)):
        if counts[distance] and shells:
            near, reach, shells = near + counts[distance], distance, shells - 1
    return reach, near


@compiled
def _survey(levels, bits, choices, shells, codes):  # type: ignore[no-untyped-def]
    """codes of every key whose levels are below `choices`; the number of all chunks is returned."""
    distances, total = np.empty(len(levels), np.int32), 0
    for key in range(len(codes)):
        largest = 0
        for i in range(levels.shape[1]):
            largest = max(largest, (key >> bits * i) & ((1 << bits) - 1))
        if largest >= choices:
            continue
        _measure(levels, bits, key, distances)
        nearest = np.argmin(distances)
        if distances[nearest] == 0:
            codes[key] = nearest
        else:
            codes[key] = -1 - total
            total += (_reach(distances, shells)[1] + CHUNK - 1) // CHUNK
    return total


@compiled
def _gather(levels, bits, shells, codes, ends, nearest):  # type: ignore[no-untyped-def]
    """ends, and the codes of every chunk's points."""
    distances = np.empty(len(levels), np.int32)
    for key in range(len(codes)):
        if codes[key] >= 0:
            continue
        _measure(levels, bits, key, distances)
        reach, near = _reach(distances, shells)
        first = -1 - codes[key]
        ends[first] = first + (near + CHUNK - 1) // CHUNK
        found, at = nearest[first : ends[first]].reshape(-1), 0
        for distance in range(reach + 1):
            for code in range(len(levels)):
                if distances[code] == distance:
                    found[at] = code
                    at += 1
        found[at:] = found[at - 1]


@compiled
def pick(keys, values, weights, scale, alive, grid, shift, picked, missed):  # type: ignore[no-untyped-def]
    """picked [group, lane], in lanes that are alive: the key, or where it is of no point, `missed`, that of the
    neighbour with the least error in values [lane, element], weighted with weights and scaled by scale [lane].

    shift [group, lane] or None is added to the points' values.
    """
    points, width, near = grid.keys.reshape(-1), grid.values.shape[1], grid.values
    x, w = values.reshape(-1), weights.reshape(-1)
    for lane in range(len(alive)):
        if not alive[lane]:
            continue
        s = scale[lane]
        for group in range(len(keys)):
            key = keys[group, lane]
            code, at = grid.codes[key], lane * values.shape[1] + group * width
            missed[group, lane] = code < 0
            if code < 0:
                least = _MOST
                side = None if shift is None else shift[group, lane]
                for chunk in range(-1 - code, grid.ends[-1 - code]):
                    if width == 8:
                        for j in range(CHUNK):
                            off = _off(near[chunk, 0, j], side, x[at], w[at], s)
                            off += _off(near[chunk, 1, j], side, x[at + 1], w[at + 1], s)
                            off += _off(near[chunk, 2, j], side, x[at + 2], w[at + 2], s)
                            off += _off(near[chunk, 3, j], side, x[at + 3], w[at + 3], s)
                            off += _off(near[chunk, 4, j], side, x[at + 4], w[at + 4], s)
                            off += _off(near[chunk, 5, j], side, x[at + 5], w[at + 5], s)
                            off += _off(near[chunk, 6, j], side, x[at + 6], w[at + 6], s)
                            off += _off(near[chunk, 7, j], side, x[at + 7], w[at + 7], s)
                            least = min(least, _ranked(off, chunk * CHUNK + j))
                    else:
                        for j in range(CHUNK):
                            off = _off(near[chunk, 0, j], side, x[at], w[at], s)
                            off += _off(near[chunk, 1, j], side, x[at + 1], w[at + 1], s)
                            off += _off(near[chunk, 2, j], side, x[at + 2], w[at + 2], s)
                            off += _off(near[chunk, 3, j], side, x[at + 3], w[at + 3], s)
                            least = min(least, _ranked(off, chunk * CHUNK + j))
                key = points[least & np.int64(0xFFFFFFFF)]
            picked[group, lane] = key


@compiled
def _off(value, shift, x, weight, scale):  # type: ignore[no-untyped-def]
    value = np.float32(value) if shift is None else np.float32(value) + shift
    off = scale * value - x
    return weight * off * off


@compiled
def _ranked(error, number):  # type: ignore[no-untyped-def]
    """One number to compare error and then number by: floats that are not negative compare as their bits do."""
    return np.int64(np.float32(error).view(np.int32)) << np.int64(32) | np.int64(number)
