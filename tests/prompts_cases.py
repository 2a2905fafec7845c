"""Inputs of a prompt's kernels, for the interpreter and a CUDA device, and what their results must be."""

from __future__ import annotations

import torch
from fused_cases import EPS, PLACE, bytes_differ, code_faults, off, random, static

from dsv2quant.kernels import reference_attention
from dsv2quant.kernels.prompts import append_prompt, prompt_keys

FLOATS_8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def prompt_faults(
    batch: int, new: int, sizes: tuple[int, int, int, int], halves: bool, room: tuple[int, int],
    granularity: str | None, stored, dtype, device,
) -> list[str]:  # fmt: skip
    """`sizes`: heads, without heads no queries, and the widths nope, rope and rank; `room`: the cache's capacity, and
    how much of it is filled. What lies beside the new tokens must stay."""
    heads, nope, rope, rank = sizes
    tokens, (capacity, first) = batch * new, room
    kv = random(tokens, rank + rope + 8, seed=1, device=device).to(dtype)[:, : rank + rope]
    weight = (random(rank, seed=2, device=device) * 0.2 + 1).to(dtype)
    table = random(new, rope // 2, 2, seed=3, device=device)
    queries = random(tokens, heads * (nope + rope) + 8, seed=4, device=device).to(dtype)
    scale = static(granularity, device)
    cache_scale = torch.tensor([0.3], device=device) if stored in FLOATS_8 else None
    found = []
    for operation in (append_prompt, reference_attention.append_prompt):
        cache = None if stored is None else random(batch, capacity, rank + rope, seed=5, device=device).to(stored)
        q = queries.clone()[:, : heads * (nope + rope)] if heads else None
        made = operation(
            kv, weight, EPS, table, q, heads, cache=cache, cache_scale=cache_scale, first=first, halves=halves,
            quantize=granularity, scale=scale,
        )  # fmt: skip
        found.append((q, cache, made))
    (q, cache, got), (want_q, want_cache, want) = found
    limit = 2 * PLACE[dtype] if dtype != torch.float32 else 2.0**-20
    pairs = [("latents", got.latents, want.latents), ("keys", got.keys, want.keys)]
    pairs += [("queries", q, want_q)] if heads else []
    faults = [name for name, a, b in pairs if not off(a, b) <= limit]
    if q is not None and want_q is not None:
        unturned = (x.unflatten(1, (heads, -1))[..., :nope] for x in (q, want_q))
        faults += ["what is not rotated"] if bytes_differ(*unturned) else []
    if granularity:
        faults += code_faults((got.codes, got.scales), got.latents, granularity, scale)
    if cache is not None:
        if bytes_differ(cache[:, :first], want_cache[:, :first]) or bytes_differ(
            cache[:, first + new :], want_cache[:, first + new :]
        ):
            faults.append("what was stored before")
        rows, want_rows = (x[:, first : first + new].float() for x in (cache, want_cache))
        if not off(rows, want_rows) <= (2.0**-4 if stored in FLOATS_8 else max(limit, 2 * PLACE[stored])):
            faults.append("cache")
    return faults


def keys_faults(tokens: int, heads: int, nope: int, rope: int, v: int, dtype, device) -> list[str]:
    values = random(tokens, heads * (nope + v) + 8, seed=1, device=device).to(dtype)[:, : heads * (nope + v)]
    keys = random(tokens, rope, seed=2, device=device).to(dtype)
    got = prompt_keys(values, keys, heads, nope)
    return ["keys"] if bytes_differ(got, reference_attention.prompt_keys(values, keys, heads, nope)) else []
