"""Running windows through a model, layer by layer.

Every layer is applied to all windows before the next one is touched. Resident and streamed models thus share one loop,
and a streamed model is read from disk once, however many windows there are.

How far a quantized model is from its reference: paired, token by token, with bootstrapped errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from dsv2quant.evaluation.results import Distance, Estimate, Kld, Stretch
from dsv2quant.model.runtime import Block, Runtime

ROWS = 256  # positions whose logits are made at a time
WIDE_ROWS = 64  # of these, what is in float64 at a time: a processor's cache has a few of such
TOKENS_TOGETHER = 4096  # that go through a layer together, where nothing else is asked for


Routes = list[torch.Tensor | None]


class Head(Protocol):
    """What makes logits of hidden states: of a model its `Ends`."""

    def logits(self, x: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Pass:
    """All windows behind the last layer: hidden states [windows, ctx − begin, hidden] of positions from `begin` on, and
    per layer the chosen experts [windows, ctx, k] (None in dense layers)."""

    head: Head
    hidden: torch.Tensor
    routes: Routes
    begin: int = 0

    def part(self, windows: slice) -> Pass:
        """The same pass, seen over some of its windows."""
        return Pass(self.head, self.hidden[windows], [r if r is None else r[windows] for r in self.routes], self.begin)


@dataclass(frozen=True)
class Held:
    """A pass whose distributions are held: logits [windows, ctx − 1 − begin, vocabulary], and of each position, float64
    [windows, ctx − 1 − begin, 1], the largest and what ln p there is below 0. ln p is then made without an exponential,
    to the same bit."""

    logits: torch.Tensor
    largest: torch.Tensor
    below: torch.Tensor
    routes: Routes
    begin: int

    @classmethod
    @torch.inference_mode()
    def of(cls, run: Pass) -> Held:
        """Those of a pass, made in the blocks that `log_probabilities` makes them in."""
        windows, positions, _ = run.hidden.shape
        vocabulary = run.head.logits(run.hidden[:1, 0]).shape[1]
        logits = run.hidden.new_empty(windows, positions - 1, vocabulary)
        largest, below = logits.new_empty(2, windows, positions - 1, 1, dtype=torch.float64)
        for window, rows in enumerate(run.hidden[:, :-1]):
            for into, block in zip(logits[window].split(ROWS), rows.split(ROWS), strict=True):
                into.copy_(run.head.logits(block))
            for at in batches_of(positions - 1, WIDE_ROWS):
                wide = logits[window, at].double()
                largest[window, at] = wide.amax(1, keepdim=True)
                below[window, at] = wide.log_softmax(-1).amax(1, keepdim=True)
        return cls(logits, largest, below, run.routes, run.begin)

    def part(self, windows: slice) -> Held:
        """The same, of some of its windows."""
        routes = [r if r is None else r[windows] for r in self.routes]
        return Held(self.logits[windows], self.largest[windows], self.below[windows], routes, self.begin)

    def log_probabilities(self, window: int, first: int) -> Iterator[torch.Tensor]:
        """As the function."""
        parts = (
            part[window, first - self.begin :].split(WIDE_ROWS) for part in (self.logits, self.largest, self.below)
        )
        for logits, largest, below in zip(*parts, strict=True):
            yield logits.double().sub_(largest).add_(below)


@torch.inference_mode()
def run(
    model: Runtime[Block],
    ids: np.ndarray,
    batches: Sequence[slice],
    progress: Callable[[int], object] = lambda tokens: None,
    *,
    decode_path: bool = False,
    begun: tuple[torch.Tensor, Routes] | None = None,
    behind: Callable[[torch.Tensor, Routes], object] = lambda hidden, routes: None,
) -> Pass:
    """Run token windows [windows, ctx] through the model; `batches` says which windows go together.

    `progress` is called with the tokens that each layer has dealt with. `decode_path` goes through each layer token by
    token, as decoding does: a token depends on no later one, so that layers may still come one after the other.
    `behind` is called after each layer with hidden states, which the next one changes, and experts chosen so far; a
    pass that was `begun` goes on from these.
    """
    tokens = torch.from_numpy(ids).to(model.options.device)
    hidden, routes = (model.ends.embed(tokens), []) if begun is None else begun
    rope = model.rope(0, tokens.shape[1])
    done = len(routes)
    progress(ids.size * done)
    layers: Iterator[Block] = model.layers(done)
    for index, layer in enumerate(layers, done):
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
        behind(hidden, routes)
    return Pass(model.ends, hidden, routes)


def batches_of(windows: int, size: int) -> list[slice]:
    """Slices of at most `size` windows that cover `windows` in order."""
    return [slice(first, min(first + size, windows)) for first in range(0, windows, size)]


@torch.inference_mode()
def log_probabilities(run: Pass | Held, window: int, first: int) -> Iterator[torch.Tensor]:
    """ln p over the vocabulary, float64, in blocks of positions of one window: from `first` to the last but one."""
    if isinstance(run, Held):
        yield from run.log_probabilities(window, first)
        return
    rows = run.hidden[window, first - run.begin : -1]
    for block in rows.split(ROWS):
        for logits in run.head.logits(block).split(WIDE_ROWS):
            yield logits.double().log_softmax(-1)


def negative_log_likelihoods(
    run: Pass | Held, ids: np.ndarray, first: int, progress: Callable[[int], object] = lambda tokens: None
) -> np.ndarray:
    """−ln p of every scored token, [windows, ctx − 1 − first], in nats. `progress` is called with tokens scored."""
    result = np.empty((len(ids), ids.shape[1] - 1 - first))
    for window, row in enumerate(ids):
        targets, done = torch.from_numpy(row[first + 1 :]), 0
        for logp in log_probabilities(run, window, first):
            picked = logp.gather(1, targets[done : done + len(logp), None].to(logp.device))[:, 0]
            result[window, done : done + len(logp)] = -picked.cpu().numpy()
            done += len(logp)
            progress(len(logp))
    return result


RESAMPLES = 2000
STRETCHES = 16  # that windows are cut into, to tell distances by position


@dataclass(frozen=True)
class Divergence:
    """Per scored token, [windows, tokens]: −ln p of both, KL(reference ‖ model) in nats, and whether the two agree on
    the likeliest token. Per layer with experts: the share of chosen experts in common, [windows]."""

    nll: np.ndarray
    reference_nll: np.ndarray
    kld: np.ndarray
    same_top1: np.ndarray
    router: dict[int, np.ndarray]

    @classmethod
    def joined(cls, parts: Sequence[Divergence]) -> Divergence:
        """Those of windows behind each other."""
        return cls(
            np.concatenate([part.nll for part in parts]),
            np.concatenate([part.reference_nll for part in parts]),
            np.concatenate([part.kld for part in parts]),
            np.concatenate([part.same_top1 for part in parts]),
            {layer: np.concatenate([part.router[layer] for part in parts]) for layer in parts[0].router},
        )


@torch.inference_mode()
def compare(
    model: Pass,
    reference: Pass | Held,
    ids: np.ndarray,
    first: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> Divergence:
    """Both passes must be over the windows `ids` [windows, ctx]. `progress` is called with tokens compared."""
    shape = (len(ids), ids.shape[1] - 1 - first)
    nll, reference_nll, kld = np.empty(shape), np.empty(shape), np.empty(shape)
    same = np.empty(shape, bool)
    for window, row in enumerate(ids):
        targets = torch.from_numpy(row[first + 1 :]).to(model.hidden.device)
        done = 0
        both = zip(log_probabilities(model, window, first), log_probabilities(reference, window, first), strict=True)
        for logq, logp in both:
            at = slice(done, done + len(logq))
            picked = targets[at, None]
            nll[window, at] = -logq.gather(1, picked)[:, 0].cpu().numpy()
            reference_nll[window, at] = -logp.gather(1, picked)[:, 0].cpu().numpy()
            kld[window, at] = (logp.exp() * (logp - logq)).sum(1).cpu().numpy()
            same[window, at] = (logq.argmax(1) == logp.argmax(1)).cpu().numpy()
            done += len(logq)
            progress(len(logq))
    return Divergence(nll, reference_nll, kld, same, _router_agreement(model, reference))


def _router_agreement(model: Pass, reference: Pass | Held) -> dict[int, np.ndarray]:
    agreement = {}
    for layer, (chosen, wanted) in enumerate(zip(model.routes, reference.routes, strict=True)):
        if chosen is not None and wanted is not None:
            common = (chosen.unsqueeze(-1) == wanted.to(chosen.device).unsqueeze(-2)).any(-1)  # [windows, ctx, k]
            agreement[layer] = common.double().mean((1, 2)).cpu().numpy()
    return agreement


def bootstrap(windows: np.ndarray) -> float:
    """Standard error of the mean over windows (a [windows] array of window means), resampling whole windows: tokens of
    one window are not independent. Deterministic."""
    return float(resampled_means(windows).std())


def resampled_means(windows: np.ndarray) -> np.ndarray:
    """Means of RESAMPLES draws of as many windows with replacement; the same draws for every metric."""
    draws = np.random.default_rng(0).integers(len(windows), size=(RESAMPLES, len(windows)))
    means: np.ndarray = windows[draws].mean(1)
    return means


def perplexity(nll: np.ndarray) -> Estimate:
    """exp(mean −ln p) over [windows, tokens]."""
    windows = nll.mean(1)
    return Estimate(float(np.exp(nll.mean())), float(np.exp(resampled_means(windows)).std()))


def summarize(d: Divergence) -> Distance:
    """The means over all tokens, with their errors."""
    median, p99, p999 = map(float, np.quantile(d.kld, [0.5, 0.99, 0.999]))
    kld = Kld(*_estimate(d.kld), median, p99, p999, float(d.kld.max()))
    agreement = None
    if d.router:
        by_layer = np.stack(list(d.router.values()))  # [layers, windows]
        agreement = Estimate(float(by_layer.mean()), bootstrap(by_layer.mean(0)))
    return Distance(
        Estimate(*_estimate(d.nll - d.reference_nll)),
        kld,
        Estimate(float(d.same_top1.mean(1).mean()), bootstrap(d.same_top1.mean(1))),
        agreement,
        {layer: float(windows.mean()) for layer, windows in d.router.items()},
        _by_position(d.kld),
    )


def _by_position(kld: np.ndarray) -> list[Stretch]:
    """Of KLD [windows, tokens]: stretches that are as long as each other, to a token."""
    tokens = kld.shape[1]
    cuts = np.linspace(0, tokens, min(STRETCHES, tokens) + 1).astype(int).tolist()
    return [Stretch(a, b - 1, Estimate(*_estimate(kld[:, a:b]))) for a, b in pairwise(cuts)]


def _estimate(values: np.ndarray) -> tuple[float, float]:
    """The mean of [windows, tokens], and its standard error."""
    return float(values.mean()), bootstrap(values.mean(1))
