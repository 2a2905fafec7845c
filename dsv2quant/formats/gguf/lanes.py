"""What the compiled block quantizers share: blocks in lockstep, ggml's rounding, float16 by its bits.

ggml's x86-64 library adds a block's terms in order, without FMA. To use the vector unit and still add in that order,
`LANES` blocks are searched at a time: arrays are [element, lane] and the innermost loop runs over lanes. One thread
each; the GIL is released.
"""

from __future__ import annotations

import numpy as np

from dsv2quant.formats.compiled import compiled

LANES = 64
TINY = np.float32(1e-15)  # GROUP_MAX_EPS: a block whose magnitudes are all below is taken as zero

_MAGIC = np.float32(12582912)  # 1.5 × 2^23


@compiled
def nearest(v):  # type: ignore[no-untyped-def]
    """ggml's nearest_int: ties to even; beyond ±2^22 what the bits happen to say."""
    bits = np.float32(v + _MAGIC).view(np.int32)
    return np.int32(np.int32(bits & np.int32(0x7FFFFF)) - np.int32(0x400000))


@compiled
def level(v, low, high):  # type: ignore[no-untyped-def]
    """nearest(v) within [low, high], as float32."""
    return np.float32(min(max(nearest(v), np.int32(low)), np.int32(high)))


@compiled
def half_bits(x):  # type: ignore[no-untyped-def]
    """float32 → the bits of the nearest float16, ties to even; too large becomes infinity."""
    bits = np.float32(x).view(np.uint32)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if size > np.uint32(0x7F800000):
        return np.uint16(sign | np.uint32(0x7E00))
    if size >= np.uint32(0x477FF000):
        return np.uint16(sign | np.uint32(0x7C00))
    if size < np.uint32(0x38800000):  # subnormal: adding 0.5 rounds to a multiple of 2^-24
        rounded = np.float32(size.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(0x3F000000)
    else:
        odd = (size >> np.uint32(13)) & np.uint32(1)
        rounded = (size + np.uint32(0xFFF) + odd - np.uint32(0x38000000)) >> np.uint32(13)
    return np.uint16(sign | rounded)


@compiled
def half_value(bits):  # type: ignore[no-untyped-def]
    """The bits of a float16 → float32."""
    bits = np.uint32(bits)
    size = bits & np.uint32(0x7FFF)
    if size < np.uint32(0x400):
        value = np.float32(size) * np.float32(2.0**-24)
    elif size >= np.uint32(0x7C00):
        value = np.uint32((size << np.uint32(13)) | np.uint32(0x7F800000)).view(np.float32)
    else:
        value = np.uint32((size << np.uint32(13)) + np.uint32(0x38000000)).view(np.float32)
    return -value if bits & np.uint32(0x8000) else value


@compiled
def put_half(out, at, x):  # type: ignore[no-untyped-def]
    """Write x as a float16 to out[at : at + 2], little-endian, and return the value it holds now."""
    bits = half_bits(x)
    out[at] = np.uint8(bits & np.uint16(0xFF))
    out[at + 1] = np.uint8(bits >> np.uint16(8))
    return half_value(bits)


@compiled
def load(blocks, first, tile):  # type: ignore[no-untyped-def]
    """tile[k, lane] = blocks[first + lane, k]; zero beyond the last block."""
    count = min(LANES, blocks.shape[0] - first)
    for lane in range(count):
        for k in range(tile.shape[0]):
            tile[k, lane] = blocks[first + lane, k]
    for lane in range(count, LANES):
        for k in range(tile.shape[0]):
            tile[k, lane] = 0


@compiled
def load_cyclic(blocks, first, tile):  # type: ignore[no-untyped-def]
    """tile[k, lane] = blocks[(first + lane) % len(blocks), k]: what one row holds of a matrix of equal rows."""
    row = first % blocks.shape[0]
    for lane in range(LANES):
        for k in range(tile.shape[0]):
            tile[k, lane] = blocks[row, k]
        row += 1
        if row == blocks.shape[0]:
            row = 0


@compiled
def weigh(tile, weight, spread):  # type: ignore[no-untyped-def]
    """weight · √(spread[lane] + x²)."""
    for k in range(tile.shape[0]):
        for lane in range(LANES):
            weight[k, lane] *= np.sqrt(spread[lane] + tile[k, lane] * tile[k, lane])


@compiled
def weigh_by_square(tile, weight):  # type: ignore[no-untyped-def]
    """weight = x²."""
    for k in range(tile.shape[0]):
        for lane in range(LANES):
            weight[k, lane] = tile[k, lane] * tile[k, lane]


@compiled
def sum_squares(blocks, first, total):  # type: ignore[no-untyped-def]
    """total[lane] = Σ_k blocks[first + lane, k]²; zero beyond the last block."""
    total[:] = 0
    count = min(LANES, blocks.shape[0] - first)
    for k in range(blocks.shape[1]):
        for lane in range(count):
            x = blocks[first + lane, k]
            total[lane] += x * x


@compiled
def sum_weights(weight, total):  # type: ignore[no-untyped-def]
    """total[lane] = Σ_k weight."""
    total[:] = 0
    for k in range(weight.shape[0]):
        for lane in range(LANES):
            total[lane] += weight[k, lane]
