"""What the GGUF kernels share; the counterpart of formats/gguf/lanes.py, one lane being one thread here.

A lane holds its whole sub-block in registers: a tuple of SIZE tensors [LANES], element k of every lane in the k-th. So
it adds its terms in ggml's order whatever the compiler does with reductions. The rest of the identity: divisions and
square roots by div_rn and sqrt_rn, and every launch with `EXACT`, since a contraction to FMA would round once less.
"""

import torch
import triton
import triton.language as tl

LANES = 128  # sub-blocks (or blocks, or elements) of one program
TINY: tl.constexpr = tl.constexpr(1e-15)  # GROUP_MAX_EPS
MAGIC: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 × 2^23
EXACT = {"num_warps": 4, "enable_fp_fusion": False}


def programs(count: int, lanes: int) -> tuple[int]:
    return (triton.cdiv(count, lanes),)


@triton.jit
def nearest(v):
    """ggml's nearest_int: ties to even; beyond ±2^22 what the bits happen to say. A NaN gives 0, as x86's bits do; a
    GPU's NaN has others."""
    bits = (v + MAGIC).to(tl.int32, bitcast=True) & 0x7FFFFF
    return tl.where(v == v, bits, 0x400000) - 0x400000


@triton.jit
def level(v, low: tl.constexpr, high: tl.constexpr):
    """nearest(v) within [low, high], as float32; made from the bits, since GPUs convert integers slowly."""
    bits = (v + MAGIC).to(tl.int32, bitcast=True) & 0x7FFFFF
    bits = tl.where(v == v, bits, 0x400000)
    bits = tl.minimum(tl.maximum(bits, 0x400000 + low), 0x400000 + high)
    return (bits | 0x4B000000).to(tl.float32, bitcast=True) - MAGIC


@triton.jit
def truncate(v):
    """int32, toward zero; 0 where x86 has no answer (the scale's inverse overflowed)."""
    return tl.where(tl.abs(v) < 1073741824.0, v, 0.0).to(tl.int32)


@triton.jit
def half(x):
    """float32 → the float32 of the nearest float16, ties to even."""
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def inverse(x):
    """1 / x; 0 for 0."""
    return tl.where(x != 0, tl.div_rn(1.0, x), 0.0)


@triton.jit
def these_lanes(count, LANES: tl.constexpr):
    """The numbers of this program's lanes, int64, and which of them are below `count`."""
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    return lane, lane < count


@triton.jit
def load(values, row, inside, SIZE: tl.constexpr):
    """The SIZE float32 of row[lane] of a matrix; zeros where not `inside`."""
    tile = ()
    for k in tl.static_range(SIZE):
        tile = tile + (tl.load(values + row * SIZE + k, mask=inside, other=0.0),)
    return tile


@triton.jit
def weigh(tile, weights, spread, SIZE: tl.constexpr):
    """weight · √(spread + x²)."""
    out = ()
    for k in tl.static_range(SIZE):
        out = out + (weights[k] * tl.sqrt_rn(spread + tile[k] * tile[k]),)
    return out


@triton.jit
def weigh_by_square(tile, SIZE: tl.constexpr):
    """x²."""
    out = ()
    for k in tl.static_range(SIZE):
        out = out + (tile[k] * tile[k],)
    return out


@triton.jit
def weigh_by_size(tile, SIZE: tl.constexpr):
    """The lane's root mean square + |x|."""
    total = tl.zeros_like(tile[0])
    for k in tl.static_range(SIZE):
        total += tile[k] * tile[k]
    size = tl.sqrt_rn(tl.div_rn(total, 1.0 * SIZE))
    out = ()
    for k in tl.static_range(SIZE):
        out = out + (size + tl.abs(tile[k]),)
    return out


@triton.jit
def magnitudes(tile, SIZE: tl.constexpr):
    """|x|."""
    out = ()
    for k in tl.static_range(SIZE):
        out = out + (tl.abs(tile[k]),)
    return out


@triton.jit
def sum_of(values, SIZE: tl.constexpr):
    total = tl.zeros_like(values[0])
    for k in tl.static_range(SIZE):
        total += values[k]
    return total


@triton.jit
def _energy_kernel(x, energy, count, size, LANES: tl.constexpr):
    lane, inside = these_lanes(count, LANES)
    total = tl.zeros([LANES], tl.float32)
    for part in range(size // 32):
        tile = load(x, lane * (size // 32) + part, inside, 32)
        for k in tl.static_range(32):
            total += tile[k] * tile[k]
    tl.store(energy + lane, total, mask=inside)


def energies(x: torch.Tensor, size: int) -> torch.Tensor:
    """Σ x² of every `size` (a multiple of 32) consecutive values, in order: float32 [x.numel() / size]."""
    energy = x.new_empty(x.numel() // size)
    _energy_kernel[programs(len(energy), LANES)](x, energy, len(energy), size, LANES=LANES, **EXACT)
    return energy
