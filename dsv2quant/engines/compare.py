"""How far an engine's distributions are from the runtime's over the same windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dsv2quant.engines.answers import Answer, Scores
from dsv2quant.evaluation import divergence
from dsv2quant.evaluation.divergence import Divergence, Pass, log_probabilities
from dsv2quant.evaluation.results import Distance, Estimate

STRETCH = 16


@torch.inference_mode()
def compare(answer: Answer, runtime: Pass, progress: Callable[[int], object] = lambda tokens: None) -> Divergence:
    """Per scored token of the windows [windows, scored]: −ln p of the engine and of the runtime, as `reference_nll`,
    KL(runtime ‖ engine) in nats, and whether both find the same token likeliest.

    Where the engine gave the likeliest k alone, all others are one bucket on either side: a lower bound of the KLD.
    """
    ids, first = answer.windows.ids, answer.windows.first
    shape = (len(ids), answer.windows.scored)
    nll, runtime_nll, kld, same = np.empty(shape), np.empty(shape), np.empty(shape), np.empty(shape, bool)
    for window, row in enumerate(ids):
        targets, done = torch.from_numpy(row[first + 1 :].copy()), 0
        for on_device in log_probabilities(runtime, window, first):
            logp = on_device.cpu()
            at = slice(done, done + len(logp))
            picked = targets[at, None]
            runtime_nll[window, at] = -logp.gather(1, picked)[:, 0].numpy()
            found = _against(answer.scores, window, at, logp, picked)
            nll[window, at], kld[window, at], same[window, at] = (x.numpy() for x in found)
            done += len(logp)
            progress(len(logp))
    return Divergence(nll, runtime_nll, kld, same, {})


def _against(
    scores: Scores, window: int, at: slice, logp: torch.Tensor, picked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """−ln q of the tokens picked [rows, 1], KL(p ‖ q) and same likeliest token, each [rows], of the engine's q."""
    logq = torch.from_numpy(scores.logprobs[window, at].astype(np.float64))
    if scores.ids is None or scores.targets is None:
        kld = torch.where(logp.exp() > 0, logp.exp() * (logp - logq), 0.0).sum(1)
        return -logq.gather(1, picked)[:, 0], kld, logq.argmax(1) == logp.argmax(1)
    ids = torch.from_numpy(scores.ids[window, at].astype(np.int64))
    p, q = logp.gather(1, ids), logq
    rest_p, rest_q = (torch.log1p(-x.exp().sum(1).clamp(max=1 - 1e-12)) for x in (p, q))
    kld = (p.exp() * (p - q)).sum(1) + rest_p.exp() * (rest_p - rest_q)
    likeliest = ids.gather(1, q.argmax(1, keepdim=True))[:, 0]
    return -torch.from_numpy(scores.targets[window, at].astype(np.float64)), kld, likeliest == logp.argmax(1)


@dataclass(frozen=True)
class Apart:
    """How far an engine is from the runtime: the distance, perplexity by each, and what 99.9% of the differences of
    ln p of true tokens keep to, in nats; `kld_error` is the mean KLD's standard error over stretches of tokens."""

    distance: Distance
    engine: Estimate
    runtime: Estimate
    p999: float
    kld_error: float


def summarize(found: Divergence) -> Apart:
    """The means over all tokens, with their errors."""
    return Apart(
        divergence.summarize(found),
        divergence.perplexity(found.nll),
        divergence.perplexity(found.reference_nll),
        float(np.quantile(np.abs(found.nll - found.reference_nll), 0.999)),
        _error(found.kld),
    )


def extra_cost(engine: np.ndarray, runtime: np.ndarray) -> Estimate:
    """By how much further the engine is from the unquantized source than the runtime is: KLD over the same tokens
    [windows, scored], in nats, with its error over stretches. Noise, which moves both alike, is not in it."""
    more = engine - runtime
    return Estimate(float(more.mean()), _error(more))


def _error(values: np.ndarray) -> float:
    """The standard error of the mean of [windows, scored], over stretches of STRETCH tokens: what rounding does lasts
    no longer, and windows may be few."""
    count = max(values.shape[1] // STRETCH, 1)
    stretches = [part.mean(1) for part in np.array_split(values, count, axis=1)]  # [windows] each
    return divergence.bootstrap(np.concatenate(stretches))
