"""The codec protocol, and the table of codecs.

A codec is the code of one scheme. `layout` predicts from a shape alone exactly what `encode` returns; `decode` is what
a consumer reconstructs. Adding a scheme is adding a class with these members and one line in the table.

The `bf16` scheme: a weight that stays unquantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dsv2quant.storage.safetensors import Part

if TYPE_CHECKING:
    import torch
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv2quant.errors import InputError

ROWS_APART = 128  # wherever a weight is cut into rows (`Codec.rows`), every codec's parts can be


@dataclass(frozen=True)
class Inputs:
    """What calibration measured of a weight's inputs: the mean square of each channel (float32 [in]), and the largest
    magnitude of all."""

    importance: np.ndarray
    amax: float


class TooLargeError(ValueError):
    """A weight needs larger scales than its layout stores: `which` of the weights given to `encode`."""

    def __init__(self, which: int) -> None:
        super().__init__(f"weight {which} has values too large for its scales")
        self.which = which


def too_large(module: str, scheme: str) -> InputError:
    """The error to raise for the module of such a weight."""
    what = f"has values too large for the float16 scales of {scheme}"
    return InputError(what, where=module, fix="leave out --format: compressed-tensors has BF16 scales")


class NonFiniteError(ValueError):
    """A weight holds NaN or infinity: `which` of the weights given to `encode`, and its first offending index."""

    def __init__(self, which: int, index: tuple[int, ...]) -> None:
        super().__init__(f"weight {which} is not finite at {index}")
        self.which, self.index = which, index


class Codec(Protocol):
    @property
    def name(self) -> str:
        """The scheme's name."""

    @property
    def quant_method(self) -> str | None:
        """The `quant_method` of `quantization_config` that describes it; None for unquantized."""

    @property
    def activation(self) -> str | None:
        """How activations are quantized when it is served: 'token', 'group128', 'static' (by the stored `input_scale`)
        or None."""

    @property
    def shares_scale(self) -> bool:
        """Whether the members of a fused module must be encoded together, with one scale."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that can choose its codes."""

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape can't have the scheme; None where it can."""

    def layout(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """The stored parts of a weight of this shape, which `refusal` lets pass."""

    def others(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Parts that files of others may hold besides: `decode` takes them, `encode` never makes them."""

    def rows(self, parts: Mapping[str, torch.Tensor], begin: int, end: int) -> dict[str, torch.Tensor]:
        """Views of what `decode` needs for rows `begin` … `end` − 1, the first a multiple of ROWS_APART, as the last is
        or that of the weight."""

    def encode(
        self,
        weights: Sequence[np.ndarray],
        device: str = "cpu",
        method: str = "rtn",
        inputs: Sequence[Inputs] = (),
    ) -> list[dict[str, np.ndarray]]:
        """Encode weights that belong together (one, or a fused group with a shared scale) by a method that needs no
        forward pass.

        Each weight is [out, in], as BF16 bits (uint16) or float32; `inputs` are theirs, where the method or the scheme
        needs them. Returns per weight {suffix: array}, with arrays of `layout`'s shapes holding its dtypes' bits.
        Raises NonFiniteError, and TooLargeError where the scheme's scales have a narrower range than BF16.
        """

    def decode(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype, scale_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The weight a consumer reconstructs: scales rounded to `scale_dtype` (None: as stored), the product in
        float32, rounded once to `dtype`."""


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
