"""Torch references of the kernels: the arithmetic in plain operations, on any device. They define what is right."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from dsv2quant.arch.spec import Router
from dsv2quant.formats.e4m3 import BLOCK, E4M3_MAX, expand_blocks, scales_of
from dsv2quant.formats.int4 import OFFSET
from dsv2quant.formats.int8 import INT8_MAX
from dsv2quant.kernels import gguf_layout
from dsv2quant.kernels.activations import Normed
from dsv2quant.kernels.gguf_layout import GgufWeight
from dsv2quant.kernels.int4_layout import Int4Experts, Int4Weight, down_of, gate_up_of, unpack
from dsv2quant.kernels.routing import Routes, check_router, choose_block, tiles_needed

if TYPE_CHECKING:
    from dsv2quant.kernels.fp8_layout import Fp8Experts

GGML_GROUPS = {"q8_0": 32, "q8_k": 256}  # columns under one scale


def quantize_activation(
    x: torch.Tensor, granularity: str, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantization of activations [..., K], as served: (codes, float8_e4m3fn or int8; scales float32).

    'token' has one scale per row, [..., 1]; 'group128' one per 128 columns, [..., ⌈K/128⌉] (DeepSeek-V3
    `inference/kernel.py`, act_quant); both are amax / 448 in float32. 'static' is given its one `scale`, float32 [1],
    and clips what lies beyond 448 of it. 'token-int8' is amax / 127 per row, to nearest even (vLLM csrc,
    dynamic_scaled_int8_quant). 'sequence' and 'sequence-int8' are the same over all rows of a batch's entry. 'q8_0' and
    'q8_k' are amax / 127 of each 32 and 256 columns, the former in float16, repeated for each column, [..., K] (ggml,
    arch/x86/quants.c, quantize_row_q8_0; ggml-quants.c, quantize_row_q8_K_ref, whose negative scales change no value).
    """
    x = x.float()
    if granularity in GGML_GROUPS:
        groups = x.unflatten(-1, (-1, GGML_GROUPS[granularity]))
        amax = groups.abs().amax(-1, keepdim=True)
        codes = (groups * torch.where(amax > 0, INT8_MAX / amax, 0.0)).round().to(torch.int8)
        scales = amax / INT8_MAX
        scales = scales.half().float() if granularity == "q8_0" else scales
        return codes.flatten(-2), scales.expand_as(groups).flatten(-2)
    if granularity.startswith("sequence"):
        codes, scales = quantize_activation(x.flatten(1), granularity.replace("sequence", "token"))
        return codes.view_as(x), scales.view(-1, *(1,) * (x.ndim - 1))
    if granularity == "token-int8":
        scales = scales_of(x.abs().amax(-1, keepdim=True), INT8_MAX)
        return (x / scales).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scales
    if granularity == "static":
        assert scale is not None
        return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale
    columns = x.shape[-1]
    width = columns if granularity == "token" else BLOCK
    groups = F.pad(x, (0, -columns % width)).unflatten(-1, (-1, width))  # [..., groups, width]
    scales = scales_of(groups.abs().amax(-1))
    codes = (groups / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(-2)[..., :columns], scales


def dequantize_activation(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """code × scale in float32; the inverse of `quantize_activation` up to its rounding."""
    columns = codes.shape[-1]
    per_column = scales if scales.shape[-1] in (1, columns) else scales.repeat_interleave(BLOCK, -1)[..., :columns]
    return codes.float() * per_column


def served_activation(x: torch.Tensor, granularity: str, scale: torch.Tensor | None = None) -> torch.Tensor:
    """What is left of activations [..., K] that are quantized as served, in float32: as `dequantize_activation` of
    `quantize_activation`, but for the sign of 0. FP8 is rounded to without codes: a CPU's cast takes longer than all
    else."""
    if granularity not in ("token", "group128", "static"):
        return dequantize_activation(*quantize_activation(x, granularity, scale))
    x, columns = x.float(), x.shape[-1]
    width = BLOCK if granularity == "group128" else columns
    groups = F.pad(x, (0, -columns % width)).unflatten(-1, (-1, width))  # [..., groups, width]
    scales = scales_of(groups.abs().amax(-1, keepdim=True)) if scale is None else scale
    values = round_e4m3((groups / scales).clamp_(-E4M3_MAX, E4M3_MAX)).mul_(scales)
    return values.flatten(-2)[..., :columns]


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """float32 x within ±448 rounded to what float8_e4m3fn holds, to nearest even, as a cast does. A number's neighbours
    there lie 2^(exponent − 3) apart, from 2^−9 on; adding 1.5 · 2^23 times as much leaves no finer bits."""
    power = (x.view(torch.int32) & 0x7F80_0000).view(torch.float32).clamp_(min=2**-6)  # 2^exponent
    shift = power.mul_(1.5 * 2**20)
    return (x + shift).sub_(shift)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] @ weight [N, K]ᵀ + bias, in x's dtype.

    With `activation`, x is quantized as served ('static' by `input_scale`), and the product of the two dequantized
    operands is taken in float32, which FP8 matrix units also accumulate in; `weight` should then be float32 so that no
    second rounding enters.
    """
    if activation is None:
        return product(x, weight.to(x.dtype), bias)
    return served_linear(served_activation(x, activation, input_scale), weight, bias, x.dtype)


def served_linear(
    served: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """`linear` of what `served_activation` left, in `dtype`."""
    return product(served, weight.float(), None if bias is None else bias.float()).to(dtype)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] @ weight [N, K]ᵀ + bias, of one dtype. On a CPU float32 goes through oneDNN, as torch.compile has it,
    where no gradient is asked for, which that has not: F.linear asks MKL, which takes twice the time on an AMD EPYC
    with AVX-512 (benchmarks/results/product.csv). In neither does a row depend on others, or on how many threads."""
    if x.is_cpu and x.dtype == torch.float32 and x.numel() and _has_onednn() and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this CPU multiplies BF16 in hardware, as far as torch says."""
    able: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def fp8_matmul(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Codes x [M, K] · w [N, K]ᵀ with their scales, as fp8_gemm.matmul has them, in float32."""
    blocks = w_scales.ndim == 2 and len(w_scales) != len(w)
    right = w.float() * (expand_blocks(w_scales, *w.shape) if blocks else w_scales)
    return F.linear(dequantize_activation(x, x_scales), right).to(dtype)


def fp8_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    dtype: torch.dtype,
    granularity: str,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`fp8_matmul` of x [M, K] quantized by `quantize_activation`."""
    return fp8_matmul(*quantize_activation(x, granularity, scale), w, w_scales, dtype)


def dequantize_int4(weight: Int4Weight, dtype: torch.dtype) -> torch.Tensor:
    """[rows, columns]: (code − zero) × scale in float32, rounded once to `dtype`, columns where the input has them."""
    zeros = OFFSET if weight.zeros is None else weight.zeros.T.repeat_interleave(weight.group, 1)
    values = (unpack(weight).float() - zeros) * weight.scales.T.repeat_interleave(weight.group, 1)
    return (values if weight.order is None else values[:, torch.argsort(weight.order)]).to(dtype)


def linear_int4(x: torch.Tensor, weight: Int4Weight) -> torch.Tensor:
    """x [M, K] @ weight [N, K]ᵀ in float64, in x's dtype."""
    return F.linear(x.double(), dequantize_int4(weight, torch.float32).double()).to(x.dtype)


def route(logits: torch.Tensor, router: Router, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32, experts), both [tokens, k], of a router's logits, float32 [tokens, experts], and its correction
    bias, float32 [experts], if it has one.

    DeepSeek-V2's `MoEGate` (modeling_deepseek.py) and DeepSeek-V3's `Gate` (inference/model.py). Experts of groups that
    are not chosen score 0 without a bias, as in V2; with one, which may put others below 0, they score −inf, as in
    `Gate` and vLLM's grouped_topk: modeling_deepseek.py of V3 has 0 there. And it leaves a single weight as it is,
    which `Gate` normalises.
    Raises ValueError where there is no such choice, or the bias is not what the router says.
    """
    check_router(logits, router, bias)
    scores = logits.softmax(-1) if router.score == "softmax" else logits.sigmoid()
    eligible = scores if bias is None else scores + bias
    if router.groups > 1:
        grouped = eligible.unflatten(-1, (router.groups, -1))
        best = grouped.amax(-1) if router.group_score == "max" else grouped.topk(2).values.sum(-1)  # [tokens, groups]
        groups = best.topk(router.topk_group, sorted=False).indices
        others = torch.ones_like(best, dtype=torch.bool).scatter_(1, groups, False)
        eligible = grouped.masked_fill(others.unsqueeze(-1), 0.0 if bias is None else -torch.inf).flatten(-2)
    weights, experts = eligible.topk(router.k, sorted=False)
    if bias is not None:
        weights = scores.gather(1, experts)
    if router.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * router.scale, experts


def add_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    addend: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    quantize: str | None = None,
    scale: torch.Tensor | None = None,
) -> Normed:
    """x [T, H] + addend [T, H] + Σ_k pairs [T, k, H] and its RMSNorm, with the codes and scales of that."""
    residual = x
    if addend is not None or pairs is not None:
        total = x.float() if addend is None else x.float() + addend.float()
        for rows in () if pairs is None else pairs.unbind(1):
            total = total + rows
        residual = total.to(x.dtype)
    normed = rms_norm(residual, weight, eps)
    codes, scales = (None, None) if quantize is None else quantize_activation(normed, quantize, scale)
    return Normed(residual, normed, codes, scales)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, [T, columns]."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def silu_mul_codes(
    gate: torch.Tensor, up: torch.Tensor, granularity: str, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of silu(gate) · up."""
    return quantize_activation(silu_mul(gate, up), granularity, scale)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As model/layers.RMSNorm, which this package may not import."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


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


def router_logits(x: torch.Tensor, router: torch.Tensor, parts: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, H] · router [E, H]ᵀ in float32: [T, E]; `parts` are the same once more."""
    return F.linear(x.float(), router)


def route_and_sort(
    logits: torch.Tensor, router: Router, bias: torch.Tensor | None = None, wide: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Routes]:
    weights, chosen = route(logits, router, bias)
    block = choose_block(len(chosen), router.k, logits.shape[1], wide)
    return weights, chosen, sort_pairs(chosen, logits.shape[1], block)


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


def experts_int4(x: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Int4Experts) -> torch.Tensor:
    return down_int4(gate_up_int4(x, routes, weights.shape[1], stack), weights, routes, stack)


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


def experts_of_codes(
    x: torch.Tensor, x_scales: torch.Tensor, weights: torch.Tensor, routes: Routes, stack: Fp8Experts, granularity: str,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:  # fmt: skip
    h, h_scales = gate_up_codes(x, x_scales, routes, weights.shape[1], stack, granularity, dtype)
    return down(h, h_scales, weights, routes, stack)


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


def dequantize_gguf(weight: GgufWeight) -> torch.Tensor:
    """[rows, columns], or a stack: step × multiple × (code − zero) + offset in float32."""
    spec, columns = gguf_layout.SPECS[weight.type], weight.columns
    codes, halves, multiples = gguf_layout.unpack(weight)
    parts = [half.float() for half in halves]
    if multiples:
        per_block = spec.values // spec.group
        parts = [a.repeat_interleave(per_block, -1) * b for a, b in zip(parts, multiples, strict=True)]
        parts[1:] = [-part for part in parts[1:]]  # such blocks have offsets to subtract
    scale, *offset = (part.repeat_interleave(columns // part.shape[-1], -1) for part in parts)
    values = (codes.view(torch.int8) if gguf_layout.held_bits(spec) == 8 else codes.short() - spec.zero).float() * scale
    return values + offset[0] if offset else values


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
    return GgufWeight._make(part[expert] if isinstance(part, torch.Tensor) else part for part in stack)
