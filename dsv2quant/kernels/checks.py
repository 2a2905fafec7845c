"""What every wrapper of a kernel on rows of 16-bit floats refuses."""

from __future__ import annotations

import torch
import triton

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = triton.knobs.runtime.interpret


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
