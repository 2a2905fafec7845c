"""The `bf16` scheme: a weight that stays unquantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dsv2quant.formats.part import Inputs, NonFiniteError, Part

if TYPE_CHECKING:
    import torch


class Bf16:
    """BF16, rounded to nearest even from wider sources; a BF16 source keeps its bytes."""

    name = "bf16"
    quant_method = None
    activation = None
    shares_scale = False
    methods = ("rtn", "fit")

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """None: every shape is taken."""
        return None

    def layout(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return (Part("weight", "BF16", shape),)

    def others(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """None."""
        return ()

    def rows(self, parts: Mapping[str, torch.Tensor], begin: int, end: int) -> dict[str, torch.Tensor]:
        """Its rows."""
        return {"weight": parts["weight"][begin:end]}

    def encode(
        self,
        weights: Sequence[np.ndarray],
        device: str = "cpu",
        method: str = "rtn",
        inputs: Sequence[Inputs] = (),
    ) -> list[dict[str, np.ndarray]]:
        """BF16 bits (uint16) of BF16-bit or float32 arrays. Raises NonFiniteError, also where BF16 overflows."""
        encoded = []
        for which, weight in enumerate(weights):
            bits = weight.copy() if weight.dtype == np.uint16 else to_bf16(weight)
            check_finite(bits, which)
            encoded.append({"weight": bits})
        return encoded

    def decode(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype, scale_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The weight in `dtype`; there are no scales."""
        return parts["weight"].to(dtype)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 → BF16 bits (uint16), round to nearest even; NaN stays NaN and overflow becomes infinity."""
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def check_finite(weight: np.ndarray, which: int = 0) -> None:
    """Raise NonFiniteError at the first NaN or infinity of BF16 bits (uint16) or of a float32 array."""
    from dsv2quant.formats.amax_cpu import amax_bits

    bits = np.ascontiguousarray(weight if weight.dtype == np.uint16 else weight.view(np.uint32))
    infinity = np.array(0x7F80 if bits.dtype == np.uint16 else 0x7F800000, bits.dtype)
    if amax_bits(bits.reshape(1, -1)) >= infinity:
        bad = (bits & ~np.array(1 << (8 * bits.itemsize - 1), bits.dtype)) >= infinity
        raise NonFiniteError(which, tuple(int(i) for i in np.unravel_index(int(bad.argmax()), weight.shape)))
