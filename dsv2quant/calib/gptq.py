"""GPTQ for a batch of matrices: codes that make up, column by column, for the rounding of the columns before.

For inputs x of the quantized model and x̂ of the unquantized one, a matrix W is first refitted to give on x what W gave
on x̂ (GPTAQ, arXiv:2504.02692, in closed form), and the result is rounded with GPTQ (arXiv:2210.17323):

    H = Σ w x xᵀ     S = Σ w (x̂ − x) xᵀ     W' = W + τ W S (H + λI)⁻¹

of K columns on m tokens, with λ = (0.05 + K / m) of the mean of diag H, and τ = m / (m + 4K): both H and S are sums
over few tokens where m is not many times K, and say less of other tokens than they seem to (on dsv2-mini with 1,024
tokens this took the divergence from 0.139 to 0.099, with 65,536 from 0.076 to 0.075).
Groups are those of the unpermuted columns ("static"), so that no index is stored; columns are visited in order of
falling diag H; scales are searched with diag H as weights. No column is ever zeroed: where H knows nothing, damping
leaves plain rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from dsv2quant.formats import gptq as loop
from dsv2quant.formats.cpu import search_scales
from dsv2quant.formats.integers import levels
from dsv2quant.kernels.reference import multiplies_bf16

DAMPING = 0.05  # λ as a share of the mean of diag H, beside K / m
DOUBT = 4  # τ trusts a refit by half where there are so many tokens per column
BLOCK = 64  # columns whose updates of the rest are gathered into one product
NEAR = 2048  # tokens that a core multiplies from its cache
WORTH = 1024  # rows that take longer than it takes to wake a thread for them, block after block
SEARCHED = 64  # rows whose scales a thread searches at a time


@dataclass
class Moments:
    """Second moments of a batch of linears' inputs: H and S, [batch, K, K], and token counts [batch]."""

    h: torch.Tensor
    s: torch.Tensor
    count: torch.Tensor

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """All there is, in order."""
        return self.h, self.s, self.count

    @classmethod
    def zeros(cls, batch: int, columns: int, device: torch.device | str) -> Moments:
        h, s = (torch.zeros(batch, columns, columns, device=device) for _ in range(2))
        return cls(h, s, torch.zeros(batch, device=device))

    def add(self, which: int, x: torch.Tensor, ideal: torch.Tensor, weight: torch.Tensor | None = None) -> None:
        """Tokens of matrix `which`: inputs x [tokens, K], what they would be unquantized, and weights [tokens]."""
        h, s = self.h[which], self.s[which]
        near = NEAR if h.is_cpu else max(1, len(x))
        shares = itertools.repeat(None) if weight is None else weight[:, None].split(near)
        for some, wanted, share in zip(x.split(near), ideal.split(near), shares, strict=False):
            off, weighted = wanted - some, some if share is None else some * share
            if h.is_cpu:
                _add_symmetric(h, some, weighted)
                # Rounding H could cost it its definiteness; S has none to lose.
                s.add_(off.bfloat16().T @ weighted.bfloat16() if multiplies_bf16() else off.T @ weighted)
            else:
                h.addmm_(some.T, weighted)
                s.addmm_(off.T, weighted)
        self.count[which] += len(x)

    def shrunk(self, prior: Moments) -> Moments:
        """Moments per token, drawn toward `prior` (batch of 1, or the same batch) as if by K of its tokens.

        The prior is scaled to the same trace, since it may carry other weights. Without any token, it is all there is.
        """
        columns = self.h.shape[1]
        share = (self.count / (self.count + columns))[:, None, None]
        own, other = (_trace(m.h).clamp(min=torch.finfo(torch.float32).tiny) for m in (self, prior))
        per_token = 1 / self.count.clamp(min=1)[:, None, None]
        matched = torch.where(_trace(prior.h) > 0, own * per_token / other, 0.0)  # an empty prior adds nothing
        scale = torch.where(self.count[:, None, None] > 0, matched, 1 / prior.count[:, None, None])
        h = share * self.h * per_token + (1 - share) * prior.h * scale
        s = share * self.s * per_token + (1 - share) * prior.s * scale
        return Moments(h, s, self.count)

    @property
    def damping(self) -> torch.Tensor:
        """λ / mean diag H for each matrix: [batch], float64."""
        return DAMPING + self.h.shape[1] / self.count.double().clamp(min=1)


class Sums(NamedTuple):
    """Moments of all tokens, and of those held out among them."""

    every: Moments
    held: Moments

    @classmethod
    def zeros(cls, batch: int, columns: int, device: torch.device | str) -> Sums:
        return cls(Moments.zeros(batch, columns, device), Moments.zeros(batch, columns, device))

    def add(
        self, which: int, held: torch.Tensor, x: torch.Tensor, ideal: torch.Tensor, weight: torch.Tensor | None = None
    ) -> None:
        """`Moments.add`; `held` [tokens] is true for those held out."""
        self.every.add(which, x, ideal, weight)
        rows = held.nonzero().squeeze(1)
        if len(rows):
            self.held.add(which, x[rows], ideal[rows], None if weight is None else weight[rows])

    @classmethod
    def of(cls, parts: Sequence[torch.Tensor]) -> Sums:
        """Of the `parts` of both."""
        return cls(Moments(*parts[:3]), Moments(*parts[3:]))

    def split(self) -> Split:
        """What is not held out, and what is."""
        fit = (every - held for every, held in zip(self.every.parts, self.held.parts, strict=True))
        return Split(Moments(*fit), self.held)


class Split(NamedTuple):
    """Moments of the tokens to fit on, and of those held out."""

    fit: Moments
    held: Moments

    def shrunk(self, prior: Split) -> Split:
        """`Moments.shrunk`, each part toward its own; toward `fit` where nothing of the prior is held out."""
        held = prior.held if prior.held.count.all() else prior.fit
        return Split(self.fit.shrunk(prior.fit), self.held.shrunk(held))


def _add_symmetric(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """total [K, K] += xᵀ y, which is symmetric, of x and y [tokens, K]: what is above the diagonal computed alone."""
    for begin in range(0, total.shape[0], BLOCK):
        end = begin + BLOCK
        rows = x[:, begin:end].T @ y[:, begin:]
        total[begin:end, begin:] += rows
        total[end:, begin:end] += rows[:, BLOCK:].T


def _trace(h: torch.Tensor) -> torch.Tensor:
    return h.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


@dataclass(frozen=True)
class Factor:
    """(H + λI)⁻¹ = Uᵀ U of permuted columns: upper triangular [batch, K, K] in H's dtype, their order [batch, K]."""

    u: torch.Tensor
    order: torch.Tensor

    def solve(self, x: torch.Tensor) -> torch.Tensor:
        """x (H + λI)⁻¹ for x [batch, R, K] in the columns' own order."""
        y = _columns(x, self.order) @ self.u.mT @ self.u
        return _columns(y, self.order.argsort(-1))


def factor(h: torch.Tensor, damping: torch.Tensor | float = DAMPING) -> Factor:
    """Factor H [batch, K, K], in float64, with λ / mean diag H ([batch], or for all). Damping grows tenfold until every
    matrix is positive definite.

    Raises ValueError where H is not finite: no damping would end that.
    """
    if not h.isfinite().all():
        raise ValueError("second moments are not finite")
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    order = torch.argsort(diagonal, dim=-1, descending=True, stable=True)
    permuted = _columns(_columns(h, order).mT, order).double()
    level = diagonal.double().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)
    eye = torch.eye(h.shape[1], dtype=torch.float64, device=h.device)
    while True:
        # H = V Vᵀ with V upper triangular, from the Cholesky factor of H read backwards; then U = V⁻¹.
        damped = permuted + (damping * level)[:, None, None] * eye
        lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
        if not failed.any():
            upper = lower.flip(1, 2)
            return Factor(torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True).to(h.dtype), order)
        damping = 10 * damping


def fit(weight: torch.Tensor, moments: Moments, factored: Factor) -> torch.Tensor:
    """W' of the module's docstring, [batch, R, K]."""
    count = moments.count.to(weight.dtype)[:, None, None]
    return weight + count / (count + DOUBT * weight.shape[2]) * factored.solve(weight @ moments.s)


def quantize(weight: torch.Tensor, scales: torch.Tensor, factored: Factor, bits: int = 4) -> torch.Tensor:
    """Codes, int8 [batch, R, K], of weights [batch, R, K] under scales [batch, R, groups], computed in the weights'
    dtype: on a CUDA device, float32."""
    columns = weight.shape[2]
    w, scales = _columns(weight, factored.order), scales.to(weight.dtype).contiguous()
    group = factored.order // (columns // scales.shape[2])  # [batch, K]: of each permuted column
    codes = torch.empty_like(w, dtype=torch.int8)
    with _mapping(w.shape[0] * w.shape[1]) as each:
        for begin in range(0, columns, BLOCK):
            end = min(begin + BLOCK, columns)
            u = factored.u[:, begin:end, begin:]  # [batch, block, rest]
            within = u[:, :, : end - begin].contiguous()
            errors = _quantize_block(w, scales, group, within, codes, begin, bits, each)
            w[:, :, end:] -= errors @ u[:, :, end - begin :]
    return _columns(codes, factored.order.argsort(-1))


@contextmanager
def _mapping(rows: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """`map` by as many threads as torch has here and so many rows are worth; by the caller's where that is one."""
    threads = min(torch.get_num_threads(), rows // WORTH)
    if threads < 2:
        yield map
        return
    with ThreadPoolExecutor(threads) as pool:
        yield pool.map


def _quantize_block(
    w: torch.Tensor,
    scales: torch.Tensor,
    group: torch.Tensor,
    u: torch.Tensor,
    codes: torch.Tensor,
    begin: int,
    bits: int,
    each: Callable[..., Iterable[Any]],
) -> torch.Tensor:
    """`reference_gptq.quantize_block` of contiguous tensors, compiled; on a CPU `each` tile as `map` does."""
    if not w.is_cpu:
        from dsv2quant.kernels.gptq import quantize_block

        return quantize_block(w, scales, group, u, codes, begin, bits)
    errors = w.new_empty(*w.shape[:2], u.shape[1])
    arrays = [x.numpy() for x in (w, scales, group, u, codes, errors)]
    limits = [arrays[0].dtype.type(level) for level in levels(bits)]
    tiles, parts = loop.tiles(*w.shape[:2]), torch.get_num_threads()
    ends = [tiles * i // parts for i in range(parts + 1)]
    list(each(lambda first, last: loop.quantize_block(*arrays, begin, *limits, first, last), ends, ends[1:]))
    return errors


def best_scales(weight: torch.Tensor, importance: torch.Tensor, group: int, bits: int = 4) -> torch.Tensor:
    """The BF16 scale of each group with the least error weighted by importance [batch, K]: `cpu.search_scales`, on a
    CUDA device `kernels.gptq.search_scales`."""
    weight, importance = weight.float().contiguous(), importance.float().contiguous()
    if not weight.is_cpu:
        from dsv2quant.kernels.gptq import search_scales as search_on_device

        return search_on_device(weight, importance, group, bits)
    parts = [
        (rows, one[None]) for matrix, one in zip(weight, importance, strict=True) for rows in matrix.split(SEARCHED)
    ]
    with _mapping(len(weight) * weight.shape[1]) as each:
        found = each(lambda part: search_scales(part[0].numpy(), part[1].numpy(), group, bits), parts)
        return torch.from_numpy(np.concatenate(list(found))).unflatten(0, weight.shape[:2])


def nearest(weight: torch.Tensor, scales: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """int8 codes nearest to weight / scale; weight [..., K], scales [..., groups]."""
    groups = weight.unflatten(-1, (scales.shape[-1], -1))
    return (groups / scales.unsqueeze(-1)).round_().clamp_(*levels(bits)).flatten(-2).to(torch.int8)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """codes [..., K] × scales [..., groups], float32."""
    return (codes.float().unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)


def output_error(weight: torch.Tensor, quantized: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Σ w ‖W x̂ − Q x‖², up to what does not depend on Q: [batch], of W and Q [batch, R, K]."""
    off = weight - quantized
    return _sum((off @ moments.h + 2 * (weight @ moments.s)) * off)


def relative_error(weight: torch.Tensor, quantized: torch.Tensor, moments: Moments) -> torch.Tensor:
    """‖(W − Q) x‖² / ‖W x‖² over the moments' tokens: [batch], of W and Q [batch, R, K]."""
    off = weight - quantized
    return _sum((off @ moments.h) * off) / _sum((weight @ moments.h) * weight).clamp(min=1e-300)


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Σ over [batch, R, K], float64 [batch]: row by row, which has the same bits by any number of threads."""
    return x.sum(2, dtype=torch.float64).sum(1)


def _columns(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """x [batch, R, K] with its columns in `order` [batch, K]."""
    return x.gather(2, order[:, None].expand(x.shape))
