"""GGUF blocks of any bytes for the kernels' tests: whatever a file may hold, in scales of usual sizes."""

from __future__ import annotations

import torch

from dsv2quant.kernels.gguf_layout import SPECS, GgufWeight, from_blocks


def random_blocks(name: str, shape: tuple[int, ...], device: str = "cpu", seed: int = 0) -> torch.Tensor:
    """uint8 [..., bytes of a row] of a matrix or stack [..., columns]: any bits but for float16 scales, ±0.5 … ±2."""
    spec, make = SPECS[name], torch.Generator(device).manual_seed(seed)
    *rows, columns = shape
    blocks = torch.randint(
        0, 256, (*rows, columns // spec.values, spec.bytes), dtype=torch.uint8, device=device, generator=make
    )
    for at in spec.halves:
        size = torch.rand(blocks.shape[:-1], device=device, generator=make).mul(2).sub(1).exp2()
        sign = torch.rand(blocks.shape[:-1], device=device, generator=make).sub(0.3).sign()
        blocks[..., at : at + 2] = (size * sign).half().unsqueeze(-1).view(torch.uint8)
    return blocks.flatten(-2)


def random_weight(name: str, shape: tuple[int, ...], device: str = "cpu", seed: int = 0) -> GgufWeight:
    return from_blocks(name, random_blocks(name, shape, device, seed), shape[-1])


def random_choices(tokens: int, k: int, experts: int, device: str = "cpu") -> torch.Tensor:
    """int64 [tokens, k], different ones for a token, some experts more often."""
    make = torch.Generator(device).manual_seed(tokens)
    liked = torch.rand(experts, device=device, generator=make).pow(2).add(0.02)
    return torch.multinomial(liked.expand(tokens, -1), k, generator=make)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative Frobenius error; NaN where anything is."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
