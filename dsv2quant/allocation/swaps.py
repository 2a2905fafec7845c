"""What it costs to swap one part of a model for its quantized form: KL divergence on calibration text, with all else as
it is.

A swap is a `Mixture`: the model's own linears, and those of another checkpoint of the same model in their place. Every
swap of a layer branches off the hidden states before it, and all branches go on through the layers behind it together:
however many there are, each weight is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from dsv2quant.allocation.items import Part
from dsv2quant.arch.spec import Heads
from dsv2quant.calib.distributed import Ranks
from dsv2quant.evaluation.divergence import Pass, batches_of, log_probabilities, run
from dsv2quant.model.layers import Linear
from dsv2quant.model.load import DecoderLayer, Loader
from dsv2quant.model.runtime import Runtime


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

    def own(self, ranks: Ranks) -> Text:
        """The windows of a rank. Raises UsageError where one would have none."""
        return Text(self.ids[ranks.span(self.batches)], self.batch)


@torch.inference_mode()
def divergences(reference: Pass, others: Sequence[Pass]) -> np.ndarray:
    """Mean KL(reference ‖ other) in nats of each window, [others, windows], behind every token but the last."""
    windows, ctx, _ = reference.hidden.shape
    found = np.zeros((len(others), windows))
    for window in range(windows):
        blocks = [log_probabilities(other, window, 0) for other in others]
        for logp in log_probabilities(reference, window, 0):
            p = logp.exp()
            for number, block in enumerate(blocks):
                found[number, window] += float((p * (logp - next(block))).sum())
    return found / (ctx - 1)


def passed(loader: Loader, text: Text) -> Pass:
    """A whole model on a text."""
    return run(_model(loader), text.ids, text.batches)


@torch.inference_mode()
def branches(
    base: Loader,
    candidates: Mapping[str, Loader],
    swaps: Sequence[Swap],
    text: Text,
    done: Callable[[int], object] = lambda swaps: None,
) -> list[Pass]:
    """What comes of each swap, those of the first layers first, of one pass through the base."""
    base = Mixture(base, {})
    model, tokens = _model(base), torch.from_numpy(text.ids).to(base.options.device)
    states, rope = model.ends.embed(tokens), model.rope(0, tokens.shape[1])
    found: list[Pass] = []  # of as many swaps as the pass has come by

    def go(layer: DecoderLayer, x: torch.Tensor) -> None:
        """Change hidden states [windows, ctx, hidden] to those behind a layer."""
        for batch in text.batches:
            x[batch], _ = layer(x[batch], rope)

    for swap in swaps:
        if swap.part.layer is None:
            ends = _with(base, candidates, swap).ends()
            found.append(Pass(ends, ends.embed(tokens), []))
            done(1)
    for index, layer in enumerate(model.layers()):
        for branch in found:
            go(layer, branch.hidden)
        for swap in swaps:
            if swap.part.layer == index:
                found.append(Pass(model.ends, states.clone(), []))
                go(_with(base, candidates, swap).layer(index), found[-1].hidden)
                done(1)
        if index + 1 < base.config.num_hidden_layers:
            go(layer, states)
    return found


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


def _model(loader: Loader) -> Runtime[DecoderLayer]:
    """Whose layers are loaded one by one."""
    return Runtime(loader, loader.options, stream=True, loaded=lambda layers: None)
