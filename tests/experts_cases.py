"""Stacks of random FP8 experts, and what they are given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fp8_cases import E4M3, activations
from routing_cases import choices

from dsv2quant.kernels.fp8_layout import Fp8Experts

GRANULARITIES = {"block": "group128", "channel": "token", "tensor": "static"}
STATIC = (0.02, 0.3)  # scales of gate_up's and down's activations


class Layer(NamedTuple):
    tokens: int
    k: int
    experts: int
    intermediate: int
    hidden: int


class Given(NamedTuple):
    x: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor
    stack: Fp8Experts
    granularity: str
    input_scales: tuple[torch.Tensor, torch.Tensor] | None


def _matrices(scheme: str, device: str, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., rows, columns] and scales of such a size that products of inputs of size 1 have about that."""
    generator = torch.Generator(device).manual_seed(len(shape))
    codes = (torch.randn(shape, generator=generator, device=device) * 60).clamp_(-448, 448).to(E4M3)
    *leading, rows, columns = shape
    scaled = {"block": (-(-rows // 128), -(-columns // 128)), "channel": (rows, 1), "tensor": (1, 1)}[scheme]
    scales = torch.rand((*leading, *scaled), generator=generator, device=device)
    return codes, (scales + 0.5) / (60 * columns**0.5)


def given(layer: Layer, scheme: str, device: str, dtype: torch.dtype) -> Given:
    tokens, k, experts, intermediate, hidden = layer
    gate_up = _matrices(scheme, device, experts, 2, intermediate, hidden)
    stack = Fp8Experts(*gate_up, *_matrices(scheme, device, experts, hidden, intermediate))
    weights = torch.rand(tokens, k, generator=torch.Generator().manual_seed(2)).to(device)
    scales = tuple(torch.tensor([scale], device=device) for scale in STATIC) if scheme == "tensor" else None
    x = activations(tokens, hidden, device=device).to(dtype)
    return Given(x, weights, choices(tokens, k, experts, device), stack, GRANULARITIES[scheme], scales)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius error; NaN where a result is."""
    return float((got.double() - want.double()).norm() / want.double().norm())
