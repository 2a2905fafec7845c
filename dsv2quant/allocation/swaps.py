"""What it costs to swap one part of a model for its quantized form: KL divergence on calibration text, with all else as
it is.

A swap is a `Mixture`: the model's own linears, and those of another checkpoint of the same model in their place. Every
swap of a layer branches off the hidden states before it, and all branches go on through the layers behind it together:
however many there are, each weight is read once. How many are under way at a time is bounded by the memory that their
hidden states take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from dsv2quant.allocation.items import Part
from dsv2quant.arch.spec import Heads
from dsv2quant.evaluation.divergence import ROWS, Head, batches_of
from dsv2quant.model.attention import Rope
from dsv2quant.model.layers import Linear
from dsv2quant.model.load import DecoderLayer, Loader

MEMORY = 1 << 30  # bytes of hidden states of branches that are under way at a time


class Parts(Protocol):
    """What has weights of a model, as a `Loader` has all."""

    def linear(self, module: str) -> Linear: ...

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor: ...


@dataclass(frozen=True)
class Halves:
    """kv_b_proj, whose rows of keys one loader has and those of values another, as a GGUF file has them apart."""

    keys: Parts
    values: Parts
    heads: Heads

    def linear(self, module: str) -> Linear:
        keys, values = self.keys.linear(module), self.values.linear(module)
        return replace(keys, weight=self._joined(keys.weight, values.weight))

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._joined(self.keys.tensor(name, dtype), self.values.tensor(name, dtype))

    def _joined(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Of [heads · (keys + values), latent] each."""
        k, v = (x.unflatten(0, (self.heads.count, -1)) for x in (keys, values))
        return torch.cat([k[:, : self.heads.keys], v[:, self.heads.keys :]], 1).flatten(0, 1)


class Mixture(Loader):
    """Loads a model, some of whose weights, by name, others have. The linears of a layer are kept until the next one is
    asked for: swaps share them."""

    def __init__(self, base: Loader, held: Mapping[str, Parts]) -> None:
        super().__init__(base.checkpoint, base.options)
        self._base, self._held = base, held
        self._linears: dict[str, Linear] = {}

    def layer(self, index: int) -> DecoderLayer:
        self._linears.clear()
        return super().layer(index)

    def linear(self, module: str) -> Linear:
        if module not in self._linears:
            self._linears[module] = self._held.get(f"{module}.weight", self._base).linear(module)
        return self._linears[module]

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._held.get(name, self._base).tensor(name, dtype)


@dataclass(frozen=True)
class Swap:
    """A part that is taken from a candidate."""

    part: Part
    candidate: str


@dataclass(frozen=True)
class Text:
    """Token windows [windows, ctx], and how many go through a layer together."""

    ids: np.ndarray
    batch: int

    @property
    def batches(self) -> list[slice]:
        return batches_of(len(self.ids), self.batch)


Branch = tuple[Head, torch.Tensor]  # a head, and hidden states [windows, ctx, hidden] that go to it


@torch.inference_mode()
def divergences(reference: Branch, others: Sequence[Branch]) -> np.ndarray:
    """Mean KL(reference ‖ other) in nats of each window, [others, windows], behind every token but the last."""
    head, states = reference
    found = np.zeros((len(others), len(states)))
    for window, row in enumerate(states):
        for at in batches_of(len(row) - 1, ROWS):
            logp = head.logits(row[at]).double().log_softmax(-1)
            p = logp.exp()
            for number, (other, hidden) in enumerate(others):
                logq = other.logits(hidden[window, at]).double().log_softmax(-1)
                found[number, window] += float((p * (logp - logq)).sum())
    return found / (states.shape[1] - 1)


@torch.inference_mode()
def passed(loader: Loader, text: Text) -> Branch:
    """A whole model on a text."""
    ends = loader.ends()
    states = ends.embed(_tokens(loader, text))
    for index in range(loader.config.num_hidden_layers):
        _through(loader.layer(index), states, loader, text)
    return ends, states


@torch.inference_mode()
def measure(
    base: Loader,
    candidates: Mapping[str, Loader],
    swaps: Sequence[Swap],
    reference: Branch,
    text: Text,
    done: Callable[[int], object] = lambda swaps: None,
    memory: int = MEMORY,
) -> Iterator[tuple[Swap, np.ndarray]]:
    """Mean KL(reference ‖ base with one swap) in nats of each window, [windows], of every swap, in order of layers."""
    one = text.ids.size * base.config.hidden_size * base.options.dtype.itemsize
    order = sorted(swaps, key=lambda swap: -1 if swap.part.layer is None else swap.part.layer)
    for some in batches_of(len(order), max(1, memory // one)):
        taken = order[some]
        branches = _branches(Mixture(base, {}), candidates, taken, text, done)
        yield from zip(taken, divergences(reference, branches), strict=True)


def _branches(
    base: Loader, candidates: Mapping[str, Loader], swaps: Sequence[Swap], text: Text, done: Callable[[int], object]
) -> list[Branch]:
    """What comes of each swap, of one pass through the base."""
    ends, tokens = base.ends(), _tokens(base, text)
    states = ends.embed(tokens)
    heads: list[Head] = []
    branches: list[torch.Tensor] = []  # of as many swaps as the pass has come by
    for swap in swaps:
        if swap.part.layer is None:
            swapped = _with(base, candidates, swap).ends()
            heads.append(swapped)
            branches.append(swapped.embed(tokens))
        else:
            heads.append(ends)
    for index in range(base.config.num_hidden_layers):
        layer = base.layer(index)
        for branch in branches:
            _through(layer, branch, base, text)
        for swap in swaps:
            if swap.part.layer == index:
                branches.append(states.clone())
                _through(_with(base, candidates, swap).layer(index), branches[-1], base, text)
                done(1)
        if index + 1 < base.config.num_hidden_layers:
            _through(layer, states, base, text)
    return list(zip(heads, branches, strict=True))


def _with(base: Loader, candidates: Mapping[str, Loader], swap: Swap) -> Mixture:
    return Mixture(base, held(base, [(swap.part, candidates[swap.candidate])]))


def held(base: Parts, chosen: Iterable[tuple[Part, Parts]]) -> dict[str, Parts]:
    """By name, what has each weight where parts are taken from these."""
    found: dict[str, Parts] = {}
    for part, taken in chosen:
        for name in part.weights:
            match part.half, part.heads:
                case "k", Heads() as heads:
                    found[name] = Halves(taken, found.get(name, base), heads)
                case "v", Heads() as heads:
                    found[name] = Halves(found.get(name, base), taken, heads)
                case _:
                    found[name] = taken
    return found


def _tokens(loader: Loader, text: Text) -> torch.Tensor:
    return torch.from_numpy(text.ids).to(loader.options.device)


def _through(layer: DecoderLayer, states: torch.Tensor, loader: Loader, text: Text) -> None:
    """Change hidden states [windows, ctx, hidden] to those behind a layer."""
    rope = Rope(loader.config, states.device).table(torch.arange(states.shape[1], device=states.device))
    for batch in text.batches:
        states[batch], _ = layer(states[batch], rope)
