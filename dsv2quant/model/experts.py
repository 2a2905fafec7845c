"""A layer's routed experts as one stack, for the kernels' runtime.

Every stack takes x of T tokens with the weights (float32) and experts (int32), [T, k], that its router chose and their
routes, and gives weighted outputs, float32 [T, n, hidden], of which the sum over n is the layer's. It is wide if tiles
of 128 pairs are good for it as soon as experts have as many (routing.choose_block).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from dsv2quant.checkpoint.weights import BLOCKS
from dsv2quant.formats.fp8 import INPUT_SCALE
from dsv2quant.formats.schemes import CODECS
from dsv2quant.kernels import fp8_experts_prefill, int4_layout, int4_prefill, ops, reference
from dsv2quant.kernels.activations import Normed
from dsv2quant.kernels.fp8_layout import Fp8Experts
from dsv2quant.kernels.gguf_layout import GgufWeight, from_blocks
from dsv2quant.kernels.int4_layout import Int4Experts
from dsv2quant.kernels.routing import Routes
from dsv2quant.model.quantized import (
    FP8_UNIT,
    Quantization,
    Source,
    columns_of,
    dequantized,
    fp8_scales,
    int4_weight,
    rounded,
    unsupported,
)

NAMES = ("gate_proj", "up_proj", "down_proj")
PLAIN_UNIT = 8  # columns of plain weights: grouped products take rows of whole 16 bytes


@dataclass
class PlainStack:
    """Plain weights [experts, 2 · width, hidden] and [experts, hidden, width], by the vendor's grouped product; inputs
    are rounded to what `activation` makes of them."""

    gate_up: torch.Tensor
    down: torch.Tensor
    activation: str | None = None
    quantization: ClassVar[Quantization] = Quantization()
    wide: ClassVar[bool] = False

    def __call__(self, x: Normed, weights: torch.Tensor, chosen: torch.Tensor, routes: Routes) -> torch.Tensor:
        pairs = routes.pairs.long()
        every = torch.arange(len(self.down), device=pairs.device)
        ends = (chosen.flatten().unsqueeze(1) == every).sum(0).cumsum(0).to(torch.int32)
        normed = rounded(x.normed, self.activation)
        gate_up = F.grouped_mm(normed[pairs // chosen.shape[1]], self.gate_up.mT, offs=ends)
        h = rounded(ops.silu_mul(*gate_up.chunk(2, 1)), self.activation)
        out = F.grouped_mm(h, self.down.mT, offs=ends).float() * weights.flatten()[pairs, None]
        return torch.empty_like(out).index_copy_(0, pairs, out).unflatten(0, chosen.shape)


@dataclass
class Fp8Stack:
    """e4m3 weights. `inputs`, of static schemes, are the scales of each expert's inputs, float32 [experts], of gate and
    up and of down."""

    weights: Fp8Experts
    quantization: Quantization
    inputs: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def wide(self) -> bool:
        return self.quantization.granularity == "group128" and fp8_experts_prefill.fits(self.weights)

    def __call__(self, x: Normed, weights: torch.Tensor, chosen: torch.Tensor, routes: Routes) -> torch.Tensor:
        granularity = self.quantization.granularity
        if self.inputs is not None:
            return self._static(x.normed, weights, chosen, routes, *self.inputs)
        assert granularity is not None
        codes, scales = x.codes, x.scales
        if codes is None or scales is None:
            codes, scales = ops.quantize_activation(x.normed, granularity)
        return ops.fp8_experts_of_codes(codes, scales, weights, routes, self.weights, granularity, x.normed.dtype)

    def _static(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, routes: Routes,
        of_x: torch.Tensor, of_h: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Every pair is quantized by its expert's scale: to the kernels, a token's own."""
        experts = chosen.flatten()
        of_pairs = x.repeat_interleave(chosen.shape[1], 0)
        codes, scales = reference.quantize_activation(of_pairs, "static", of_x[experts].unsqueeze(1))
        h = ops.fp8_gate_up(codes, scales, routes, 1, self.weights, x.dtype)
        h_codes, h_scales = reference.quantize_activation(h, "static", of_h[experts].unsqueeze(1))
        return ops.fp8_down(h_codes, h_scales, weights, routes, self.weights)


@dataclass
class Int4Stack:
    weights: Int4Experts
    quantization: ClassVar[Quantization] = Quantization()

    @property
    def wide(self) -> bool:
        return int4_prefill.fits(self.weights)

    def __call__(self, x: Normed, weights: torch.Tensor, chosen: torch.Tensor, routes: Routes) -> torch.Tensor:
        return ops.int4_experts_of(x.normed, weights, routes, self.weights)


@dataclass
class GgufStack:
    """Blocks of a type for each of gate, up and down."""

    gate: GgufWeight
    up: GgufWeight
    down: GgufWeight
    quantization: ClassVar[Quantization] = Quantization()
    wide: ClassVar[bool] = False

    def __call__(self, x: Normed, weights: torch.Tensor, chosen: torch.Tensor, routes: Routes) -> torch.Tensor:
        k = chosen.shape[1]
        gate, up = (ops.gguf_product(x.normed, routes, k, part) for part in (self.gate, self.up))
        h = ops.silu_mul(gate, up)
        return ops.gguf_product(h, routes, 1, self.down, weights).unflatten(0, chosen.shape)


Stack = PlainStack | Fp8Stack | Int4Stack | GgufStack


def load_experts(source: Source, at: str) -> Stack:
    """The stack of the experts at '<at>.<expert>', filled one by one. Raises UsageError where no kernel takes them, as
    where their schemes differ, and InputError where a weight's parts contradict each other."""
    c = source.config
    schemes = {source.scheme(f"{at}.{e}.{name}") for e in range(c.n_routed_experts) for name in NAMES}
    if not schemes & CODECS.keys():
        gate, up, down = (_gguf(source, at, name) for name in NAMES)
        return GgufStack(gate, up, down)
    if len(schemes) > 1:
        raise unsupported(source, f"{at} is of {', '.join(sorted(schemes))}")
    (scheme,) = schemes
    return LOADERS.get(CODECS[scheme].runtime, _plain)(source, at, scheme)


def _check_widths(source: Source, at: str, scheme: str, unit: int) -> None:
    """Raise UsageError where the experts' widths are no multiples of so many columns."""
    c = source.config
    if c.hidden_size % unit or c.moe_intermediate_size % unit:
        what = f"{at} is {scheme} of widths {c.hidden_size} and {c.moe_intermediate_size}, no multiples of {unit}"
        raise unsupported(source, what)


def _plain(source: Source, at: str, scheme: str) -> PlainStack:
    _check_widths(source, at, scheme, PLAIN_UNIT)
    c = source.config
    E, H, I = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size  # noqa: E741
    gate_up = torch.empty(E, 2, I, H, dtype=source.dtype, device=source.device)
    down = torch.empty(E, H, I, dtype=source.dtype, device=source.device)
    for expert in range(E):
        for target, name in zip((gate_up[expert, 0], gate_up[expert, 1], down[expert]), NAMES, strict=True):
            target.copy_(dequantized(source, f"{at}.{expert}.{name}"))
    return PlainStack(gate_up.flatten(1, 2), down, source.activation(scheme))


def _fp8(source: Source, at: str, scheme: str) -> Stack:
    granularity = source.activation(scheme)
    if granularity is None:  # no unit multiplies FP8 weights with BF16
        return _plain(source, at, scheme)
    _check_widths(source, at, scheme, FP8_UNIT)
    c = source.config
    E, H, I = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size  # noqa: E741

    def scales(*shape: int) -> torch.Tensor:
        _, of, *_ = CODECS[scheme].layout(shape[-2:])
        rows, blocks = of.shape if len(of.shape) == 2 else (1, 1)
        return torch.empty(*shape[:-2], rows, blocks, dtype=torch.float32, device=source.device)

    def codes(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float8_e4m3fn, device=source.device)

    made = Fp8Experts(codes(E, 2, I, H), scales(E, 2, I, H), codes(E, H, I), scales(E, H, I))
    inputs = torch.ones(E, 3, device=source.device)
    for expert in range(E):
        places = ((made.gate_up, made.gate_up_scales, (expert, 0)), (made.gate_up, made.gate_up_scales, (expert, 1)),
                  (made.down, made.down_scales, (expert,)))  # fmt: skip
        for i, ((target, of_target, where), name) in enumerate(zip(places, NAMES, strict=True)):
            parts = source.stored(f"{at}.{expert}.{name}")[1]
            target[where].view(torch.uint8).copy_(parts["weight"].view(torch.uint8))
            of_target[where].copy_(fp8_scales(parts).view_as(of_target[where]))
            if INPUT_SCALE in parts:
                inputs[expert, i] = parts[INPUT_SCALE].float().reshape(())
    if granularity != "static":
        return Fp8Stack(made, Quantization(granularity))
    gate, up, down = inputs.unbind(1)
    if not torch.equal(gate, up):
        raise unsupported(source, f"{at} has other input scales in up_proj than in gate_proj")
    return Fp8Stack(made, Quantization(), (gate.contiguous(), down.contiguous()))


def _gguf(source: Source, at: str, name: str) -> GgufWeight:
    found = [source.stored(f"{at}.{expert}.{name}") for expert in range(source.config.n_routed_experts)]
    scheme = found[0][0]
    blocks = torch.stack([parts[BLOCKS] for _, parts in found])
    return from_blocks(scheme.upper(), blocks, columns_of(scheme, blocks))


def _int4(source: Source, at: str, scheme: str) -> Int4Stack:
    c, integers = source.config, CODECS[scheme].integers
    assert integers is not None
    stack = None
    for expert in range(c.n_routed_experts):
        stored = {f"{at}.{expert}.{name}": source.stored(f"{at}.{expert}.{name}")[1] for name in NAMES}
        weights = [int4_weight(source, module, scheme, parts) for module, parts in stored.items()]
        if stack is None:
            half = any(part.dtype == torch.float16 for parts in stored.values() for part in parts.values())
            stack = int4_layout.empty(
                c.n_routed_experts, c.hidden_size, c.moe_intermediate_size, integers.group_size,
                torch.float16 if half else torch.bfloat16, device=source.device,
            )  # fmt: skip
        if stack.down.zeros is None and any(w.zeros is not None for w in weights):
            stack = int4_layout.with_zeros(stack)
        try:
            int4_layout.fill(stack, expert, *weights)
        except ValueError as error:
            raise unsupported(source, f"{at}.{expert}: {error}") from None
    assert stack is not None
    return Int4Stack(stack)


# By `Codec.runtime`; what is not there is decoded.
LOADERS: dict[str, Callable[[Source, str, str], Stack]] = {
    "fp8": _fp8, **dict.fromkeys(("int4", "int3", "int2", "gptq", "awq"), _int4),
}  # fmt: skip
