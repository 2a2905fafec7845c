"""Choices of experts and router logits, and what is right for them."""

from __future__ import annotations

import torch

from dsv2quant.arch.spec import Router
from dsv2quant.kernels.routing import Routes

# (tokens, k, experts, block): one token, more pairs than one slice and one chunk hold, few experts, one expert
SORTED = (
    (1, 6, 64, 16),
    (1, 1, 2, 16),
    (5, 4, 16, 4),
    (40, 6, 160, 16),
    (200, 6, 64, 32),
    (70, 2, 3, 16),
    (33, 1, 1, 8),
)
# (tokens, experts, n_group, topk_group, k, norm, scale)
ROUTED = (
    (1, 64, 1, 1, 6, False, 1.0),
    (5, 160, 8, 3, 6, False, 16.0),
    (3, 16, 4, 2, 4, True, 2.0),
    (2, 12, 3, 1, 4, False, 1.0),  # groups of 4, all of one taken
    (2, 12, 3, 1, 6, True, 1.0),  # more than one group has: of score 0, lowest index first
    (2, 8, 1, 1, 1, True, 3.0),  # a single choice is not normalised
)


def router_of(n_group: int, topk_group: int, k: int, norm: bool, scale: float) -> Router:
    """The router of a case."""
    return Router(k, n_group, topk_group, normalise=norm, scale=scale)


# (tokens, experts, hidden): of ragged sizes
ROUTERS = ((1, 7, 200), (3, 64, 513 * 4), (6, 5, 72), (17, 9, 640), (65, 4, 64))


def router_operands(
    tokens: int, experts: int, hidden: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, in rows that lie apart, and the router."""
    generator = torch.Generator().manual_seed(hidden)
    x = torch.randn(tokens, hidden + 8, generator=generator).to(device).to(dtype)[:, :hidden]
    return x, torch.randn(experts, hidden, generator=generator).to(device)


def logits_off(got: torch.Tensor, x: torch.Tensor, router: torch.Tensor) -> float:
    """The largest |error| / bound, infinite where there is a NaN. A product is rounded, and added to others of a
    thread, 4 by 4, and these to those of 512 columns before; then the sums of 128 threads by halves: below
    2^-24 Σ |x w| each. That is 1/100 of what TF32 loses."""
    left, right = x.double(), router.double()
    bound = (1 + 4 + -(-x.shape[1] // 512) + 7) * 2.0**-24 * (left.abs() @ right.abs().T)
    return float(((got.double() - left @ right.T).abs() / bound).nan_to_num(float("inf")).max())


def choices(tokens: int, k: int, experts: int, device: str = "cpu") -> torch.Tensor:
    """int64 [tokens, k]; distinct within a token as far as there are experts."""
    generator = torch.Generator().manual_seed(tokens + k)
    chosen = torch.rand(tokens, max(experts, k), generator=generator).argsort(1)[:, :k] % experts
    return chosen.contiguous().to(device)


def logits(tokens: int, experts: int, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(experts)
    x = torch.randn(tokens, experts, generator=generator) * 2
    x[-1, : experts // 2] = x[-1, 0]  # ties
    return x.to(device)


def expected(
    x: torch.Tensor, n_group: int, topk_group: int, k: int, norm: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As model.layers.route, with stable sorts for top-k."""
    scores = x.softmax(-1)
    best = scores.unflatten(-1, (n_group, -1)).amax(-1)
    groups = best.argsort(dim=1, descending=True, stable=True)[:, :topk_group]
    keep = torch.zeros_like(best, dtype=torch.bool).scatter_(1, groups, True)
    eligible = scores.masked_fill(~keep.repeat_interleave(x.shape[1] // n_group, -1), 0.0)
    weights, chosen = (part[:, :k] for part in eligible.sort(dim=1, descending=True, stable=True))
    if norm and k > 1:
        return weights / (weights.sum(-1, keepdim=True) + 1e-20), chosen
    return weights * scale, chosen


def same(routes: Routes, want: Routes) -> bool:
    return routes.block == want.block and all(torch.equal(a, b) for a, b in zip(routes[:4], want[:4], strict=True))
