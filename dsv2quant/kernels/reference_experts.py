"""Torch twins of the kernels for routed experts: see reference.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from dsv2quant.kernels.int4_experts import Int4Experts, Stack, weight_of
from dsv2quant.kernels.reference import dequantize_int4
from dsv2quant.kernels.routing import Routes, tiles_needed


def sort_pairs(chosen: torch.Tensor, experts: int, block: int) -> Routes:
    """`chosen` [tokens, k], experts of each token, sorted by expert and cut into tiles of `block`."""
    flat = chosen.flatten()
    pairs = flat.argsort(stable=True)
    counts = flat.bincount(minlength=experts)
    tiles = [
        (expert, begin + first, begin + min(first + block, count))
        for expert, (count, begin) in enumerate(zip(counts.tolist(), (counts.cumsum(0) - counts).tolist(), strict=True))
        for first in range(0, count, block)
    ]
    tiles += [(-1, 0, 0)] * (tiles_needed(len(flat), experts, block) - len(tiles))
    table = torch.tensor(tiles, dtype=torch.int32, device=chosen.device).view(-1, 3)
    return Routes(pairs.to(torch.int32), *(column.contiguous() for column in table.unbind(1)), block)


def combine(pairs: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Weighted outputs of pairs, float32 [tokens, k, hidden] → their sums over k, rounded once, [tokens, hidden]."""
    return pairs.sum(1).to(dtype)


def gate_up_int4(x: torch.Tensor, routes: Routes, k: int, stack: Int4Experts) -> torch.Tensor:
    """silu(gate · x) · (up · x) of each pair, in float64, in x's dtype: [tokens · k, width], by number of the pair."""
    h = x.new_empty(len(x) * k, stack.gate_up.rows)
    for expert, pairs in _by_expert(routes):
        gate, up = (F.linear(x[pairs // k].double(), _matrix(stack.gate_up, expert, i)) for i in range(2))
        h[pairs] = (F.silu(gate) * up).to(x.dtype)
    return h


def down_int4(h: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Int4Experts) -> torch.Tensor:
    """Each pair's output times its weight, in float64: float32 [tokens, k, hidden]."""
    outputs = weights.new_empty(*weights.shape, stack.down.rows)
    for expert, pairs in _by_expert(routes):
        sums = F.linear(h[pairs].double(), _matrix(stack.down, expert, 0))
        outputs.flatten(0, 1)[pairs] = (sums * weights.flatten()[pairs, None]).float()
    return outputs


def experts_int4(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, stack: Int4Experts) -> torch.Tensor:
    """The weighted outputs of the experts `chosen` [tokens, k]: float32 [tokens, k, hidden]."""
    routes = sort_pairs(chosen, len(stack.gate_up.words), 16)
    return down_int4(gate_up_int4(x, routes, chosen.shape[1], stack), weights, routes, stack)


def _by_expert(routes: Routes) -> Iterator[tuple[int, torch.Tensor]]:
    """Each tile's expert and pairs."""
    for expert, begin, end in zip(routes.experts.tolist(), routes.begins.tolist(), routes.ends.tolist(), strict=True):
        if expert >= 0:
            yield expert, routes.pairs[begin:end].long()


def _matrix(stack: Stack, expert: int, matrix: int) -> torch.Tensor:
    return dequantize_int4(weight_of(stack, expert, matrix), torch.float32).double()
