"""Torch twins of the kernels for routed experts: see reference.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from dsv2quant.formats.fp8 import expand_blocks
from dsv2quant.kernels.int4_layout import Int4Weight
from dsv2quant.kernels.int4_stack import Int4Experts, down_of, gate_up_of
from dsv2quant.kernels.reference import dequantize_activation, dequantize_int4, quantize_activation, route
from dsv2quant.kernels.routing import Routes, choose_block, tiles_needed

if TYPE_CHECKING:
    from dsv2quant.kernels.fp8_experts import Fp8Experts


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
    tile_experts, begins, ends = (column.contiguous() for column in table.unbind(1))
    return Routes(pairs.to(torch.int32), tile_experts, begins, ends, block)


def router_logits(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """x [T, H] · router [E, H]ᵀ in float32: [T, E]."""
    return F.linear(x.float(), router)


def route_and_sort(
    logits: torch.Tensor, n_group: int, topk_group: int, k: int, norm: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, Routes]:
    weights, chosen = route(logits, n_group, topk_group, k, norm, scale)
    return weights, chosen, sort_pairs(chosen, logits.shape[1], choose_block(len(chosen), k, logits.shape[1]))


def gate_up_int4(x: torch.Tensor, routes: Routes, k: int, stack: Int4Experts) -> torch.Tensor:
    """silu(gate · x) · (up · x) of each pair, in float64, in x's dtype: [tokens · k, width], by number of the pair."""
    h = x.new_empty(len(x) * k, stack.gate_up.rows)
    for expert, pairs in _tiles(routes):
        gate, up = (F.linear(x[pairs // k].double(), _matrix(weight)) for weight in gate_up_of(stack, expert))
        h[pairs] = (F.silu(gate) * up).to(x.dtype)
    return h


def down_int4(h: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Int4Experts) -> torch.Tensor:
    """Each pair's output times its weight, in float64: float32 [tokens, k, hidden]."""
    outputs = weights.new_empty(*weights.shape, stack.down.rows)
    for expert, pairs in _tiles(routes):
        sums = F.linear(h[pairs].double(), _matrix(down_of(stack, expert)))
        outputs.flatten(0, 1)[pairs] = (sums * weights.flatten()[pairs, None]).float()
    return outputs


def experts_int4(x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, stack: Int4Experts) -> torch.Tensor:
    """The weighted outputs of the experts `chosen` [tokens, k]: float32 [tokens, k, hidden]."""
    routes = sort_pairs(chosen, len(stack.gate_up.words), 16)
    return down_int4(gate_up_int4(x, routes, chosen.shape[1], stack), weights, routes, stack)


def _matrix(weight: Int4Weight) -> torch.Tensor:
    return dequantize_int4(weight, torch.float32).double()


def gate_up(
    x: torch.Tensor, x_scales: torch.Tensor, routes: Routes, k: int, stack: Fp8Experts,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    """silu(gate(x)) · up(x) of pairs' tokens and experts: rounded once, to `dtype`, [tokens · k, I].

    Unlike modules one after the other, which round gate(x) and up(x) as well.
    """
    tokens = dequantize_activation(x, x_scales).double()
    h = torch.empty(len(routes.pairs), stack.gate_up.shape[2], dtype=dtype, device=x.device)
    for expert, pairs in _tiles(routes):
        gate, up = (
            tokens[pairs // k] @ _dequantized(codes, scales).T
            for codes, scales in zip(stack.gate_up[expert], stack.gate_up_scales[expert], strict=True)
        )
        h[pairs] = (F.silu(gate) * up).to(dtype)
    return h


def gate_up_codes(
    x: torch.Tensor, x_scales: torch.Tensor, routes: Routes, k: int, stack: Fp8Experts, granularity: str,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return quantize_activation(gate_up(x, x_scales, routes, k, stack, dtype), granularity)


def down(
    h: torch.Tensor, h_scales: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Fp8Experts
) -> torch.Tensor:
    """Routed weight × down(h) of pairs, float32 [tokens, k, H]."""
    values = dequantize_activation(h, h_scales).double()
    out = torch.empty(len(h), stack.down.shape[1], dtype=torch.float32, device=h.device)
    for expert, pairs in _tiles(routes):
        product = values[pairs] @ _dequantized(stack.down[expert], stack.down_scales[expert]).T
        out[pairs] = (product * weights.flatten()[pairs, None]).float()
    return out.view(*weights.shape, -1)


def _tiles(routes: Routes) -> list[tuple[int, torch.Tensor]]:
    """(expert, its pairs) of each tile there is."""
    table = torch.stack([routes.experts, routes.begins, routes.ends], 1).tolist()
    return [(expert, routes.pairs[begin:end].long()) for expert, begin, end in table if expert >= 0]


def _dequantized(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float64 [rows, columns] of one matrix and its scales of blocks, rows or the whole."""
    if scales.shape[-1] > 1 or scales.shape[0] not in (1, codes.shape[0]):
        scales = expand_blocks(scales, *codes.shape)
    return codes.double() * scales.double()
