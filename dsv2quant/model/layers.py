"""The one place where a linear layer of the runtime meets a backend.

Feed-forward layers: gated FFNs, and the mixture of routed and shared experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsv2quant.arch.spec import Router
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


@dataclass
class FFN:
    """down(silu(gate(x)) · up(x))."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(x))

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        """What `down_proj` is applied to."""
        return F.silu(self.gate_proj(x)) * self.up_proj(x)


def route(x: torch.Tensor, router: torch.Tensor, routing: Router) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32, experts), both [tokens, k], of x [tokens, hidden]; `router` is [experts, hidden]."""
    return reference.route(F.linear(x.float(), router.float()), routing)


def dispatch(
    weights: torch.Tensor, chosen: torch.Tensor, experts: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, its tokens [n], their weights [n]) of each expert that has any, of weights and experts [tokens, k]."""
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=experts).tolist()
    for expert, pairs in enumerate(order.split(counts)):
        if pairs.numel():
            yield expert, pairs // chosen.shape[1], weights.flatten()[pairs]


def add_rows(out: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """out[rows] += values for distinct rows: on the CPU many times faster than `index_add_`, which allows for any."""
    out.index_copy_(0, rows, out.index_select(0, rows).add_(values))


@dataclass
class MoE:
    """Routed experts, each token weighted over its top k, plus the shared ones. `router` is [experts, hidden]."""

    routing: Router
    router: torch.Tensor
    experts: list[FFN]
    shared: FFN | None

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [..., hidden] → (output of that shape, chosen experts [tokens, k])."""
        tokens = x.flatten(0, -2)
        weights, chosen = route(tokens, self.router, self.routing)
        out = torch.zeros_like(tokens, dtype=torch.float32)
        for expert, rows, routed in dispatch(weights, chosen, len(self.experts)):
            add_rows(out, rows, self.experts[expert](tokens[rows]).float() * routed[:, None])
        out = out.to(x.dtype).view_as(x)
        return (out if self.shared is None else out + self.shared(x)), chosen
