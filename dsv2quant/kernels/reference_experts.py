"""Torch references of the kernels for routed experts: see reference.py.

Torch references of the kernels for GGUF weights: see reference.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from dsv2quant.arch.spec import Router
from dsv2quant.formats.e4m3 import expand_blocks
from dsv2quant.kernels.int4_layout import Int4Experts, Int4Weight, down_of, gate_up_of
from dsv2quant.kernels.reference import dequantize_activation, dequantize_int4, quantize_activation, route
from dsv2quant.kernels.routing import Routes, choose_block, tiles_needed

if TYPE_CHECKING:
    from dsv2quant.kernels.fp8_experts import Fp8Experts

from dsv2quant.kernels.gguf_layout import SPECS, GgufWeight, unpack


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


def route_and_sort(logits: torch.Tensor, router: Router) -> tuple[torch.Tensor, torch.Tensor, Routes]:
    weights, chosen = route(logits, router)
    return weights, chosen, sort_pairs(chosen, logits.shape[1], choose_block(len(chosen), router.k, logits.shape[1]))


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


def dequantize_gguf(weight: GgufWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[rows, columns], or a stack: step × multiple × (code − zero) + offset in float32, rounded once to `dtype`."""
    spec, columns = SPECS[weight.type], weight.columns
    codes, halves, multiples = unpack(weight)
    parts = [half.float() for half in halves]
    if multiples:
        per_block = spec.values // spec.group
        parts = [a.repeat_interleave(per_block, -1) * b for a, b in zip(parts, multiples, strict=True)]
        parts[1:] = [-part for part in parts[1:]]  # such blocks have offsets to subtract
    scale, *offset = (part.repeat_interleave(columns // part.shape[-1], -1) for part in parts)
    values = (codes.view(torch.int8) if spec.bits == 8 else codes.short() - spec.zero).float() * scale
    return (values + offset[0] if offset else values).to(dtype)


def linear_gguf(x: torch.Tensor, weight: GgufWeight) -> torch.Tensor:
    """x [M, K] @ weight [N, K]ᵀ in float64, in x's dtype."""
    return F.linear(x.double(), dequantize_gguf(weight).double()).to(x.dtype)


def experts_product(
    x: torch.Tensor, routes: Routes, choices: int, stack: GgufWeight, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """gguf_experts.experts_product, whose sums are in float64."""
    out = torch.empty(len(routes.pairs), stack.rows, dtype=torch.float64, device=x.device)
    table = torch.stack([routes.experts, routes.begins, routes.ends], 1)
    for expert, begin, end in table[routes.experts >= 0].tolist():
        pairs = routes.pairs[begin:end].long()
        out[pairs] = F.linear(x[pairs // choices].double(), dequantize_gguf(matrix_of(stack, expert)).double())
    return out.to(x.dtype) if weights is None else (out * weights.view(-1, 1)).float()


def matrix_of(stack: GgufWeight, expert: int) -> GgufWeight:
    """One of a stack's matrices."""
    return stack._replace(
        words=stack.words[expert],
        steps=stack.steps[expert],
        multiples=None if stack.multiples is None else stack.multiples[expert],
        lows=None if stack.lows is None else stack.lows[expert],
        arrivals=stack.arrivals[expert],
    )
