"""Torch twins of what stands between the products of a decode step: add_norm, silu_mul, latents, absorb."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dsv2quant.kernels.add_norm import Normed
from dsv2quant.kernels.reference import quantize_activation


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
    normed = _rms_norm(residual, weight, eps)
    codes, scales = (None, None) if quantize is None else quantize_activation(normed, quantize, scale)
    return Normed(residual, normed, codes, scales)


def silu_mul(
    gate: torch.Tensor, up: torch.Tensor, *, quantize: str | None = None, scale: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) · up, [T, columns], or its codes and scales."""
    h = (F.silu(gate.float()) * up.float()).to(gate.dtype)
    return h if quantize is None else quantize_activation(h, quantize, scale)


def append_latents(
    q: torch.Tensor,
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    table: torch.Tensor,
    positions: torch.Tensor,
    cache: torch.Tensor,
    cache_scale: torch.Tensor | None,
    q_out: torch.Tensor,
) -> None:
    """One token per sequence: its latent and rotated key to cache[t, positions[t]], its rotated queries to
    q_out[..., rank:]; a position beyond the capacity stores nothing, one beyond the table turns as its last."""
    tokens, heads, _ = q_out.shape
    rank = norm_weight.shape[0]
    rope = kv.shape[1] - rank
    turns = torch.view_as_complex(table[positions.long().clamp(0, len(table) - 1)])  # [T, rope/2]
    q_out[..., rank:] = _rotated(q.view(tokens, heads, -1)[..., -rope:], turns[:, None])
    row = torch.cat([_rms_norm(kv[:, :rank], norm_weight, eps), _rotated(kv[:, rank:], turns)], -1)
    if cache_scale is not None:
        largest = torch.finfo(cache.dtype).max
        row = (row.float() / cache_scale).clamp(-largest, largest)
    token = ((positions >= 0) & (positions < cache.shape[1])).nonzero().squeeze(1)
    cache[token, positions[token].long()] = row[token].to(cache.dtype)


def absorb_k(q_nope: torch.Tensor, w_k: torch.Tensor, q_out: torch.Tensor) -> torch.Tensor:
    """q_out[..., :rank] = q_nope [T, heads, nope] · w_k [heads, nope, rank]."""
    q_out[..., : w_k.shape[2]] = torch.einsum("thn,hnr->thr", q_nope.double(), w_k.double())
    return q_out


def absorb_v(mixed: torch.Tensor, w_v: torch.Tensor) -> torch.Tensor:
    """mixed [T, heads, rank] · w_v [heads, v, rank]ᵀ → [T, heads · v]."""
    return torch.einsum("thr,hvr->thv", mixed.to(w_v.dtype).double(), w_v.double()).flatten(1).to(w_v.dtype)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As model/linear.RMSNorm, which this package may not import."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotated(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """As model/rope.Rope.rotate."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
