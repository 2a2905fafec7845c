"""A router's logits: float32 products and sums of a few tokens' hidden states and its float32 weight, in one launch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from dsv2quant.kernels.chain import PDL, wait
from dsv2quant.kernels.checks import check_rows

PIECE: tl.constexpr = tl.constexpr(4)  # columns that a thread loads of a row at once, also of x's narrower ones
WARPS = 4
WIDE: tl.constexpr = tl.constexpr(WARPS * 32 * 4)
HELD = 24  # rows' pieces in a thread's registers before it computes
FEW = 64  # tokens; the vendor's product takes more of them in less time


@triton.jit(do_not_specialize=["T"])
def _router_kernel(
    x, router, logits, T, EXPERTS, x_stride,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """ROWS experts' logits of TOKENS tokens: sums of a thread's own pieces stay apart until the end."""
    PIECES: tl.constexpr = WIDE // PIECE
    expert = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    weights = router + tl.minimum(expert, EXPERTS - 1)[:, None] * COLUMNS
    first_token = tl.program_id(1) * TOKENS
    totals = (tl.zeros([ROWS, PIECES], tl.float32),) * TOKENS
    for first in range(0, COLUMNS, WIDE * HELD):
        gains, values = (), ()
        for i in tl.static_range(HELD):
            column = tl.arange(0, WIDE)[None, :] + (first + i * WIDE)
            inside = column < COLUMNS
            gains = gains + (tl.load(weights + column, mask=inside, other=0.0),)
        wait()
        for i in tl.static_range(HELD):
            column = tl.arange(0, WIDE)[None, :] + (first + i * WIDE)
            inside = column < COLUMNS
            for t in tl.static_range(TOKENS):
                token = tl.minimum(first_token + t, T - 1).to(tl.int64)
                near = tl.max_contiguous(column, (1, PIECE))
                values = values + (tl.load(x + token * x_stride + near, mask=inside, other=0.0),)
        # One wait for all of them: the compiler moves no load over a barrier, and no use of one before a branch, which
        # is always taken.
        tl.debug_barrier()
        if T > 0:
            for i in tl.static_range(HELD):
                found = ()
                for t in tl.static_range(TOKENS):
                    products = gains[i] * values[i * TOKENS + t].to(tl.float32)
                    found = found + (totals[t] + tl.sum(products.reshape(ROWS, PIECES, PIECE), 2),)
                totals = found
    for t in tl.static_range(TOKENS):
        token = first_token + t
        tl.store(logits + token * EXPERTS + expert, tl.sum(totals[t], 1), mask=expert < tl.where(token < T, EXPERTS, 0))


def router_logits(x: torch.Tensor, router: torch.Tensor) -> torch.Tensor:
    """x [T, H] (bfloat16, float16 or float32, in rows of any stride) · router [E, H]ᵀ, contiguous float32, with
    products and sums in float32: float32 [T, E].

    Raises ValueError where shapes, dtypes or layouts are others.
    """
    check_rows("router", router, (None, None), torch.float32)
    experts, columns = router.shape
    check_rows("x", x, (None, columns))
    if not router.is_contiguous():
        raise ValueError("router must be contiguous")
    tokens = len(x)
    if tokens > FEW:
        return F.linear(x.float(), router)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    if tokens:
        rows, wide, held = share(tokens, columns)
        _router_kernel[(triton.cdiv(experts, rows), triton.cdiv(tokens, wide))](
            x, router, logits, tokens, experts, x.stride(0),
            COLUMNS=columns, ROWS=rows, TOKENS=wide, HELD=held, num_warps=WARPS, enable_fp_fusion=True,
            launch_pdl=PDL,
        )  # fmt: skip
    return logits


def share(tokens: int, columns: int) -> tuple[int, int, int]:
    """Experts and tokens of a program, and how often it asks for WIDE columns of them before it computes."""
    rows, wide = (1, 1) if tokens == 1 else (2, 2) if tokens <= 4 else (4, 4) if tokens <= 16 else (4, 8)
    steps = triton.cdiv(columns, WIDE.value)
    return rows, wide, triton.cdiv(steps, triton.cdiv(steps * (rows + wide), HELD))
