"""Operands of FP8 products and awkward activations, and what is right for them."""

from __future__ import annotations

import torch

from dsv2quant.formats.e4m3 import expand_blocks
from dsv2quant.kernels.reference import quantize_activation

E4M3 = torch.float8_e4m3fn


def activations(*shape: int, device: str = "cpu") -> torch.Tensor:
    """float32, tokens of many sizes, with outliers, and an all-zero first token."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp2(torch.randint(-6, 4, (shape[0], 1), generator=generator))
    x = torch.randn(shape, generator=generator) * size
    x[:, :: max(shape[1] // 3, 1)] *= 20
    if shape[0] > 1:
        x[0] = 0
    return x.to(device)


def _ties() -> torch.Tensor:
    """All 254 finite values of e4m3 and the points between neighbours, of largest magnitude 448, so of scale 1."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes[(codes & 127) < 127].view(E4M3).float().sort().values
    return torch.cat([values, (values[1:] + values[:-1]) / 2])[None, :].expand(3, -1).contiguous()


EXTREMES = {
    "plain": activations(9, 300),
    "one column": activations(3, 1),
    "one token": activations(1, 128),
    "many groups": activations(2, 1040),
    "ties": torch.cat([part.contiguous() for part in _ties().split(128, 1)][:3], 1),
    "zeros": torch.tensor([[0.0, -0.0] * 100]),
    "tiny": activations(4, 200) * 2.0**-14,
    "subnormal": activations(4, 200) * 2.0**-126,
    "large": activations(4, 200).clamp(-100, 100) * 600,
}


def operands(
    M: int, N: int, K: int, scheme: str, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, its scales, w, its scales, of 'block', 'channel' or 'tensor' weights and the activations that go with them."""
    x, x_scales = quantize_activation(
        activations(M, K, device=device),
        {"block": "group128", "channel": "token", "tensor": "static"}[scheme],
        torch.tensor([0.02], device=device),
    )
    generator = torch.Generator().manual_seed(1)
    w = (torch.randn(N, K, generator=generator) * 60).clamp(-448, 448).to(device).to(E4M3)
    shape = {"block": (-(-N // 128), -(-K // 128)), "channel": (N, 1), "tensor": (1,)}[scheme]
    return x.contiguous(), x_scales, w, (torch.rand(shape, generator=generator) * 2e-4 + 1e-5).to(device)


def exact(
    x: torch.Tensor, x_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64: the product of the dequantized operands, and the bound of its error in float32 accumulation.

    Products of two e4m3 codes are exact in float32. What follows rounds: additions within 128 columns, the product of
    two scales, its product with the sum, additions over ⌈K/128⌉ sums and those of splits, a scale after them. Each is
    below 2^-24 of Σ |x w|; with n ≤ 128 + ⌈K/128⌉ + 8 of them the error is below n 2^-24 Σ |x w|. FP8 units keep fewer
    bits: see tests/gpu.
    """
    per_column = x_scales if x_scales.shape[-1] == 1 else x_scales.repeat_interleave(128, 1)[:, : x.shape[1]]
    left = x.double() * per_column.double()
    if w_scales.ndim == 2 and w_scales.shape != (w.shape[0], 1):
        right = w.double() * expand_blocks(w_scales, *w.shape).double()
    else:
        right = w.double() * w_scales.double()
    steps = 128 + -(-w.shape[1] // 128) + 8
    return left @ right.T, steps * 2.0**-24 * (left.abs() @ right.abs().T) + 1e-30
