"""Choices of experts and router logits, and what is right for them."""

from __future__ import annotations

from dataclasses import replace

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
V2 = Router(6, 8, 3, scale=16.0)
V3 = Router(8, 8, 4, normalise=True, scale=2.5, score="sigmoid", group_score="top2", bias=True)
KIMI = replace(V3, groups=1, topk_group=1, scale=2.827)
ROUTED = (  # (tokens, experts, router)
    (1, 64, Router(6)),
    (5, 160, V2),
    (3, 16, Router(4, 4, 2, normalise=True)),
    (2, 12, Router(4, 3, 1)),  # groups of 4, all of one taken
    (2, 12, Router(6, 3, 1, normalise=True)),  # more than one group has: of score 0, lowest index first
    (2, 8, Router(1, scale=3.0)),
    (1, 256, V3),
    (4, 256, V3),
    (1, 384, KIMI),
    (3, 384, KIMI),
    (2, 12, replace(V3, k=4, groups=3, topk_group=1)),  # all of one group taken
    (2, 10, replace(V3, k=1, groups=5, topk_group=2)),  # two experts a group; one weight, normalised
    (3, 72, replace(V3, k=6, groups=1, topk_group=1)),
    (3, 64, Router(6, 8, 3, score="sigmoid", group_score="top2")),
    (3, 64, Router(6, 8, 3, normalise=True, scale=2.0, bias=True)),
)


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


def logits(tokens: int, experts: int, router: Router, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits, the last of several tokens' with ties, and for a router that has one a bias that puts most scores below
    0, and a third of the experts below all others."""
    generator = torch.Generator().manual_seed(experts)
    x = torch.randn(tokens, experts, generator=generator) * 2
    bias = torch.randn(experts, generator=generator) * 0.3 - 1
    bias[torch.rand(experts, generator=generator) < 1 / 3] -= 3
    if tokens > 1:
        x[-1, : experts // 2] = x[-1, 0]
    bias[: experts // 4] = bias[0]
    return x.to(device), bias.to(device) if router.bias else None


def expected(x: torch.Tensor, router: Router, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """As reference.route, with stable sorts for top-k."""
    scores = x.softmax(-1) if router.score == "softmax" else 1 / (1 + torch.exp(-x))
    grouped = (scores if bias is None else scores + bias).unflatten(-1, (router.groups, -1))
    best = grouped.sort(dim=2, descending=True).values[..., : 1 if router.group_score == "max" else 2].sum(-1)
    others = best.argsort(dim=1, descending=True, stable=True)[:, router.topk_group :]
    others = torch.zeros_like(best, dtype=torch.bool).scatter_(1, others, True)
    eligible = grouped.masked_fill(others[..., None], 0.0 if bias is None else -torch.inf).flatten(1)
    weights, chosen = (part[:, : router.k] for part in eligible.sort(dim=1, descending=True, stable=True))
    if bias is not None:
        weights = scores.gather(1, chosen)
    if router.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * router.scale, chosen


def same(routes: Routes, want: Routes) -> bool:
    return routes.block == want.block and all(torch.equal(a, b) for a, b in zip(routes[:4], want[:4], strict=True))
