"""Linear layers, the stages that a forward pass consists of, and feed-forward layers: gated FFNs, and the mixture of
routed and shared experts.

A part's `stages(x)` is its forward pass, written once: a generator that yields linear layers and what they are about to
be applied to, in data order, and returns the part's output. Evaluation finishes it, statistics look at every input, and
GPTQ replaces the weights of a stage: what follows uses the new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F

from dsv2quant.arch.spec import Router
from dsv2quant.kernels import reference


@dataclass
class Linear:
    """y = x Wᵀ + b. `weight` [out, in] is decoded; `activation` says how x is quantized first, as when served:
    'static' by `input_scale` (float32 [1]). `module` is its name in the checkpoint. `in_bf16` rounds x, W and y to
    BF16, whatever their dtype."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    activation: str | None = None
    input_scale: torch.Tensor | None = None
    module: str = ""
    in_bf16: bool = False

    def __call__(self, x: torch.Tensor | Served) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            x = Served(x)
        if self.activation is None and self.in_bf16:
            y = reference.linear(x.bf16(), self.weight, None).to(x.x.dtype)
            return y if self.bias is None else y + self.bias
        if self.activation is None:
            return reference.linear(x.x, self.weight, self.bias)
        return reference.served_linear(x.by(self), self.weight, self.bias, x.x.dtype)


class Served:
    """x [..., columns] that several linear layers are applied to: those that quantize it alike do so once. It may be
    some `rows` of a whole, [tokens, columns], that more layers share and quantize token by token."""

    def __init__(self, x: torch.Tensor, whole: Served | None = None, rows: torch.Tensor | None = None) -> None:
        self.x, self._whole, self._rows = x, whole, rows
        self._made: dict[tuple[str, float | None], torch.Tensor] = {}
        self._bf16: torch.Tensor | None = None

    def rows(self, rows: torch.Tensor) -> Served:
        """Some of x [tokens, columns]."""
        return Served(self.x[rows], self, rows)

    def bf16(self) -> torch.Tensor:
        """x in BF16."""
        if self._bf16 is None:
            self._bf16 = self.x.bfloat16()
        return self._bf16

    def by(self, linear: Linear) -> torch.Tensor:
        """What a layer that quantizes x multiplies with, in float32."""
        assert linear.activation is not None
        key = linear.activation, None if linear.input_scale is None else float(linear.input_scale)
        if key not in self._made:
            if self._whole is not None and linear.input_scale is None:
                self._made[key] = self._whole.by(linear)[self._rows]
            else:
                self._made[key] = reference.served_activation(self.x, linear.activation, linear.input_scale)
        return self._made[key]


class Stage(NamedTuple):
    """Linear layers that share the input x [..., columns]; of a routed expert, x are its tokens [n, columns], each
    weighted by `routed` [n]. Absorbed attention applies a `half` of kv_b_proj, by heads: x [batch, heads, new, ·].
    `beside` says that x does not depend on the linear layers of the stage before."""

    linears: tuple[Linear, ...]
    x: torch.Tensor
    routed: torch.Tensor | None = None
    half: Literal["k", "v"] | None = None
    beside: bool = False


T = TypeVar("T")
Stages = Generator[Stage, None, T]


def finish(stages: Stages[T], look: Callable[[Stage], object] = lambda stage: None) -> T:
    """What the stages return; `look` is called with each before it is computed."""
    try:
        while True:
            look(next(stages))
    except StopIteration as end:
        output: T = end.value
        return output


@dataclass
class RMSNorm:
    """x / rms(x) in float32, rounded to x's dtype, times the weight (`DeepseekV2RMSNorm`)."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


@dataclass
class FFN:
    """down(silu(gate(x)) · up(x))."""

    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    def stages(self, x: torch.Tensor | Served, routed: torch.Tensor | None = None) -> Stages[torch.Tensor]:
        """x [..., hidden] → the same shape; `routed` [tokens] only goes into what is yielded."""
        served = Served(x) if isinstance(x, torch.Tensor) else x
        yield Stage((self.gate_proj, self.up_proj), served.x, routed)
        h = F.silu(self.gate_proj(served)) * self.up_proj(served)
        yield Stage((self.down_proj,), h, routed)
        return self.down_proj(h)


def route(
    x: torch.Tensor, router: torch.Tensor, routing: Router, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights float32, experts), both [tokens, k], of x [tokens, hidden]; `router` is [experts, hidden], and its
    correction bias float32 [experts]."""
    return reference.route(F.linear(x.float(), router.float()), routing, bias)


def dispatch(
    weights: torch.Tensor, chosen: torch.Tensor, experts: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, its tokens [n], their weights [n]) of each expert that has any, of weights and experts [tokens, k]."""
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=experts).tolist()
    for expert, pairs in enumerate(order.split(counts)):
        if pairs.numel():
            yield expert, pairs // chosen.shape[1], weights.flatten()[pairs]


def add_rows(out: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """out[rows] += values for distinct rows: on the CPU many times faster than `index_add_`, which allows for any."""
    out.index_copy_(0, rows, out.index_select(0, rows).add_(values))


@dataclass
class MoE:
    """Routed experts, each token weighted over its top k, plus the shared ones. `router` is float32 [experts,
    hidden], `router_bias` its correction bias, float32 [experts], if it has one."""

    routing: Router
    router: Linear
    router_bias: torch.Tensor | None
    experts: list[FFN]
    shared: FFN | None

    def stages(self, x: torch.Tensor) -> Stages[tuple[torch.Tensor, torch.Tensor]]:
        """x [..., hidden] → (output of that shape, chosen experts [tokens, k])."""
        out, chosen = yield from self.routed(x)
        if self.shared is not None:
            out = out + (yield from self.shared.stages(x))
        return out, chosen

    def routed(self, x: torch.Tensor) -> Stages[tuple[torch.Tensor, torch.Tensor]]:
        """The same of the routed experts alone."""
        tokens = x.flatten(0, -2)
        yield Stage((self.router,), tokens)
        weights, chosen = route(tokens, self.router.weight, self.routing, self.router_bias)
        out, served = torch.zeros_like(tokens, dtype=torch.float32), Served(tokens)
        for expert, rows, routed in dispatch(weights, chosen, len(self.experts)):
            made = yield from self.experts[expert].stages(served.rows(rows), routed)
            add_rows(out, rows, made.float() * routed[:, None])
        return out.to(x.dtype).view_as(x), chosen
