"""A router's logits: float32 products and sums of a few tokens' hidden states and its float32 weight, in one launch.

Which tokens go to which expert, in the order in which grouped kernels take them.

Made on the device without a look at its values: shapes depend on the worst choice of experts alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from dsv2quant.arch.spec import Router
from dsv2quant.kernels import router as many
from dsv2quant.kernels import sorting
from dsv2quant.kernels.jit import cdiv, jit, power_of_2
from dsv2quant.kernels.launch import PDL, check_rows, wait
from dsv2quant.kernels.sorting import tiles_of

PIECE: tl.constexpr = tl.constexpr(4)  # columns that a thread loads of a row at once, also of x's narrower ones
WARPS = 4
WIDE: tl.constexpr = tl.constexpr(WARPS * 32 * 4)
HELD = 24  # rows' pieces in a thread's registers before it computes
FEW = 64  # tokens; with more of them products on the matrix units take less time


@jit(do_not_specialize=["T"])
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


def router_logits(x: torch.Tensor, router: torch.Tensor, parts: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, H] (bfloat16, float16 or float32, in rows of any stride) · router [E, H]ᵀ, contiguous float32, with
    products and sums in float32: float32 [T, E]. Of many tokens by `parts`, router.split's, where they are of
    x's dtype.

    Raises ValueError where shapes, dtypes or layouts are others.
    """
    check_rows("router", router, (None, None), torch.float32)
    experts, columns = router.shape
    check_rows("x", x, (None, columns))
    if not router.is_contiguous():
        raise ValueError("router must be contiguous")
    tokens = len(x)
    if tokens > FEW:
        if parts is not None and parts.dtype == x.dtype:
            return many.many_logits(x, parts)
        return F.linear(x.float(), router)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    if tokens:
        rows, wide, held = share(tokens, columns)
        _router_kernel[(cdiv(experts, rows), cdiv(tokens, wide))](
            x, router, logits, tokens, experts, x.stride(0),
            COLUMNS=columns, ROWS=rows, TOKENS=wide, HELD=held, num_warps=WARPS, enable_fp_fusion=True,
            launch_pdl=PDL,
        )  # fmt: skip
    return logits


def share(tokens: int, columns: int) -> tuple[int, int, int]:
    """Experts and tokens of a program, and how often it asks for WIDE columns of them before it computes."""
    rows, wide = (1, 1) if tokens == 1 else (2, 2) if tokens <= 4 else (4, 4) if tokens <= 16 else (4, 8)
    steps = cdiv(columns, WIDE.value)
    return rows, wide, cdiv(steps, cdiv(steps * (rows + wide), HELD))


SLICE = 32  # pairs whose places one program finds
CHUNK = 512  # pairs that it compares them to at once
COMPARED = 8192  # pairs; more of them are counted and placed


class Routes(NamedTuple):
    """Pairs of a token and an expert it chose (number token · k + choice) by expert, cut into tiles of one expert's.

    Made on the device, without a look at its values: there are as many tiles as the worst choice of experts needs.
    """

    pairs: torch.Tensor  # int32 [tokens · k]: numbers of pairs, by expert, in order within an expert
    experts: torch.Tensor  # int32 [tiles]: a tile's expert; −1 of tiles that are not needed
    begins: torch.Tensor  # int32 [tiles]: its first place in `pairs`
    ends: torch.Tensor  # int32 [tiles]: one past its last
    block: int  # pairs in a tile, at most


def tiles_needed(pairs: int, experts: int, block: int) -> int:
    """Tiles of at most `block` pairs, whatever the experts."""
    return (pairs + min(pairs, experts) * (block - 1)) // block


def choose_block(tokens: int, k: int, experts: int, wide: bool = False) -> int:
    """Pairs in a tile: about those of an expert, which few tiles then share, and no fewer than MMA units take. Wide:
    for products that lose nothing by tiles of 128."""
    mean = tokens * k / experts
    return 16 if mean <= 12 else 32 if mean <= 24 else 64 if mean <= (64 if wide else 256) else 128


NEVER: tl.constexpr = tl.constexpr(-(1 << 63))  # below every key


@triton.jit
def _ordered(x):
    """Bits of float32 that are ordered as the numbers are, and of such bits the number's."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(score, number):
    """int64, the larger the higher the score is, and of equal ones the lower the number."""
    return (_ordered(score.to(tl.int32, bitcast=True)).to(tl.int64) << 32) | (0x7FFFFFFF - number)


@triton.jit
def _score_of(key):
    return _ordered((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _sigmoid(x):
    return tl.div_rn(tl.zeros_like(x) + 1.0, 1.0 + tl.exp(-x))


@jit
def _route_kernel(
    logits, bias, weights, chosen, pairs, tile_experts, begins, ends, EXPERTS, scale,
    GROUPS: tl.constexpr, MANY_GROUPS: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr,
    K: tl.constexpr, MANY: tl.constexpr, SIGMOID: tl.constexpr, TOP2: tl.constexpr, NORM: tl.constexpr,
    SORTED: tl.constexpr,
):  # fmt: skip
    """One token, its experts as [MANY_GROUPS, WIDTH]. SORTED: also the routes, where there is no other token."""
    wait()
    token = tl.program_id(0)
    group, column = tl.arange(0, MANY_GROUPS)[:, None], tl.arange(0, WIDTH)[None, :]
    size = EXPERTS // GROUPS
    expert = group * size + column
    there = (group < GROUPS) & (column < size)
    row = tl.load(logits + token * EXPERTS + expert, mask=there, other=0.0 if SIGMOID else float("-inf"))
    if SIGMOID:
        scores = _sigmoid(row)
    else:
        peak = tl.max(tl.max(row, 1), 0)
        powers = tl.where(there, tl.exp(row - peak), 0.0)
        total = tl.sum(tl.sum(powers, 1), 0)
        powers = tl.where(there, powers, total)  # 0 / total takes a slow path
        scores = tl.div_rn(powers, tl.zeros_like(powers) + total)
    eligible = scores
    if bias is not None:
        eligible += tl.load(bias + expert, mask=there, other=0.0)
    keys = tl.where(there, _key(eligible, expert), NEVER)
    if KEPT < GROUPS:
        if TOP2:
            first = tl.max(keys, 1)
            second = tl.max(tl.where(keys == first[:, None], NEVER, keys), 1)
            of_groups = _score_of(first) + _score_of(second)
        else:
            of_groups = tl.max(tl.where(there, eligible, float("-inf")), 1)
        number = tl.arange(0, MANY_GROUPS)
        best = tl.where(number < GROUPS, _key(of_groups, number), NEVER)
        kept = number < 0
        for _ in tl.static_range(KEPT):
            largest = best == tl.max(best, 0)
            kept = kept | largest
            best = tl.where(largest, NEVER, best)
        if bias is None:
            keys = tl.where(kept[:, None] | ~there, keys, _key(tl.zeros_like(scores), expert))
        else:
            keys = tl.where(kept[:, None], keys, NEVER)
    choice = tl.arange(0, MANY)
    found = tl.zeros([MANY], tl.int64)
    for i in tl.static_range(K):
        best = tl.max(tl.max(keys, 1), 0)
        found = tl.where(choice == i, best, found)
        keys = tl.where(keys == best, NEVER, keys)
    taken = 0x7FFFFFFF - (found & 0x7FFFFFFF).to(tl.int32)
    if bias is None:
        weight = _score_of(found)
    else:  # Scores are computed again: to look for them, too, takes 5.2 µs instead of 3.2 on an H200, of 256 experts.
        row = tl.load(logits + token * EXPERTS + taken, mask=choice < K, other=float("-inf"))
        weight = _sigmoid(row) if SIGMOID else tl.div_rn(tl.exp(row - peak), tl.zeros_like(row) + total)
    if NORM:
        weight = tl.div_rn(weight, tl.zeros_like(weight) + (tl.sum(weight, 0) + 1e-20))
    weight *= scale
    tl.store(weights + token * K + choice, weight, mask=choice < K)
    tl.store(chosen + token * K + choice, taken, mask=choice < K)
    if SORTED:
        taken = tl.where(choice < K, taken, EXPERTS)
        place = tl.sum((taken[None, :] < taken[:, None]).to(tl.int32), 1)  # experts of one token differ
        tl.store(pairs + place, choice, mask=choice < K)
        tl.store(tile_experts + place, taken, mask=choice < K)
        tl.store(begins + place, place, mask=choice < K)
        tl.store(ends + place, place + 1, mask=choice < K)


@triton.jit
def _table(chosen, tile_experts, begins, ends, count, EXPERTS, tiles, BLOCK: tl.constexpr, BINS: tl.constexpr,
           CHUNK: tl.constexpr):  # fmt: skip
    """The tiles of all experts."""
    expert = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for first in range(0, count, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        counts += tl.histogram(tl.load(chosen + pair, mask=pair < count, other=BINS - 1).to(tl.int32), BINS)
    tiles_of(tl.where(expert < EXPERTS, counts, 0), tile_experts, begins, ends, tiles, BLOCK, BINS)


@jit(do_not_specialize=["count", "EXPERTS", "tiles"])
def _sort_kernel(
    chosen, pairs, tile_experts, begins, ends, count, EXPERTS, tiles,
    BLOCK: tl.constexpr, BINS: tl.constexpr, SLICE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program 0: the tiles. Each other: the places of SLICE pairs, which is how many pairs go before each."""
    wait()
    if tl.program_id(0) == 0:
        _table(chosen, tile_experts, begins, ends, count, EXPERTS, tiles, BLOCK, BINS, CHUNK)
    else:
        pair = (tl.program_id(0) - 1) * SLICE + tl.arange(0, SLICE)
        key = tl.load(chosen + pair, mask=pair < count, other=0).to(tl.int32) * count + pair
        place = tl.zeros([SLICE], tl.int32)
        for first in range(0, count, CHUNK):
            other = first + tl.arange(0, CHUNK)
            others = tl.load(chosen + other, mask=other < count, other=EXPERTS).to(tl.int32) * count + other
            place += tl.sum((others[None, :] < key[:, None]).to(tl.int32), 1)
        tl.store(pairs + place, pair, mask=pair < count)


def check_router(logits: torch.Tensor, router: Router, bias: torch.Tensor | None) -> None:
    """Raises ValueError where logits are not float32 [tokens, experts], the router has no choice among so many, or
    `bias` is not float32 [experts] where the router has one, and None where it has none."""
    if logits.ndim != 2 or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"logits are {logits.dtype}, {tuple(logits.shape)}: need contiguous float32 [tokens, experts]")
    experts = logits.shape[1]
    router.check(experts)
    if (bias is not None) != router.bias:
        has, given = "a" if router.bias else "no", "none" if bias is None else "one"
        raise ValueError(f"the router has {has} bias: {given} given")
    if bias is not None:
        check_rows("bias", bias, (experts,), torch.float32)


def route(logits: torch.Tensor, router: Router, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32, experts int32), both [tokens, k], of `logits`, float32 [tokens, experts], and the correction
    bias, float32 [experts], of a router that has one: `reference.route`.

    Experts come by score, with its bias if there is one, highest first; of equal ones the lowest index is taken, as it
    is of groups. Raises ValueError as `check_router`.
    """
    weights, chosen, _ = _route(logits, router, bias, None)
    return weights, chosen


def route_and_sort(
    logits: torch.Tensor, router: Router, bias: torch.Tensor | None = None, wide: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Routes]:
    """`route`, and `sort_pairs` of what it chose in tiles of `choose_block`: for one token by one launch."""
    block = choose_block(logits.shape[0], router.k, logits.shape[1], wide)
    weights, chosen, routes = _route(logits, router, bias, block)
    return weights, chosen, routes or sort_pairs(chosen, logits.shape[1], block)


def _route(
    logits: torch.Tensor, router: Router, bias: torch.Tensor | None, block: int | None
) -> tuple[torch.Tensor, torch.Tensor, Routes | None]:
    """With a block, and routes if there is one token."""
    check_router(logits, router, bias)
    tokens, experts = logits.shape
    groups, k = router.groups, router.k
    weights = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(tokens, k, dtype=torch.int32, device=logits.device)
    routes = _empty(chosen, experts, block) if block and tokens == 1 else None
    if tokens:
        _route_kernel[(tokens,)](
            logits, bias, weights, chosen, *(routes[:4] if routes else (None,) * 4), experts, router.scale,
            GROUPS=groups, MANY_GROUPS=power_of_2(groups),
            WIDTH=power_of_2(experts // groups), KEPT=router.topk_group, K=k,
            MANY=power_of_2(k), SIGMOID=router.score == "sigmoid", TOP2=router.group_score == "top2",
            NORM=router.normalise, SORTED=routes is not None,
            num_warps=1, enable_fp_fusion=False, launch_pdl=PDL,
        )  # fmt: skip
    return weights, chosen, routes


def _empty(chosen: torch.Tensor, experts: int, block: int) -> Routes:
    count = chosen.numel()
    pairs = torch.empty(count, dtype=torch.int32, device=chosen.device)
    tiles = tiles_needed(count, experts, block)
    table = torch.empty(3, cdiv(tiles, 4) * 4, dtype=torch.int32, device=chosen.device)  # rows aligned to 16
    tile_experts, begins, ends = table[:, :tiles]
    return Routes(pairs, tile_experts, begins, ends, block)


def sort_pairs(chosen: torch.Tensor, experts: int, block: int) -> Routes:
    """`chosen`, int32 or int64 [tokens, k], experts of each token, sorted by expert and cut into tiles of `block`.

    Raises ValueError where it is no such tensor.
    """
    if chosen.dtype not in (torch.int32, torch.int64) or chosen.ndim != 2 or not chosen.is_contiguous():
        raise ValueError(f"experts are {chosen.dtype}, {tuple(chosen.shape)}: need contiguous integers [tokens, k]")
    routes = _empty(chosen, experts, block)
    count = chosen.numel()
    if count > COMPARED:
        sorting.place(chosen, *routes[:4], experts, block)
    elif count:
        _sort_kernel[(1 + cdiv(count, SLICE),)](
            chosen, *routes[:4], count, experts, len(routes.experts),
            BLOCK=block, BINS=power_of_2(experts + 1), SLICE=SLICE,
            CHUNK=min(power_of_2(count), CHUNK), num_warps=4 if count <= 64 else 8, enable_fp_fusion=False,
            launch_pdl=PDL,
        )  # fmt: skip
    return routes
