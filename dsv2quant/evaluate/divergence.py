"""How far a quantized model is from its reference: paired, token by token, with bootstrapped errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dsv2quant.evaluate.perplexity import Pass, log_probabilities

RESAMPLES = 2000


@dataclass(frozen=True)
class Divergence:
    """Per scored token, [windows, tokens]: −ln p of both, KL(reference ‖ model) in nats, and whether the two agree on
    the likeliest token. Per layer with experts: the share of chosen experts in common, [windows]."""

    nll: np.ndarray
    reference_nll: np.ndarray
    kld: np.ndarray
    same_top1: np.ndarray
    router: dict[int, np.ndarray]


@torch.inference_mode()
def compare(
    model: Pass, reference: Pass, ids: np.ndarray, first: int, progress: Callable[[int], object] = lambda tokens: None
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


def _router_agreement(model: Pass, reference: Pass) -> dict[int, np.ndarray]:
    agreement = {}
    for layer, (chosen, wanted) in enumerate(zip(model.routes, reference.routes, strict=True)):
        if chosen is not None and wanted is not None:
            common = (chosen.unsqueeze(-1) == wanted.unsqueeze(-2)).any(-1)  # [windows, ctx, k]
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


def perplexity(nll: np.ndarray) -> dict[str, float]:
    """{value, stderr} of exp(mean −ln p) over [windows, tokens]."""
    windows = nll.mean(1)
    return {"value": float(np.exp(nll.mean())), "stderr": float(np.exp(resampled_means(windows)).std())}


def summarize(d: Divergence) -> dict[str, object]:
    """The part of `eval-ppl --json` that needs a reference."""
    ratio = d.nll - d.reference_nll
    quantiles = np.quantile(d.kld, [0.5, 0.99, 0.999])
    same = d.same_top1.mean(1)
    summary: dict[str, object] = {
        "reference": {"perplexity": perplexity(d.reference_nll)},
        "delta": {"ln_ratio": float(ratio.mean()), "stderr": bootstrap(ratio.mean(1))},
        "kld": {
            "mean": float(d.kld.mean()),
            "stderr": bootstrap(d.kld.mean(1)),
            "median": float(quantiles[0]),
            "p99": float(quantiles[1]),
            "p999": float(quantiles[2]),
            "max": float(d.kld.max()),
        },
        "top1_agreement": float(same.mean()),
        "top1_agreement_stderr": bootstrap(same),
    }
    if d.router:
        by_layer = np.stack(list(d.router.values()))  # [layers, windows]
        summary["router_agreement"] = float(by_layer.mean())
        summary["router_agreement_stderr"] = bootstrap(by_layer.mean(0))
        summary["router_agreement_by_layer"] = {str(layer): float(a.mean()) for layer, a in d.router.items()}
    else:
        summary["router_agreement"] = None
    return summary
