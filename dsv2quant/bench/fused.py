"""What stands between a decode step's products; kv_b's halves, one product per head, beside cuBLAS' in BF16.

Activations, which the kernel before has just written, lie in the L2, and so do norms' weights: what reads nothing else
has the launch of a kernel that does nothing for a floor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton

from dsv2quant.arch.config import ModelConfig
from dsv2quant.bench.device import FLOOR, Limits, Measured, Row, Section, copies, frobenius, microseconds, random_bf16
from dsv2quant.bench.model import MODELS, configuration
from dsv2quant.kernels import reference, reference_attention
from dsv2quant.kernels.activations import add_norm, silu_mul, silu_mul_codes
from dsv2quant.kernels.latents import absorb_k, absorb_v, append_latents, choose

TOKENS = (1, 8, 64)
LIMIT = 2e-3  # BF16's own rounding is 1.7e-3
CALLS = 64  # of one graph
CAPACITY = 4096
GRANULARITIES = (None, "group128", "token")


@triton.jit
def _empty_kernel() -> None:
    pass


class Small(NamedTuple):
    """A call that takes little more than its launch; the error from its reference, or the part of its codes that are
    not the reference's."""

    what: str
    shape: str
    call: Callable[[], Any]
    error: float


def measure_between(limits: Limits) -> Iterator[Measured]:
    launch = microseconds([lambda: _empty_kernel[(1,)]()] * CALLS)
    for model in MODELS:
        config = configuration(model)
        for tokens in TOKENS:
            for make in (_norms, _gates, _latents):
                for what, shape, call, error in make(config, tokens):
                    taken = microseconds([call] * CALLS)
                    yield Measured("fused", model, what, shape, tokens, error, LIMIT, taken, launch, {})
            yield from _absorption(limits, model, config, tokens)


def _norms(config: ModelConfig, tokens: int) -> Iterator[Small]:
    hidden, k = config.hidden_size, config.num_experts_per_tok
    pairs = torch.randn(tokens, k, hidden, device="cuda")
    addend = random_bf16(tokens, hidden)
    sums = {"": (None, None), " + 1": (addend, None), f" + 1 + {k}": (addend, pairs)}
    inputs = {"": random_bf16(tokens, hidden)}
    if config.q_lora_rank is not None:
        inputs[" of q_a"] = random_bf16(tokens, 2 * config.q_lora_rank)[:, : config.q_lora_rank]
    for whose, x in inputs.items():
        weight = random_bf16(x.shape[1])
        for what, (added, routed) in sums.items():
            if whose and what:
                continue
            for granularity in GRANULARITIES:
                call = partial(add_norm, x, weight, 1e-6, addend=added, pairs=routed, quantize=granularity)
                found = call()
                wanted = reference.add_norm(x, weight, 1e-6, addend=added, pairs=routed)
                error = frobenius(found.normed, wanted.normed)
                if granularity:
                    error = _other_codes((found.codes, found.scales), found.normed, granularity)
                yield Small(f"norm{whose}{what} {granularity or ''}".strip(), f"{x.shape[1]}", call, error)


def _gates(config: ModelConfig, tokens: int) -> Iterator[Small]:
    shared = config.moe_intermediate_size * config.n_shared_experts
    for what, width in (("shared", shared), ("dense", config.intermediate_size)):
        gate, up = random_bf16(tokens, 2 * width).chunk(2, 1)
        plain = silu_mul(gate, up)
        error = frobenius(plain, reference.silu_mul(gate, up))
        yield Small(f"{what} gate", f"{width}", partial(silu_mul, gate, up), error)
        for granularity in filter(None, GRANULARITIES):
            call = partial(silu_mul_codes, gate, up, granularity)
            yield Small(f"{what} gate {granularity}", f"{width}", call, _other_codes(call(), plain, granularity))


def _latents(config: ModelConfig, tokens: int) -> Iterator[Small]:
    c = config
    width = c.kv_lora_rank + c.qk_rope_head_dim
    q, kv = random_bf16(tokens, c.num_attention_heads * c.qk_head_dim), random_bf16(tokens, width)
    weight, table = random_bf16(c.kv_lora_rank), torch.randn(CAPACITY, c.qk_rope_head_dim // 2, 2, device="cuda")
    positions = torch.arange(tokens, dtype=torch.int32, device="cuda") * 50
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        scale = torch.full((1,), 0.02, device="cuda") if dtype.itemsize == 1 else None
        stores = [torch.zeros(tokens, CAPACITY, width, device="cuda").to(dtype) for _ in range(2)]
        out = random_bf16(tokens, c.num_attention_heads, width)
        calls = [
            partial(run, q, kv, weight, 1e-6, table, positions, store, scale, out)
            for run, store in zip((append_latents, reference_attention.append_latents), stores, strict=True)
        ]
        for call in calls:
            call()
        yield Small(f"latents to {str(dtype)[6:]}", f"{width}", calls[0], frobenius(stores[0], stores[1].double()))


def _absorption(limits: Limits, model: str, config: ModelConfig, tokens: int) -> Iterator[Measured]:
    c = config
    heads, nope, v, rank = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim, c.kv_lora_rank
    kv_b = [random_bf16(heads, nope + v, rank) for _ in range(copies(heads * (nope + v) * rank * 2))]
    q, mixed = random_bf16(tokens, heads, c.qk_head_dim)[..., :nope], random_bf16(tokens, heads, rank)
    out = random_bf16(tokens, heads, rank + c.qk_rope_head_dim)
    products = {
        "absorb k": (
            [partial(absorb_k, q, w[:, :nope], out) for w in kv_b],
            [partial(torch.bmm, q.transpose(0, 1), w[:, :nope]) for w in kv_b],
            choose(tokens, heads, nope, rank),
        ),
        "absorb v": (
            [partial(absorb_v, mixed, w[:, nope:]) for w in kv_b],
            [partial(torch.bmm, mixed.transpose(0, 1), w[:, nope:].mT) for w in kv_b],
            choose(tokens, heads, rank, v),
        ),
    }
    for what, (ours, by_torch, share) in products.items():
        columns, depth = (rank, nope) if what == "absorb k" else (v, rank)
        expected = by_torch[0]().transpose(0, 1)
        found = ours[0]().unflatten(-1, (heads, -1)) if what == "absorb v" else ours[0]()[..., :rank]
        floor = limits.floor(2 * heads * (columns * depth + tokens * (columns + depth)), 0)
        yield Measured(
            "fused", model, what, f"{columns}×{depth}", tokens, frobenius(found, expected.double()), LIMIT,
            microseconds(ours), floor, {"cublas bf16": microseconds(by_torch)}, " ".join(map(str, share)),
        )  # fmt: skip


def _other_codes(found: tuple[Any, Any], plain: torch.Tensor, granularity: str) -> float:
    """The part of codes and scales that are not the reference's, of one byte or more."""
    wanted = reference.quantize_activation(plain, granularity)
    codes = [x[0].view(torch.uint8) for x in (found, wanted)]
    return float((codes[0] != codes[1]).float().mean() + (found[1] != wanted[1]).float().mean())


FUSED = Section(
    measure_between,
    ("cublas bf16",),
    (
        Row("between products, 1 token", FLOOR, lambda m: m.operation == "fused" and not m.peers and m.tokens == 1),
        Row("between products, 64 tokens", FLOOR, lambda m: m.operation == "fused" and not m.peers and m.tokens == 64),
        Row("kv_b's halves", "cublas bf16", lambda m: m.operation == "fused"),
    ),
)
