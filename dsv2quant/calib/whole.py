"""A quantized model that is trained: how far its distributions are from the unquantized model's, and what each of its
weights learns of that.

Weights are held as `Trained` has them. A layer's are expanded while it computes, and once more, layer after layer from
the last to the first, for their gradients, which are used at once: one layer is there in float32 at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from dsv2quant.arch.spec import TensorSpec
from dsv2quant.calib.layer import copied, every_linear
from dsv2quant.calib.trained import Trained
from dsv2quant.model.layers import RMSNorm
from dsv2quant.model.load import DecoderLayer, Ends, Loader

ROWS = 2048  # tokens whose distributions over the vocabulary are there at once

Put = Callable[[torch.Tensor], object]
# A weight of the artifact as what is trained of it, or as its values; `put` gives the model values.
Held = Callable[[TensorSpec, Put, torch.device], Trained | torch.Tensor]


@dataclass(frozen=True)
class Behind:
    """What is before and behind the layers, of the quantized model and of the unquantized one, and what is trained."""

    ends: Ends
    ideal: Ends
    trained: list[Trained]

    def divergence(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """KL(unquantized ‖ quantized) in nats, the sum over rows [n, hidden] of both models' last hidden states."""
        parts = [self.rows_divergence(*pair) for pair in _split(x, hidden)]
        return torch.stack(parts).sum()

    def rows_divergence(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The same of rows whose distributions are there at once."""
        with torch.no_grad():
            wanted = self.ideal.logits(hidden).log_softmax(-1)
        return F.kl_div(self.ends.logits(x).log_softmax(-1), wanted, reduction="sum", log_target=True)


@dataclass(frozen=True)
class Whole:
    """The quantized model's layers, what is trained of each, and what is around them. A layer's trained weights exist
    while it computes."""

    layers: list[DecoderLayer]
    of_layers: list[list[Trained]]
    behind: Behind
    rope: torch.Tensor

    @property
    def trained(self) -> list[Trained]:
        """All of them."""
        return [*(one for some in self.of_layers for one in some), *self.behind.trained]

    @torch.no_grad()
    def divergence(self, ids: torch.Tensor, hidden: torch.Tensor) -> float:
        """KL(unquantized ‖ quantized) in nats, the mean over all positions of windows ids [windows, ctx], of which the
        unquantized model's last hidden states are `hidden` [windows, ctx, hidden]."""
        *_, x = self._states(ids)
        put_values(self.behind.trained)
        return float(self.behind.divergence(x.flatten(0, 1), hidden.flatten(0, 1))) / ids.numel()

    def learn(self, ids: torch.Tensor, hidden: torch.Tensor, share: float) -> None:
        """Take a step of all weights that brings the divergence down, `share` of the largest."""
        with torch.no_grad():
            *states, x = self._states(ids)
        gradients, of_ends = [], self.behind.trained
        values = asked_values(of_ends)
        sums = [torch.zeros_like(some) for some in values]
        for rows, wanted in _split(x.detach().flatten(0, 1), hidden.flatten(0, 1)):
            rows = rows.requires_grad_()
            kld = self.behind.rows_divergence(rows, wanted) / ids.numel()
            found, *others = torch.autograd.grad(kld, [rows, *values])
            gradients.append(found)
            for total, other in zip(sums, others, strict=True):
                total.add_(other)
        take_step(of_ends, values, sums, share)
        behind = torch.cat(gradients).view_as(x)
        for index in reversed(range(len(self.layers))):
            behind = self._learn(index, states.pop(), behind, share)

    def _learn(self, index: int, x: torch.Tensor, behind: torch.Tensor, share: float) -> torch.Tensor:
        """Take the step of a layer's weights, given the gradient by its output. Returns that by its input x."""
        trained, x = self.of_layers[index], x.requires_grad_()
        values = asked_values(trained)
        out, _ = self.layers[index](x, self.rope)
        before, *gradients = torch.autograd.grad(out, [x, *values], behind, allow_unused=True)
        del out
        for one in trained:
            one.put(one.numbers)
        take_step(trained, values, gradients, share)
        return before

    def _states(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """The hidden states before each layer, and behind the last: [windows, ctx, hidden]."""
        x = self.behind.ends.embed(ids)
        for layer, trained in zip(self.layers, self.of_layers, strict=True):
            yield x
            put_values(trained)
            x, _ = layer(x, self.rope)
            for one in trained:
                one.put(one.numbers)  # lets go of the values
        yield x


def _split(x: torch.Tensor, hidden: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Both [tokens, hidden], by rows."""
    return zip(x.split(ROWS), hidden.split(ROWS), strict=True)


def whole_model(loader: Loader, rope: torch.Tensor, specs: Sequence[TensorSpec], held: Held) -> Whole:
    """The model whose weights are `held`: `loader` is of the unquantized one."""
    layers, of_layers = [], []
    for index in range(loader.config.num_hidden_layers):
        layer, trained = held_layer(loader, index, specs, held)
        layers.append(layer)
        of_layers.append(trained)
    return Whole(layers, of_layers, held_ends(loader, specs, held), rope)


def held_layer(
    loader: Loader, index: int, specs: Iterable[TensorSpec], held: Held
) -> tuple[DecoderLayer, list[Trained]]:
    """A layer whose weights are `held`, and what is trained of them."""
    layer = loader.layer(index)
    modules = {linear.module: linear for linear in every_linear(layer)} | dict(_norms(index, layer))
    return layer, _trained([spec for spec in specs if spec.layer == index], modules, held)


def held_ends(loader: Loader, specs: Iterable[TensorSpec], held: Held) -> Behind:
    """What is before and behind the layers, and what is trained of what is behind."""
    ideal = loader.ends()
    ends: Ends = copied(ideal)
    behind: dict[str, Any] = {"model.norm": ends.norm, "lm_head": ends.head, "score": ends.head}
    outside = [spec for spec in specs if spec.layer is None]
    trained = _trained(outside, behind, held)
    for spec in outside:
        if spec.role == "embed":
            found = held(spec, lambda values: None, ends.embedding.device)
            ends.embedding = found.values() if isinstance(found, Trained) else found
            if loader.config.tie_word_embeddings:
                behind["lm_head"].weight = ends.embedding
    return Behind(ends, ideal, trained)


def put_values(trained: Iterable[Trained]) -> None:
    """Give the model the values of its trained weights."""
    for one in trained:
        one.put(one.values())


def asked_values(trained: Iterable[Trained]) -> list[torch.Tensor]:
    """The values of trained weights, which the model gets, to be asked for their gradients."""
    values = []
    for one in trained:
        values.append(one.values().requires_grad_())
        one.put(values[-1])
    return values


@torch.no_grad()
def take_step(
    trained: Iterable[Trained],
    values: Iterable[torch.Tensor],
    gradients: Iterable[torch.Tensor | None],
    share: float,
) -> None:
    """Each trained weight learns from the gradient by its values, `share` of the largest step; an expert that no token
    was routed to has none."""
    for one, some, gradient in zip(trained, values, gradients, strict=True):
        if gradient is not None:
            one.learn(some.detach(), gradient, share)


def _trained(specs: Iterable[TensorSpec], modules: Mapping[str, Any], held: Held) -> list[Trained]:
    """What is trained of these weights, which `modules` get as they are stored where nothing is."""
    found = []
    for spec in specs:
        module = modules.get(spec.module)
        if module is None or not spec.name.endswith(".weight"):
            continue
        original = module.weight
        one = held(spec, partial(setattr, module, "weight"), original.device)
        if isinstance(one, Trained):
            one.begin_at(original)
            found.append(one)
            one.put(one.numbers)
        else:
            module.weight = one
    return found


def _norms(index: int, layer: DecoderLayer) -> Iterator[tuple[str, RMSNorm]]:
    """A layer's norms by their modules' names."""
    at = f"model.layers.{index}"
    yield f"{at}.input_layernorm", layer.input_layernorm
    yield f"{at}.post_attention_layernorm", layer.post_attention_layernorm
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        norm = getattr(layer.attention, name, None)
        if norm is not None:
            yield f"{at}.self_attn.{name}", norm
