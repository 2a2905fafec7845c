"""Running windows through a model, layer by layer.

Every layer is applied to all windows before the next one is touched. Resident and streamed models thus share one loop,
and a streamed model is read from disk once, however many windows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from dsv2quant.model.runtime import Block, Model

if TYPE_CHECKING:
    from dsv2quant.model.fused_model import FusedModel

ROWS = 256  # positions whose logits are held at a time, in float64


@dataclass(frozen=True)
class Pass:
    """All windows behind the last layer: hidden states [windows, ctx, hidden], and per layer the chosen experts
    [windows, ctx, k] (None in dense layers)."""

    model: Model | FusedModel
    hidden: torch.Tensor
    routes: list[torch.Tensor | None]

    def part(self, windows: slice) -> Pass:
        """The same pass, seen over some of its windows."""
        return Pass(self.model, self.hidden[windows], [r if r is None else r[windows] for r in self.routes])


@torch.inference_mode()
def run(
    model: Model | FusedModel,
    ids: np.ndarray,
    batches: Sequence[slice],
    progress: Callable[[int], object] = lambda tokens: None,
    *,
    decode_path: bool = False,
) -> Pass:
    """Run token windows [windows, ctx] through the model; `batches` says which windows go together.

    `progress` is called with the tokens that each layer has dealt with. `decode_path` goes through each layer token by
    token, as decoding does: a token depends on no later one, so that layers may still come one after the other.
    """
    tokens = torch.from_numpy(ids).to(model.options.device)
    hidden = model.ends.embed(tokens)
    rope = model.rope(0, tokens.shape[1])
    routes: list[torch.Tensor | None] = []
    layers: Iterator[Block] = model.layers()
    for index, layer in enumerate(layers):
        chosen_by_batch = []
        for batch in batches:
            if decode_path:
                cache = model.cache(index, *hidden[batch].shape[:2])
                hidden[batch], chosen = layer.decoded(hidden[batch], rope, cache)
            else:
                hidden[batch], chosen = layer(hidden[batch], rope)
            if chosen is not None:
                chosen_by_batch.append(chosen.view(*hidden[batch].shape[:2], -1).to(torch.int16))
            progress(hidden[batch].shape[0] * hidden.shape[1])
        routes.append(torch.cat(chosen_by_batch) if chosen_by_batch else None)
    return Pass(model, hidden, routes)


def batches_of(windows: int, size: int) -> list[slice]:
    """Slices of at most `size` windows that cover `windows` in order."""
    return [slice(first, min(first + size, windows)) for first in range(0, windows, size)]


@torch.inference_mode()
def log_probabilities(run: Pass, window: int, first: int) -> Iterator[torch.Tensor]:
    """ln p over the vocabulary, float64, in blocks of positions of one window: from `first` to the last but one."""
    rows = run.hidden[window, first:-1]
    for block in rows.split(ROWS):
        yield run.model.ends.logits(block).double().log_softmax(-1)


def negative_log_likelihoods(
    run: Pass, ids: np.ndarray, first: int, progress: Callable[[int], object] = lambda tokens: None
) -> np.ndarray:
    """−ln p of every scored token, [windows, ctx − 1 − first], in nats. `progress` is called with tokens scored."""
    result = np.empty((len(ids), ids.shape[1] - 1 - first))
    for window, row in enumerate(ids):
        targets = torch.from_numpy(row[first + 1 :]).to(run.hidden.device)
        done = 0
        for logp in log_probabilities(run, window, first):
            picked = logp.gather(1, targets[done : done + len(logp), None])[:, 0]
            result[window, done : done + len(logp)] = -picked.cpu().numpy()
            done += len(logp)
            progress(len(logp))
    return result
