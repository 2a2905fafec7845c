"""Torch twins of the kernels: the arithmetic in plain operations, on any device. They define what is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv2quant.formats.fp8 import BLOCK, E4M3_MAX, expand_blocks, scales_of
from dsv2quant.formats.int4 import OFFSET
from dsv2quant.kernels.int4_layout import Int4Weight, unpack


def quantize_activation(
    x: torch.Tensor, granularity: str, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 quantization of activations [..., K], as served: (codes float8_e4m3fn, scales float32).

    'token' has one scale per row, [..., 1]; 'group128' one per 128 columns, [..., ⌈K/128⌉] (DeepSeek-V3
    `inference/kernel.py`, act_quant); both are amax / 448 in float32. 'static' is given its one `scale`, float32 [1],
    and clips what lies beyond 448 of it.
    """
    x = x.float()
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
    per_column = scales if scales.shape[-1] == 1 else scales.repeat_interleave(BLOCK, -1)[..., :columns]
    return codes.float() * per_column


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
        return F.linear(x, weight.to(x.dtype), bias)
    served = dequantize_activation(*quantize_activation(x, activation, input_scale))
    return F.linear(served, weight.float(), None if bias is None else bias.float()).to(x.dtype)


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


def route(
    logits: torch.Tensor, n_group: int, topk_group: int, k: int, norm: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32, experts), both [tokens, k], of a router's logits, float32 [tokens, experts].

    DeepSeek's `MoEGate`: softmax over all experts; with groups, only the topk_group groups whose best expert scores
    highest stay eligible; then top-k. Normalised weights are *not* scaled, unlike in DeepSeek-V3.
    """
    scores = logits.softmax(-1)
    eligible = scores
    if n_group > 1:
        best = scores.unflatten(-1, (n_group, -1)).amax(-1)  # [tokens, n_group]
        groups = best.topk(topk_group, sorted=False).indices
        keep = torch.zeros_like(best, dtype=torch.bool).scatter_(1, groups, True)
        eligible = scores.masked_fill(~keep.repeat_interleave(scores.shape[-1] // n_group, -1), 0.0)
    weights, experts = eligible.topk(k, sorted=False)
    if norm and k > 1:
        return weights / (weights.sum(-1, keepdim=True) + 1e-20), experts
    return weights * scale, experts


def mla_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    lengths: torch.Tensor,
    rank: int,
    scale: float,
    cache_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Absorbed attention of one token per sequence: q [batch, heads, width] to the first lengths[i] rows of cache
    [batch, capacity, width], of which the first `rank` columns are the values → [batch, heads, rank], in q's dtype
    unless another is given."""
    keys = cache.to(q.dtype) if cache_scale is None else cache.to(q.dtype) * cache_scale.to(q.dtype)
    absent = torch.arange(cache.shape[1], device=q.device) >= lengths.unsqueeze(1)  # [batch, capacity]
    keys = keys.masked_fill(absent.unsqueeze(2), 0)  # what lies there may be no number
    scores = torch.einsum("bhw,btw->bht", q, keys) * scale
    weights = scores.masked_fill(absent.unsqueeze(1), -torch.inf).softmax(-1).nan_to_num()  # no tokens: no weights
    return torch.einsum("bht,btr->bhr", weights, keys[..., :rank]).to(dtype or q.dtype)
