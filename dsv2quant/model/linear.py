"""The one place where a linear layer of the runtime meets a backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv2quant.kernels import reference


@dataclass
class Linear:
    """y = x Wᵀ + b. `weight` [out, in] is decoded; `activation` says how x is quantized first, as when served:
    'static' by `input_scale` (float32 [1])."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    activation: str | None = None
    input_scale: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return reference.linear(x, self.weight, self.bias, self.activation, self.input_scale)


@dataclass
class RMSNorm:
    """x / rms(x) in float32, rounded to x's dtype, times the weight (`DeepseekV2RMSNorm`)."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)
