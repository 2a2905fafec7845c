"""The numbers of FP8 (e4m3): values, scales and blocks; and e8m0, which some store block scales in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

BLOCK = 128
E4M3_MAX = 448.0
MIN_SCALE = float(np.finfo(np.float32).tiny)  # 2^-126, the smallest normal float32

Grid = Literal["block", "channel", "tensor"]


def scales_of(amax: torch.Tensor, largest: float = E4M3_MAX) -> torch.Tensor:
    """The scales of largest magnitudes (float32): amax / `largest` of all codes, at least the smallest normal number;
    1 where all is zero.

    The divisor is a tensor because CUDA multiplies by the reciprocal of a scalar one, which rounds differently.
    """
    import torch

    return torch.where(amax > 0, (amax / torch.full_like(amax, largest)).clamp(min=MIN_SCALE), 1.0)


def scale_of(amax: float) -> np.float32:
    """`scales_of` of one magnitude. Raises ValueError where it is negative, NaN or beyond float32."""
    largest = np.float32(amax)
    if not (np.isfinite(largest) and largest >= 0):
        raise ValueError(f"{amax} is no largest magnitude")
    return max(largest / np.float32(E4M3_MAX), np.float32(MIN_SCALE)) if largest else np.float32(1)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn → float32. torch's own cast takes five times as long on a CPU."""
    import torch

    if codes.device.type != "cpu":
        return codes.float()
    places = codes.view(torch.uint8).reshape(-1).int()
    return torch.from_numpy(E4M3_VALUES).index_select(0, places).view(codes.shape)


def expand_blocks(scales: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """Block scales [⌈rows/128⌉, ⌈cols/128⌉] → one per weight [rows, cols]."""
    return scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]


def _e4m3_values() -> np.ndarray:
    """The 256 values of e4m3 (OCP 8-bit floating point, `S.EEEE.MMM`, bias 7; 0x7F and 0xFF are NaN)."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa / 512.0, (1 + mantissa / 8.0) * 2.0 ** (exponent - 7.0))
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


def _e8m0_values() -> np.ndarray:
    """The 256 values of e8m0 (OCP microscaling formats; 'ue8m0' in DeepSeek's configurations): 2^(code − 127), a
    subnormal number for 0; 255 is NaN."""
    return np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan)).astype(np.float32)


E4M3_VALUES = _e4m3_values()
E8M0_VALUES = _e8m0_values()
