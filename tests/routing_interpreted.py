"""The kernels of routing by Triton's interpreter against their references: a program of its own, since Triton reads
TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python tests/routing_interpreted.py

Prints one JSON object: what each case found.
"""

from __future__ import annotations

import json

import torch
from routing_cases import (
    ROUTED,
    ROUTERS,
    SORTED,
    choices,
    expected,
    logits,
    logits_off,
    router_operands,
    same,
)

from dsv2quant.kernels import reference, routing
from dsv2quant.kernels.routing import router_logits


def sorted_as_the_twin() -> dict[str, bool]:
    found = {}
    for tokens, k, experts, block in SORTED:
        for dtype in (torch.int32, torch.int64):
            chosen = choices(tokens, k, experts).to(dtype)
            want = reference.sort_pairs(chosen, experts, block)
            found[f"{tokens, k, experts, block} {dtype}"] = same(routing.sort_pairs(chosen, experts, block), want)
    return found


def routed() -> dict[str, list[float]]:
    """Of each case, how many choices differ, and the largest relative error of weights."""
    found = {}
    for tokens, experts, router in ROUTED:
        x, bias = logits(tokens, experts, router)
        weights, chosen, routes = routing.route_and_sort(x, router, bias)
        want_weights, want = expected(x, router, bias)
        off = int((chosen != want).sum()) + (not same(routes, reference.sort_pairs(want, experts, routes.block)))
        error = (weights - want_weights).abs() / want_weights.clamp(min=1e-30)
        found[str((tokens, experts, router))] = [off, float(error.max())]
    return found


def linear() -> dict[str, float]:
    """Of each case, the largest error of logits over its bound."""
    found = {}
    for case in ROUTERS:
        for dtype in (torch.float32, torch.float16):
            given = router_operands(*case, dtype)
            found[f"{case} {dtype}"] = logits_off(router_logits(*given), *given)
    return found


if __name__ == "__main__":
    print(json.dumps({"sorted": sorted_as_the_twin(), "routed": routed(), "logits": linear()}))
