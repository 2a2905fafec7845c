"""The codec protocol, and the table of codecs.

A codec is the code of one scheme. `layout` predicts from a shape alone exactly what `encode` returns; `decode` is what
a consumer reconstructs. Adding a scheme is adding a class with these members and one line in the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dsv2quant.formats.awq import Awq
from dsv2quant.formats.fp8 import Fp8
from dsv2quant.formats.gptq import Gptq
from dsv2quant.formats.int4 import Int4
from dsv2quant.formats.part import Inputs, Part
from dsv2quant.formats.plain import Bf16

if TYPE_CHECKING:
    import torch


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


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Bf16(), Fp8("block"), Fp8("channel"), Fp8("tensor", "static"), Fp8("tensor", "autofp8"), Fp8("tensor"),
        Int4(128), Int4(64), Int4(32), Int4(None),
        Gptq(128), Gptq(64), Gptq(32), Gptq(None), Awq(128), Awq(64), Awq(32),
    )
}  # fmt: skip
