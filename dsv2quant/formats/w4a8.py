"""INT4 weights in groups of 128 with FP8 activations per token: compressed-tensors' `pack-quantized`, served W4A8.

Parts, codes and methods are those of `int4-g128`: only what a server makes of activations differs, so that
`quantization_config` alone tells the two apart.

vLLM 0.33 loads it on Hopper (sm90) and multiplies in FP8. The BF16 scales of a row become e4m3 multiples of one float32
scale, their largest / 448, which are divided by 8 and rounded again (quant_utils.py, convert_bf16_scales_to_fp8): a
scale moves by 2.6% (root mean square) and at most 5.9%, whatever the model. Then codes times scales are e4m3, too
(cutlass_pack_scale_fp8 tabulates them). `decode` is the weight as it is stored, which is also what transformers loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsv2quant.formats.codec import eight_bits
from dsv2quant.formats.int4 import Int4


class W4A8(Int4):
    """The codec of `w4a8-g128`."""

    activation = "token"
    runtime = "decoded"
    finer = "int4-g128"

    def __init__(self) -> None:
        super().__init__(128)
        self.name = "w4a8-g128"

    def variant(self, group_size: int | None = None, layout: str | None = None) -> str:
        """Itself: kernels have groups of 128 alone."""
        return "w4a8-g128"

    def declared(self, ignored: Sequence[str] = ()) -> dict[str, Any]:
        return super().declared() | {"input_activations": eight_bits("float", "token", dynamic=True)}
