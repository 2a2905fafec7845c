"""Torch references of GPTQ's kernels, on any device and in any dtype. They define what is right."""

from __future__ import annotations

import torch

from dsv2quant.formats.integers import factors, levels


def quantize_block(
    w: torch.Tensor,
    scales: torch.Tensor,
    group: torch.Tensor,
    u: torch.Tensor,
    codes: torch.Tensor,
    begin: int,
    bits: int,
) -> torch.Tensor:
    """n columns of w [batch, R, K] from `begin` rounded one after the other, each one's error passed on to those
    behind it.

    scales [batch, R, groups], in w's dtype, and group int64 [batch, K] of each column; u [batch, n, n], these columns'
    part of `Factor.u` (calib/gptq.py), of which the upper triangle counts. Fills these columns of codes [batch, R, K],
    int8, of so many bits; returns the errors, [batch, R, n] in w's dtype, each over its column's diagonal of u: times
    the rest of `Factor.u` they are what is taken from the columns behind these. w is left as it is.
    """
    (low, high), columns = levels(bits), slice(begin, begin + u.shape[1])
    w = w[:, :, columns].clone()
    step = scales.gather(2, group[:, None, columns].expand(w.shape))
    errors = torch.empty_like(w)
    for j in range(w.shape[2]):
        column, scale = w[:, :, j], step[:, :, j]
        code = (column / scale).round_().clamp_(low, high)
        codes[:, :, begin + j] = code
        errors[:, :, j] = (column - code * scale) / u[:, j, j, None]
        w[:, :, j + 1 :] -= errors[:, :, j, None] * u[:, None, j, j + 1 :]
    return errors


def search_scales(weight: torch.Tensor, importance: torch.Tensor, group: int, bits: int) -> torch.Tensor:
    """The BF16 scale of each group of columns with the least Σ importance · (code × scale − weight)², of `factors`; the
    first of equals.

    weight [batch, R, K] and importance [batch, K], float32 → float32 [batch, R, K / group].
    """
    w = weight.unflatten(2, (-1, group))
    weights = importance.unflatten(1, (-1, group))[:, None]
    low, high = levels(bits)
    unit = w.abs().amax(-1, keepdim=True) / torch.full((), float(high), device=weight.device)

    def scaled(factor: float) -> torch.Tensor:
        found = (unit * factor).bfloat16().float()
        return torch.where(found != 0, found, 1.0)

    best, least = scaled(float(factors(bits)[0])), torch.full_like(unit, float("inf"))
    for value in factors(bits):
        candidate = scaled(float(value))
        error = (
            ((w / candidate).round_().clamp_(low, high) * candidate - w).square_().mul_(weights).sum(-1, keepdim=True)
        )
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best.squeeze(-1)
