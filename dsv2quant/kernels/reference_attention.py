"""Torch references of the kernels around attention. They define what is right."""

from __future__ import annotations

import torch

from dsv2quant.kernels.prompts import Prompt
from dsv2quant.kernels.reference import quantize_activation, rms_norm


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


def mla_prefill(
    q: torch.Tensor,
    table: torch.Tensor,
    kv: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    *,
    halves: bool = False,
) -> torch.Tensor:
    """Causal attention of the last tokens' queries q [batch, new, heads · 192], of each head 128 columns and 64 that
    `table` turns, to kv [batch, all, heads · 256], of each head keys of 128 columns and values, and to `keys` [batch,
    all, 64], rotated → [batch, new, heads · 128]."""
    (new, total), heads = (q.shape[1], kv.shape[1]), kv.shape[2] // 256
    q_nope, q_pe = q.unflatten(2, (heads, 192)).split([128, 64], -1)  # [batch, new, heads, ·]
    turns = torch.view_as_complex(table)[:, None]
    k_nope, values = kv.unflatten(2, (heads, 256)).chunk(2, -1)
    scores = torch.einsum("bqhn,bkhn->bhqk", q_nope, k_nope)
    scores = (scores + torch.einsum("bqhr,bkr->bhqk", _rotated(q_pe, turns, halves), keys)) * scale
    seen = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhv->bqhv", weights, values).flatten(2)


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
    halves: bool = False,
) -> None:
    """One token per sequence: its latent and rotated key to cache[t, positions[t]], its rotated queries to
    q_out[..., rank:]; a position beyond the capacity stores nothing, one beyond the table turns as its last."""
    tokens, heads, _ = q_out.shape
    rank = norm_weight.shape[0]
    rope = kv.shape[1] - rank
    turns = torch.view_as_complex(table[positions.long().clamp(0, len(table) - 1)])  # [T, rope/2]
    q_out[..., rank:] = _rotated(q.view(tokens, heads, -1)[..., -rope:], turns[:, None], halves)
    row = torch.cat([rms_norm(kv[:, :rank], norm_weight, eps), _rotated(kv[:, rank:], turns, halves)], -1)
    _store(row if cache_scale is None else row.float() / cache_scale, positions, cache)


def append_prompt(
    kv: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    table: torch.Tensor,
    q: torch.Tensor | None = None,
    heads: int = 0,
    *,
    cache: torch.Tensor | None = None,
    cache_scale: torch.Tensor | None = None,
    first: int = 0,
    halves: bool = False,
    quantize: str | None = None,
    scale: torch.Tensor | None = None,
) -> Prompt:
    """Of each sequence's tokens: latents, normed, and rotated keys, also to cache[sequence, first …]; the queries' last
    columns are rotated in place."""
    rank, new = len(norm_weight), len(table)
    turns = torch.view_as_complex(table).repeat(len(kv) // max(new, 1), 1)  # [T, rope / 2]
    latents = rms_norm(kv[:, :rank], norm_weight, eps)
    keys = _rotated(kv[:, rank:], turns, halves)
    if q is not None:
        rotated = q.unflatten(1, (heads, -1))[..., -keys.shape[1] :]
        rotated.copy_(_rotated(rotated, turns[:, None], halves))
    if cache is not None:
        rows = torch.cat([latents, keys], 1)
        if cache_scale is not None:
            largest = torch.finfo(cache.dtype).max
            rows = (rows.float() / cache_scale).clamp(-largest, largest)
        cache[:, first : first + new] = rows.to(cache.dtype).unflatten(0, (len(cache), -1))
    codes, scales = (None, None) if quantize is None else quantize_activation(latents, quantize, scale)
    return Prompt(latents, keys, codes, scales)


def prompt_keys(values: torch.Tensor, keys: torch.Tensor, heads: int, nope: int) -> torch.Tensor:
    """The first `nope` columns of each head of `values` [T, heads · ·] beside the key [T, rope] that all share."""
    own = values.unflatten(1, (heads, -1))[..., :nope]
    return torch.cat([own, keys[:, None].expand(-1, heads, -1)], -1)


def append_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    cache: torch.Tensor,
    cache_scale: torch.Tensor | None,
    width: int,
) -> torch.Tensor:
    """One token per sequence: its rotated keys, and then its values, to cache[t, positions[t]]; its rotated queries [T,
    heads, width]. Positions beyond the capacity or the table are as in `append_latents`."""
    turns = torch.view_as_complex(table[positions.long().clamp(0, len(table) - 1)])[:, None]  # [T, 1, width/2]
    queries, keys = (_rotated(x.unflatten(1, (-1, width)), turns, halves=True) for x in (q, k))
    parts = [keys.flatten(1), v]
    if cache_scale is not None:
        parts = [part.float() / scale for part, scale in zip(parts, cache_scale, strict=True)]
    _store(torch.cat(parts, 1), positions, cache)
    return queries


def gqa_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    cache_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one token per sequence: q [batch, heads, width] to the first lengths[i] rows of cache [batch,
    capacity, 2 · groups · width], the keys of all groups and then their values → [batch, heads, width]."""
    absent = torch.arange(cache.shape[1], device=q.device) >= lengths.unsqueeze(1)  # [batch, capacity]
    known = cache.to(q.dtype).masked_fill(absent.unsqueeze(2), 0)  # what lies there may be no number
    keys, values = known.unflatten(2, (2, -1, q.shape[2])).unbind(2)  # [batch, capacity, groups, width]
    if cache_scale is not None:
        keys, values = keys * cache_scale[0].to(q.dtype), values * cache_scale[1].to(q.dtype)
    grouped = q.unflatten(1, (keys.shape[2], -1))  # [batch, groups, heads of one, width]
    scores = torch.einsum("bghw,btgw->bght", grouped, keys) * scale
    weights = scores.masked_fill(absent[:, None, None], -torch.inf).softmax(-1).nan_to_num()  # no tokens: no weights
    return torch.einsum("bght,btgw->bghw", weights, values).flatten(1, 2)


def absorb_k(q_nope: torch.Tensor, w_k: torch.Tensor, q_out: torch.Tensor) -> torch.Tensor:
    """q_out[..., :rank] = q_nope [T, heads, nope] · w_k [heads, nope, rank]."""
    q_out[..., : w_k.shape[2]] = torch.einsum("thn,hnr->thr", q_nope.double(), w_k.double())
    return q_out


def absorb_v(mixed: torch.Tensor, w_v: torch.Tensor) -> torch.Tensor:
    """mixed [T, heads, rank] · w_v [heads, v, rank]ᵀ → [T, heads · v]."""
    return torch.einsum("thr,hvr->thv", mixed.to(w_v.dtype).double(), w_v.double()).flatten(1).to(w_v.dtype)


def _store(rows: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor) -> None:
    """Row t to cache[t, positions[t]], where there is such a place: float8 saturates."""
    if cache.dtype.itemsize == 1:
        largest = torch.finfo(cache.dtype).max
        rows = rows.clamp(-largest, largest)
    token = ((positions >= 0) & (positions < cache.shape[1])).nonzero().squeeze(1)
    cache[token, positions[token].long()] = rows[token].to(cache.dtype)


def _rotated(x: torch.Tensor, turns: torch.Tensor, halves: bool) -> torch.Tensor:
    """As model/attention.Rope.rotate."""
    wide = x.float()
    pairs = wide.unflatten(-1, (2, -1)).transpose(-1, -2) if halves else wide.unflatten(-1, (-1, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turns)
    return (turned.transpose(-1, -2) if halves else turned).flatten(-2).to(x.dtype)
