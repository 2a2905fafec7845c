"""What a search measures, by all ranks: of divergences each has some windows, of errors some parts. Rank 0 says what is
measured, and alone decides what for; numbers don't depend on how many ranks there are, as no window's is added to
another's here, and no part's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dsv2quant.allocation.items import Part
from dsv2quant.allocation.swaps import Mixture, Swap, Text, branches, divergences, held, passed
from dsv2quant.calib.distributed import Ranks
from dsv2quant.evaluation.divergence import Pass
from dsv2quant.model.load import Loader

SWAPS, WHOLE, ERRORS = "swaps", "whole", "errors"  # what rank 0 announces
MEMORY = 1 << 30  # bytes of hidden states that swaps of one pass take on a rank


@dataclass(frozen=True)
class Measuring:
    """Parts of a model and candidates' loaders by name, on the windows of this rank, whose `reference` is the model's
    own pass. Before a method is called rank 0 announces it, with its arguments: the others `follow`."""

    parts: Mapping[str, Part]
    base: Loader
    loaders: Mapping[str, Loader]
    text: Text
    reference: Pass
    ranks: Ranks

    @property
    def together(self) -> int:
        """How many swaps go through the model in one pass. Rank 0 says so for all: no other has more windows."""
        one = self.text.ids.size * self.base.config.hidden_size * self.base.options.dtype.itemsize
        return max(1, MEMORY // one)

    def follow(self) -> None:
        """On every rank but the first: measure what that one announces, until it dismisses all."""
        self.ranks.follow({SWAPS: self.swaps, WHOLE: self.whole, ERRORS: self.errors})

    def swaps(
        self,
        mix: Mapping[str, str] | None,
        wanted: Sequence[tuple[str, str]],
        done: Callable[[int], object] = lambda swaps: None,
    ) -> np.ndarray:
        """Mean KL(model ‖ mix with one swap) in nats of each window of all ranks, [swaps, windows]: of each (part,
        candidate), in order of layers, in a mix or in the model itself. One pass."""
        base = self.base if mix is None else self._mixture(mix)
        swaps = [Swap(self.parts[key], candidate) for key, candidate in wanted]
        return self._divergences(branches(base, self.loaders, swaps, self.text, done))

    def whole(self, mix: Mapping[str, str]) -> np.ndarray:
        """Mean KL(model ‖ mix) in nats of each window of all ranks, [windows]."""
        return self._divergences([passed(self._mixture(mix), self.text)])[0]

    def errors(
        self, keys: Sequence[str], done: Callable[[int], object] = lambda parts: None
    ) -> dict[str, dict[str, float]]:
        """Squared errors of the weights of each part, by candidate."""
        found = {}
        for number in self.ranks.share(len(keys)):
            found[keys[number]] = self._errors(self.parts[keys[number]])
            done(1)
        return {key: errors for of_rank in self.ranks.everywhere(found) for key, errors in of_rank.items()}

    def _mixture(self, mix: Mapping[str, str]) -> Mixture:
        return Mixture(self.base, held(self.base, ((self.parts[key], self.loaders[c]) for key, c in mix.items())))

    def _divergences(self, others: Sequence[Pass]) -> np.ndarray:
        return np.concatenate(self.ranks.everywhere(divergences(self.reference, others)), 1)

    def _errors(self, part: Part) -> dict[str, float]:
        errors = dict.fromkeys(part.options, 0.0)
        swapped = {candidate: held(self.base, [(part, self.loaders[candidate])]) for candidate in errors}
        for name in part.weights:
            weight = self.base.tensor(name, torch.float32)
            for candidate in errors:
                difference = swapped[candidate][name].tensor(name, torch.float32) - weight
                errors[candidate] += float(difference.square_().sum(dtype=torch.float64))
        return errors
