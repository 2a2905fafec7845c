"""A router's logits for many tokens: products on the matrix units, as exact as float32's.

The units multiply BF16 exactly and add in float32. So the float32 weight is taken apart into BF16 numbers whose sum it
is; hidden states are BF16 as they are. A weight that was BF16 in the checkpoint has one part, another three. The units
cut off what they add, and are given no more than 128 columns at a time, whose sums are added outside them.
"""

from __future__ import annotations

import torch
import triton.language as tl

from dsv2quant.kernels.jit import cdiv, jit
from dsv2quant.kernels.launch import INTERPRETED, MULTIPROCESSORS, PDL, check_rows, wait

DEPTH = 64  # columns of a step
STEPS = 2  # whose products the units add


def split(router: torch.Tensor) -> torch.Tensor:
    """float32 [E, H] as BF16 [parts, E, H], one to three, the largest first, whose sum is the same to 2^-26 of it."""
    parts = [router.bfloat16()]
    for _ in range(2):
        rest = router - torch.stack(parts).float().sum(0)
        if not bool(rest.any()):
            break
        parts.append(rest.bfloat16())
    return torch.stack(parts)


@jit(do_not_specialize=["T"])
def _logits_kernel(
    x, parts, logits, T, EXPERTS, x_stride,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """ROWS experts' logits of TOKENS tokens. Programs of the same tokens follow each other."""
    wait()
    blocks = tl.cdiv(EXPERTS, ROWS)
    token = tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)
    expert = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    near = tl.minimum(token, T - 1).to(tl.int64)
    near_expert = tl.minimum(expert, EXPERTS - 1)
    k = tl.arange(0, DEPTH)
    values = x + near[:, None] * x_stride + k[None, :]
    weights = parts + near_expert[None, :] * COLUMNS + k[:, None]
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for first in range(0, COLUMNS, DEPTH * STEPS):
        product = tl.zeros([TOKENS, ROWS], tl.float32)
        for step in tl.static_range(STEPS):
            start = first + step * DEPTH
            inside = k < COLUMNS - start
            a = tl.load(values + start, mask=inside[None, :], other=0.0)
            for i in tl.static_range(PARTS):  # the smallest first
                of_part = weights + (PARTS - 1 - i) * EXPERTS * COLUMNS + start
                b = tl.load(of_part, mask=inside[:, None], other=0.0)
                product = tl.dot(a, b, product, input_precision="ieee")
        total += product
    kept = (token < T)[:, None] & (expert < EXPERTS)[None, :]
    tl.store(logits + token[:, None].to(tl.int64) * EXPERTS + expert[None, :], total, mask=kept)


Share = tuple[int, int, int, int]  # a program's tokens, experts and warps, and steps under way


def choose(tokens: int, experts: int, parts: int) -> Share:
    """The share of a program: fitted on an H200, to routers of 64 experts of 2,048 columns and 160 of 5,120."""
    if parts > 1 and 4 * cdiv(tokens, 256) * cdiv(experts, 64) >= 3 * MULTIPROCESSORS:
        return 256, 64, 8, 2
    stages = 3 if parts == 1 else 2
    if cdiv(tokens, 128) * cdiv(experts, 64) >= MULTIPROCESSORS:
        return 128, 64, 4, stages
    return 64, 32, 4, stages


def many_logits(x: torch.Tensor, parts: torch.Tensor, share: Share | None = None) -> torch.Tensor:
    """x [T, H], in rows of any stride · the sum of parts [·, E, H]ᵀ, contiguous: float32 [T, E].

    Both are bfloat16; under Triton's interpreter, which has none, float32 that holds what bfloat16 does. Raises
    ValueError where shapes, dtypes or layouts are others.
    """
    check_rows("parts", parts, (None, None, None), torch.float32 if INTERPRETED else torch.bfloat16)
    count, experts, columns = parts.shape
    check_rows("x", x, (None, columns), parts.dtype)
    if not parts.is_contiguous():
        raise ValueError("parts must be contiguous")
    tokens = len(x)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    if tokens:
        wide, rows, warps, stages = share or choose(tokens, experts, count)
        _logits_kernel[(cdiv(tokens, wide) * cdiv(experts, rows),)](
            x, parts, logits, tokens, experts, x.stride(0),
            COLUMNS=columns, PARTS=count, TOKENS=wide, ROWS=rows, DEPTH=DEPTH, STEPS=STEPS,
            num_warps=warps, num_stages=stages, enable_fp_fusion=True, launch_pdl=PDL,
        )  # fmt: skip
    return logits
