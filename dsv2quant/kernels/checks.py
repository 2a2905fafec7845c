"""What every wrapper of a kernel on rows of 16-bit floats refuses."""

from __future__ import annotations

import torch
import triton

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
