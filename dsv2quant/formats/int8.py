"""INT8 weights with one scale per output channel: compressed-tensors' `int-quantized`, served W8A8.

    scale = bf16(amax / 127)              of the row
    code  = rint(weight / scale)          ties to even, clamped to ±127
    weight' = code × scale

127, not compressed-tensors' 127.5 (quantization/utils/helpers.py, calculate_qparams) nor 128: a row's largest weight is
a code whatever its sign, and a kernel may negate codes. The scale is rounded to BF16 before codes are chosen: amax is
then at most 127.25 scales, within half a step of 127, so that nothing is lost, and consumers that keep scales in the
model's dtype read the same weight as those that keep them in float32 (vLLM compressed_tensors_w8a8_int8.py). An
all-zero row has scale 1, and no scale is subnormal: hardware that flushes subnormals to zero would divide by it.

Served, each token is quantized alike: scale = amax / 127 in float32 (vLLM csrc, dynamic_scaled_int8_quant; transformers
by compressed-tensors has 127.5 there too). See `kernels/reference.py`, 'token-int8'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv2quant.formats.codec import EveryShape, Inputs, check_finite, config_group, eight_bits, loaded, to_bf16, widened
from dsv2quant.formats.e4m3 import MIN_SCALE, scales_of
from dsv2quant.storage.safetensors import Part

if TYPE_CHECKING:
    import torch

INT8_MAX = 127


class Int8(EveryShape):
    """The codec of `int8-channel`."""

    name = "int8-channel"
    quant_method = "compressed-tensors"
    activation = "token-int8"
    shares_scale = False
    methods = ("rtn",)
    runtime = "decoded"

    def declared(self, ignored: Sequence[str] = ()) -> dict[str, Any]:
        weights, inputs = (eight_bits("int", way, dynamic=way == "token") for way in ("channel", "token"))
        return config_group(weights, inputs, "int-quantized")

    def layout(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return Part("weight", "I8", shape), Part("weight_scale", "BF16", (shape[0], 1))

    def rows(self, parts: Mapping[str, torch.Tensor], begin: int, end: int) -> dict[str, torch.Tensor]:
        """Codes and scales of these rows."""
        return {suffix: part[begin:end] for suffix, part in parts.items()}

    def encode(
        self, weights: Sequence[np.ndarray], device: str = "cpu", method: str = "rtn", inputs: Sequence[Inputs] = ()
    ) -> list[dict[str, np.ndarray]]:
        """Codes (int8) and scales (BF16 bits), made on the CPU, whatever the device."""
        from dsv2quant.formats.cpu import group_amax, nearest_codes, round_to_bf16

        encoded = []
        for which, weight in enumerate(weights):
            check_finite(weight, which)
            x = widened(weight)
            amax = group_amax(x, x.shape[1])
            scales = round_to_bf16(np.maximum(amax / np.float32(INT8_MAX), np.float32(MIN_SCALE)))
            scales = np.where(amax > 0, scales, np.float32(1))
            codes = nearest_codes(x, scales, -INT8_MAX, INT8_MAX)
            encoded.append({"weight": codes, "weight_scale": to_bf16(scales)})
        return encoded

    def encode_tensor(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        x = x.float()
        scales = scales_of(x.abs().amax(1, keepdim=True), INT8_MAX).bfloat16()
        codes = (x / scales.float()).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
        return {"weight": codes, "weight_scale": scales}

    def decode(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype, scale_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """code × scale in float32, rounded once to `dtype`."""
        return parts["weight"].float().mul_(loaded(parts["weight_scale"], scale_dtype)).to(dtype)
