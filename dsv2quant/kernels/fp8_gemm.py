"""FP8 matrix product on Hopper: y [M, N] = x [M, K] · w [N, K]ᵀ of e4m3 codes and float32 scales.

Hopper's FP8 units add with about 14 bits. So every 128 columns of K are one product of their own, whose float32 result
is scaled and added to the sum outside them (DeepGEMM, deep_gemm/include/deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh).

Two kernels of those units. Few tokens: time is that of reading w, so w's rows are the M side of the units, which is
never below 64, and tokens their N side; K may be split over programs, whose sums a second kernel adds in order. Many
tokens: tiles come through TMA descriptors. A third kernel, for a few tokens, does without them: fp8_vector.py. And a
fourth, for very many, leaves TMA to a warp of its own: fp8_prefill.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.kernels import fp8_prefill, fp8_vector, launch
from dsv2quant.kernels.activations import quantize_activation
from dsv2quant.kernels.fp8_vector import Vector
from dsv2quant.kernels.jit import cdiv, jit, power_of_2
from dsv2quant.kernels.launch import PDL, check_rows, wait

DEPTH: tl.constexpr = tl.constexpr(BLOCK)  # columns of K in one product
BAND: tl.constexpr = tl.constexpr(8)  # token tiles that share tiles of w in L2
REDUCED = 1024  # elements of one program of the reduction


class Decode(NamedTuple):
    """A program's share for few tokens: `rows` of w × `tokens`, and one of `splits` parts of K."""

    rows: int
    tokens: int
    splits: int
    stages: int


class Prefill(NamedTuple):
    """A program's share for many tokens: `tokens` × `rows` of w, which divide 128; 4 warps for each 64 tokens."""

    tokens: int
    rows: int
    stages: int


@jit(do_not_specialize=["M", "xs_k", "ws_n", "splits"])
def _decode_kernel(
    x, x_scale, w, w_scale, y, M, N, K, xs_m, xs_k, ws_n, ws_k, splits,
    GROUPED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """y [splits, M, N]: the sum over one part of K. WHOLE: K is a multiple of 128."""
    wait()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    near_row, near_token = tl.minimum(row, N - 1).to(tl.int64), tl.minimum(token, M - 1)
    column = tl.arange(0, DEPTH)
    weights = w + near_row[:, None] * K + column[None, :]
    values = x + near_token[None, :] * K + column[:, None]
    weight_scales = w_scale + (tl.program_id(0) * ROWS // DEPTH) * ws_n
    token_scales = x_scale + near_token * xs_m
    blocks = tl.cdiv(K, DEPTH)
    split = tl.program_id(1)
    first, last = split * blocks // splits, (split + 1) * blocks // splits
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    if GROUPED:
        scale = tl.load(token_scales + first * xs_k) * tl.load(weight_scales + first * ws_k)
    for block in range(first, last):
        if WHOLE:
            a = tl.load(weights + block * DEPTH, eviction_policy="evict_first")
            b = tl.load(values + block * DEPTH)
        else:
            inside = column < K - block * DEPTH
            a = tl.load(weights + block * DEPTH, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            b = tl.load(values + block * DEPTH, mask=inside[:, None], other=0.0)
        if GROUPED:
            after = tl.minimum(block + 1, blocks - 1)  # its scales are on their way while this product is made
            token_scale, weight_scale = tl.load(token_scales + after * xs_k), tl.load(weight_scales + after * ws_k)
            total += tl.dot(a, b) * scale[None, :]
            scale = token_scale * weight_scale
        else:
            total += tl.dot(a, b)
    if not GROUPED:
        total *= tl.load(w_scale + near_row * ws_n)[:, None] * tl.load(token_scales)[None, :]
    out = y + (split * M + token[None, :]).to(tl.int64) * N + row[:, None]
    tl.store(out, total.to(y.dtype.element_ty), mask=(row < N)[:, None] & (token < M)[None, :])


@jit
def _reduce_kernel(sums, y, count, SPLITS: tl.constexpr, ELEMENTS: tl.constexpr):
    """y [count] = the sums of `sums` [SPLITS, count], added in order."""
    wait()
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < count
    total = tl.zeros([ELEMENTS], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(sums + split * count + element, mask=inside, other=0.0)
    tl.store(y + element, total.to(y.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["M", "xs_k", "ws_n"])
def _prefill_kernel(
    x, x_scale, w, w_scale, y, M, N, K, xs_m, xs_k, ws_n, ws_k,
    GROUPED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x and w are descriptors of tiles [TOKENS, 128] and [ROWS, 128]; what lies outside them reads as 0."""
    tiles_m, tiles_n = tl.cdiv(M, TOKENS), tl.cdiv(N, ROWS)
    band = tl.program_id(0) // (BAND * tiles_n) * BAND
    inner = tl.program_id(0) % (BAND * tiles_n)
    height = tl.minimum(tiles_m - band, BAND)
    first_token = (band + inner % height) * TOKENS
    first_row = inner // height * ROWS
    token = first_token + tl.arange(0, TOKENS)
    token_scales = x_scale + tl.minimum(token, M - 1) * xs_m
    weight_scales = w_scale + (first_row // DEPTH) * ws_n
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    blocks = tl.cdiv(K, DEPTH)
    if GROUPED:
        scale = tl.load(token_scales)
    for block in range(blocks):
        a = x.load([first_token, block * DEPTH])
        b = w.load([first_row, block * DEPTH]).T
        if GROUPED:
            after = tl.load(token_scales + tl.minimum(block + 1, blocks - 1) * xs_k)
            weight_scale = tl.load(weight_scales + block * ws_k)
            total += tl.dot(a, b) * (scale * weight_scale)[:, None]
            scale = after
        else:
            total += tl.dot(a, b)
    row = first_row + tl.arange(0, ROWS)
    if not GROUPED:
        total *= tl.load(token_scales)[:, None] * tl.load(w_scale + tl.minimum(row, N - 1) * ws_n)[None, :]
    out = y + token[:, None].to(tl.int64) * N + row[None, :]
    tl.store(out, total.to(y.dtype.element_ty), mask=(token < M)[:, None] & (row < N)[None, :])


Share = Vector | Decode | Prefill | fp8_prefill.Share
KINDS = {"vector": Vector, "decode": Decode, "prefill": Prefill}  # in tables


def choose(M: int, N: int, K: int) -> Vector | Decode | Prefill:
    """The shares that this device's table has, or those of `rule`, for any scales."""
    tabulated = launch.lookup("fp8_gemm", N, K, M)
    return KINDS[tabulated[0]](*tabulated[1:]) if tabulated else rule(M, N, K)


def choose_grouped(
    out: torch.Tensor, x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor
) -> Share:
    """`choose`, or for many tokens and grouped scales the shares of fp8_prefill's kernel."""
    if len(x) >= fp8_prefill.MANY and _check(x, x_scales, w, w_scales) and fp8_prefill.takes(out, x_scales):
        return fp8_prefill.rule(len(x), len(w))
    return choose(len(x), len(w), x.shape[-1])


def rule(M: int, N: int, K: int) -> Vector | Decode | Prefill:
    """The shares that were fastest, or near it, for DeepSeek-V2's shapes on an H200 of 132 multiprocessors."""
    if M <= 2:
        return fp8_vector.rule(N, K)
    if M <= 64:
        tokens = max(16, power_of_2(M))
        programs = cdiv(N, 64)
        if programs < 132 and K >= 2048:
            return Decode(64, tokens, 8 if tokens == 16 and K >= 4096 else 4, 4)
        return Decode(128 if programs >= 264 and tokens * K <= 32768 else 64, tokens, 1, 4)
    # 4 stages let two programs run on a multiprocessor, 3 stages three: better where all do not run at once anyway
    programs = cdiv(M, 64) * cdiv(N, 128)
    return Prefill(64, 128, 4 if programs <= 264 else 3)


def matmul(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """x [M, K] · w [N, K]ᵀ in float32, rounded once to `dtype` (bfloat16, float16 or float32) [M, N].

    x and w are float8_e4m3fn, contiguous and on the current device, and K is a multiple of 16. Scales are float32:
    x's [M, ⌈K/128⌉] in any strides with w's [⌈N/128⌉, ⌈K/128⌉]; or x's [M, 1], [1] or [] with w's [N, 1], [1] or [].
    Raises ValueError where shapes, dtypes or layouts are others.
    """
    out = torch.empty(x.shape[0], w.shape[0], dtype=dtype, device=x.device)
    return matmul_into(out, x, x_scales, w, w_scales, choose_grouped(out, x, x_scales, w, w_scales))


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    dtype: torch.dtype,
    granularity: str,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`matmul` of what quantize_activation makes of x: for a few tokens in one launch, unless by `scale`."""
    (M, K), N = x.shape, w.shape[0]
    share = choose(M, N, K)
    if isinstance(share, Vector) and 0 < M * K <= fp8_vector.MOST_FLOATS:
        reach = {"group128": K, "token": share.columns}.get(granularity, 0)  # columns that it can make codes of
        if reach >= K:
            return linear_into(torch.empty(M, N, dtype=dtype, device=x.device), x, w, w_scales, granularity, share)
    return matmul(*quantize_activation(x, granularity, scale), w, w_scales, dtype)


def linear_into(
    out: torch.Tensor, x: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, granularity: str, share: Vector
) -> torch.Tensor:
    """`linear` by 'group128' or 'token' with the share of programs given, which with 'token' must hold all columns.
    Writes to `out` [M, N] and returns it."""
    check_rows("x", x, (None, w.shape[1]))
    _check_codes("w", w)
    N, K = w.shape
    grouped = granularity == "group128"
    fitting = [(cdiv(N, BLOCK), cdiv(K, BLOCK))] if grouped else [(N, 1), (1,), ()]
    if w_scales.dtype != torch.float32 or tuple(w_scales.shape) not in fitting:
        raise ValueError(f"scales {w_scales.dtype}, {tuple(w_scales.shape)} of w [{N}, {K}] don't fit {granularity}")
    if not grouped and share.columns < K:
        raise ValueError(f"{share} holds {share.columns} columns of a token's {K}")
    fp8_vector.launch(out, x, None, w, w_scales, (0, 0, *_strides(w_scales)), grouped, share)
    return out


def matmul_into(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scales: torch.Tensor,
    w: torch.Tensor,
    w_scales: torch.Tensor,
    share: Share,
) -> torch.Tensor:
    """As `matmul`, with the shares of programs given; writes to `out` [M, N] and returns it."""
    grouped = _check(x, x_scales, w, w_scales)
    (M, K), N = x.shape, w.shape[0]
    if M == 0:
        return out
    strides = (*_strides(x_scales), *_strides(w_scales))
    if isinstance(share, Vector):
        fp8_vector.launch(out, x, x_scales, w, w_scales, strides, grouped, share)
        return out
    if isinstance(share, fp8_prefill.Share):
        if not grouped or not fp8_prefill.takes(out, x_scales):
            raise ValueError(f"{share} is for grouped scales, {tuple(x_scales.shape)}, on Hopper")
        fp8_prefill.matmul_into(out, x, x_scales, w, w_scales, share)
        return out
    if isinstance(share, Decode):
        sums = out if share.splits == 1 else out.new_empty(share.splits, M, N, dtype=torch.float32)
        _decode_kernel[(cdiv(N, share.rows), share.splits, cdiv(M, share.tokens))](
            x, x_scales, w, w_scales, sums, M, N, K, *strides, share.splits,
            GROUPED=grouped, WHOLE=K % BLOCK == 0, ROWS=share.rows, TOKENS=share.tokens,
            num_warps=share.rows // 16, num_stages=share.stages, enable_fp_fusion=True, launch_pdl=PDL,
        )  # fmt: skip
        if share.splits > 1:
            _reduce_kernel[(cdiv(M * N, REDUCED),)](
                sums, out, M * N, SPLITS=share.splits, ELEMENTS=REDUCED,
                num_warps=4, enable_fp_fusion=True, launch_pdl=PDL,
            )  # fmt: skip
        return out
    _prefill_kernel[(cdiv(M, share.tokens) * cdiv(N, share.rows),)](
        TensorDescriptor.from_tensor(x, [share.tokens, BLOCK]), x_scales,
        TensorDescriptor.from_tensor(w, [share.rows, BLOCK]), w_scales,
        out, M, N, K, *strides,
        GROUPED=grouped, TOKENS=share.tokens, ROWS=share.rows,
        num_warps=share.tokens // 16, num_stages=share.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _check(x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor) -> bool:
    """Whether scales are of groups and blocks. Raises ValueError."""
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or not w.shape[1] or not w.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} and w {tuple(w.shape)}: need [M, K] and [N, K]")
    (M, K), N = x.shape, w.shape[0]
    _check_codes("x", x)
    _check_codes("w", w)
    if x_scales.dtype != torch.float32 or w_scales.dtype != torch.float32:
        raise ValueError(f"scales are {x_scales.dtype} and {w_scales.dtype}; need float32")
    blocks = cdiv(K, BLOCK)
    given = tuple(x_scales.shape), tuple(w_scales.shape)
    if given == ((M, blocks), (cdiv(N, BLOCK), blocks)):
        return True
    if given[0] not in ((M, 1), (1,), ()) or given[1] not in ((N, 1), (1,), ()):
        raise ValueError(f"scales of shapes {given[0]} and {given[1]} fit no scheme of x [{M}, {K}] and w [{N}, {K}]")
    return False


def _check_codes(name: str, codes: torch.Tensor) -> None:
    whole = codes.shape[1] % 16 == 0 and codes.data_ptr() % 16 == 0
    if codes.dtype != torch.float8_e4m3fn or not codes.is_contiguous() or not whole:
        raise ValueError(f"{name} is {codes.dtype}, strides {codes.stride()}: need contiguous float8_e4m3fn, "
                         "aligned to 16 bytes, with K a multiple of 16")  # fmt: skip


def _strides(scales: torch.Tensor) -> tuple[int, int]:
    return (scales.stride(0), scales.stride(1)) if scales.ndim == 2 else (0, 0)
