"""Quantized weights in float32, from the tensors that vLLM holds them in."""

from __future__ import annotations

import torch

NIBBLES = torch.arange(0, 32, 4, dtype=torch.int32)  # the bit that each of an int32's eight codes begins at
AWQ_NIBBLES = NIBBLES[[0, 4, 1, 5, 2, 6, 3, 7]]  # AWQ interleaves even codes and odd ones
MIDDLE = 8  # the code of zero, where no zero points are stored
BLOCK = 128


def codes(packed: torch.Tensor, dim: int, bits: torch.Tensor = NIBBLES) -> torch.Tensor:
    """Codes of 0 to 15 in float32, eight of an int32 along `dim`."""
    apart = (packed.movedim(dim, -1).unsqueeze(-1) >> bits) & 15
    return apart.flatten(-2).movedim(-1, dim).float()


def grouped(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | float = MIDDLE) -> torch.Tensor:
    """Weights […, out, in] of codes [… out, in], with scales and zero points [… out, groups]."""
    groups = codes.unflatten(-1, (scales.shape[-1], -1))
    middle = zeros.unsqueeze(-1) if isinstance(zeros, torch.Tensor) else zeros
    return ((groups - middle) * scales.float().unsqueeze(-1)).flatten(-2)


def awq(packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Weights [… out, in] of AWQ's [… in, out/8], with scales [… groups, out] and zero points [… groups, out/8]."""
    weights, middle = (codes(x, -1, AWQ_NIBBLES).transpose(-2, -1) for x in (packed, zeros))
    return grouped(weights, scales.transpose(-2, -1), middle)


def scaled(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Weights […, out, in] with a scale for each matrix, row ([…, out, 1]) or block ([…, rows of blocks, columns of
    blocks]), of 128 or what vLLM refined that to."""
    scale = scale.float()
    if scale.ndim < weight.ndim:
        scale = scale.reshape(*scale.shape, *[1] * (weight.ndim - scale.ndim))
    elif scale.shape[-2:] not in ((weight.shape[-2], 1), (1, 1)):
        for dim in (-2, -1):
            length, count = weight.shape[dim], scale.shape[dim]
            size = BLOCK if -(-length // BLOCK) == count else length // count
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, length)
    return weight.float() * scale
