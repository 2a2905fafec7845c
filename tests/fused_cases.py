"""Inputs of what stands between the products of a decode step, for the interpreter and a CUDA device, and what their
results must be."""

from __future__ import annotations

import math

import torch
from fp8_cases import activations

from dsv2quant.kernels import reference, reference_attention
from dsv2quant.kernels.activations import add_norm, silu_mul, silu_mul_codes
from dsv2quant.kernels.latents import Share, absorb_k, absorb_v, append_latents, choose

EMPTY = torch.empty
EPS = 1e-6
GRANULARITIES = ("group128", "token", "static")
# Half a last place, relative: how far apart two roundings of nearly the same value are in the mean.
PLACE = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def poisoned(*given: object, **how: object) -> torch.Tensor:
    """In place of torch.empty: nothing may rely on what is there."""
    found = EMPTY(*given, **how)
    found.view(torch.uint8).fill_(0xFF)
    return found


def random(*shape: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius error; infinite where a NaN is."""
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    return math.inf if math.isnan(error) else error


def bytes_differ(got: torch.Tensor | None, want: torch.Tensor | None) -> bool:
    if got is None or want is None:
        return got is not want
    same = got.shape == want.shape and got.dtype == want.dtype
    plain = [x.clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (got, want)]
    return not same or not torch.equal(*plain)


def code_faults(got: tuple, plain: torch.Tensor, granularity: str, scale: torch.Tensor | None) -> list[str]:
    """Codes and scales that are not those of `plain`, and scales in another layout than a product reads."""
    codes, scales = reference.quantize_activation(plain, granularity, scale)
    found = [name for name, a, b in (("codes", got[0], codes), ("scales", got[1], scales)) if bytes_differ(a, b)]
    tokens = len(plain)
    if granularity == "group128" and tokens > 1 and got[1].stride() != (1, -(-tokens // 4) * 4):
        found.append(f"strides {got[1].stride()}")
    return found


def static(granularity: str | None, device: str) -> torch.Tensor | None:
    return torch.tensor([0.013], device=device) if granularity == "static" else None


def norm_faults(
    tokens: int, columns: int, pairs: int, added: bool, granularity: str | None, dtype, device
) -> list[str]:
    x = activations(tokens, columns + 64, device=device).to(dtype)[:, :columns]
    weight = (random(columns, seed=1, device=device) * 0.2 + 1).to(dtype)
    addend = random(tokens, columns, seed=2, device=device).to(dtype) if added else None
    routed = random(tokens, pairs, columns, seed=3, device=device) if pairs else None
    scale = static(granularity, device)
    how = {"addend": addend, "pairs": routed, "quantize": granularity, "scale": scale}
    got = add_norm(x, weight, EPS, **how)
    want = reference.add_norm(x, weight, EPS, **how)
    found = [] if added or pairs or got.residual is x else ["residual was copied"]
    found += ["residual"] if bytes_differ(got.residual, want.residual) else []
    # Both round what differs in float32's last places, twice.
    apart = (got.normed.double() - want.normed.double()).abs()
    limit = 2 * PLACE[dtype] * 2 if dtype != torch.float32 else 2.0**-20
    if not bool((apart <= limit * want.normed.double().abs() + 1e-7).all()):
        found.append("normed")
    if not off(got.normed, want.normed) <= 2.0**-12:
        found.append(f"normed is off by {off(got.normed, want.normed)}")
    if granularity:
        found += code_faults((got.codes, got.scales), got.normed, granularity, scale)
    return found


def silu_faults(tokens: int, columns: int, up: int | None, granularity: str | None, dtype, device) -> list[str]:
    wide = (columns if up is None else up) + columns
    gate_up = (random(tokens, wide + 8, seed=4, device=device) * 4).to(dtype)[:, :wide]
    given = gate_up[:, :columns], gate_up[:, -columns:]
    plain = silu_mul(*given)
    error = off(plain, reference.silu_mul(*given))
    found = [] if error <= 2.0**-12 else [f"off by {error}"]
    if granularity:
        scale = static(granularity, device)
        found += code_faults(silu_mul_codes(*given, granularity, scale), plain, granularity, scale)
    return found


def latent_faults(
    positions: list[int], heads: int, nope: int, rope: int, rank: int, halves: bool, stored: torch.dtype, dtype, device
) -> list[str]:
    tokens, capacity, fused = len(positions), 7, heads * (nope + rope)
    both = random(tokens, fused + rank + rope + 8, seed=5, device=device).to(dtype) * 3
    q, kv = both[:, :fused], both[:, fused : fused + rank + rope]
    weight = (random(rank, seed=6, device=device) * 0.2 + 1).to(dtype)
    angles = torch.arange(9)[:, None] * torch.exp2(-torch.arange(rope // 2.0))
    table = torch.view_as_real(torch.polar(torch.full_like(angles, 1.1), angles)).contiguous().to(device)
    where = torch.tensor(positions, dtype=torch.int32, device=device)
    scale = torch.tensor([0.037], device=device) if stored.itemsize == 1 else None
    results = []
    for run in (append_latents, reference_attention.append_latents):
        cache = torch.full((tokens, capacity, rank + rope), 2.0, device=device).to(stored)
        q_out = torch.full((tokens, heads, rank + rope), 3.0, device=device).to(dtype)
        run(q, kv, weight, EPS, table, where, cache, scale, q_out, halves)
        results.append((cache, q_out))
    (cache, q_out), (want_cache, want_q) = results
    found = ["q_out's latents"] if bytes_differ(q_out[..., :rank], want_q[..., :rank]) else []
    # A few values round to neighbours: of float8, 2^-4 or 2^-3 apart.
    for name, got, want in (("q_out", q_out, want_q), ("cache", cache, want_cache)):
        place = {1: 2.0**-2}.get(want.element_size(), 4 * PLACE[dtype])
        near = (got.double() - want.double()).abs() <= place * want.double().abs() + 4e-6
        flips = float((got.double() != want.double()).double().mean())
        if not bool(near.all()) or flips > (1.0 if want.dtype == torch.float32 else 0.01):
            found.append(f"{name}: {int((~near).sum())} far off, {flips:.2%} others")
    for row, position in enumerate(positions):
        others = [at for at in range(capacity) if at != position]
        if not bool((cache[row, others].double() == 2).all()):
            found.append(f"row {row} has values at other positions than {position}")
    return found


def absorb_faults(tokens: int, heads: int, nope: int, v: int, rank: int, dtype, device) -> list[str]:
    q = random(tokens, heads, nope + 16, seed=7, device=device).to(dtype)
    kv_b = random(heads, nope + v, rank, seed=8, device=device).to(dtype)
    limit = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2e-3}[dtype]
    found = []
    exact = torch.einsum("thn,hnr->thr", q[..., :nope].double(), kv_b[:, :nope].double())
    for share in (choose(tokens, heads, nope, rank), Share(32, 1, 64, 4, 1)):
        q_out = torch.full((tokens, heads, rank + 16), torch.nan, device=device, dtype=dtype)
        q_out[..., rank:] = 3
        got = absorb_k(q[..., :nope], kv_b[:, :nope], q_out, share)
        error = off(got[..., :rank], exact)
        if got is not q_out or not error <= limit or not bool((got[..., rank:] == 3).all()):
            found.append(f"absorb_k {share}: {error}")
    for kind in {dtype, torch.float32}:
        mixed = random(tokens, heads, rank, seed=9, device=device).to(kind)
        exact = torch.einsum("thr,hvr->thv", mixed.to(dtype).double(), kv_b[:, nope:].double()).flatten(1)
        error = off(absorb_v(mixed, kv_b[:, nope:]), exact)
        if not error <= limit:
            found.append(f"absorb_v {kind}: {error}")
    return found
