"""What the kernels share: the checks of their wrappers, dependent launches, and the joining of a split K.

Programmatic dependent launch (CUDA programming guide, "Programmatic Dependent Launch and Synchronization"): a kernel
may start while the one before it in the stream still runs. A kernel launched so waits until those before it have ended,
and lets its successor start then: no kernel is more than one ahead. What any but its direct predecessor wrote, weights
above all, it may read before it waits, so that they are on their way; all else it reads, and all that it writes, comes
behind the wait. Every program must wait.

On an H200 a step of V2-Lite took 1.72 ms without, 1.62 where kernels let the next one start at once, which then takes
room from those of other streams, and 1.55 so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = triton.knobs.runtime.interpret
MULTIPROCESSORS = 132  # of an H100 or H200


def check_rows(name: str, x: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> None:
    """Raises ValueError where x is not of `shape`, whose None stand for any, and of `dtype`, by default a float that
    the kernels compute with; or where elements of a row do not lie side by side."""
    if x.ndim != len(shape) or any(want not in (None, size) for want, size in zip(shape, x.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(x.shape)}; need ({wanted})")
    if x.dtype not in ((dtype,) if dtype else FLOATS):
        raise ValueError(f"{name} is {x.dtype}; need {dtype or 'bfloat16, float16 or float32'}")
    if x.stride(-1) != 1:
        raise ValueError(f"{name} has strides {x.stride()}; elements of a row must lie side by side")
    if INTERPRETED and x.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter has no bfloat16")


def output(x: torch.Tensor, rows: int, out: torch.Tensor | None) -> torch.Tensor:
    """Room for the product of x [M, K] and a weight of so many rows: `out` if given. Raises ValueError where it is not
    contiguous, of x's dtype and [M, rows]."""
    if out is None:
        return x.new_empty(len(x), rows)
    if out.shape != (len(x), rows) or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous, {x.dtype}, of shape ({len(x)}, {rows})")
    return out


PDL = not INTERPRETED  # for `launch_pdl`
_ON: tl.constexpr = tl.constexpr(PDL)


@triton.jit
def wait() -> None:
    if _ON:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def finish(
    sums, at, stored, factors, partial, arrivals, tile, split,
    HEIGHT: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Store [HEIGHT, TOKENS] `at` [TOKENS, HEIGHT] where `stored`, times the `factors` of tokens: by the last of SPLIT
    programs of a tile, which adds all their sums in order."""
    sums = tl.trans(sums)
    if SPLIT == 1:
        _store(sums, at, stored, factors)
    else:
        SIZE: tl.constexpr = HEIGHT * TOKENS
        cell = partial + tile.to(tl.int64) * (SPLIT * SIZE) + tl.arange(0, TOKENS)[:, None] * HEIGHT
        cell += tl.arange(0, HEIGHT)[None, :]
        tl.store(cell + split * SIZE, sums, stored)
        tl.debug_barrier()  # every thread's sums are out before this program counts itself
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(arrivals + tile, 0)
            total = tl.zeros((TOKENS, HEIGHT), tl.float32)
            for part in tl.static_range(SPLIT):
                total += tl.load(cell + part * SIZE, stored, 0.0, cache_modifier=".cg")
            _store(total, at, stored, factors)


@triton.jit
def _store(sums, at, stored, factors):
    if factors is not None:
        sums *= factors[:, None]
    tl.store(at, sums.to(at.dtype.element_ty), stored)
