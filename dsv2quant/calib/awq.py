"""AWQ (arXiv:2306.00978): columns that strong inputs meet are widened before rounding, and what produces these inputs
is narrowed by as much (`planning/smoothing.py`).

For each pair, exponents e = round(α (log₂ rms − mean)) are tried for α = 0 (nothing is smoothed), 0.05 … 1; the one
with the least Σ E[x²] (w − rounded w)² over the consumers stays. rms is that of the input's channels, from statistics,
so that no forward pass is needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load

from dsv2quant.calib.calibration import layer_file
from dsv2quant.calib.statistics import Statistics
from dsv2quant.calib.streams import Pieces, save_layer
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning.plan import Entry, Plan
from dsv2quant.planning.smoothing import REACH, Smoothing, SmoothingPair, smoothing_pairs

logger = logging.getLogger(__name__)
ALPHAS = np.linspace(0, 1, 21)
CLIPS = (1.0, 0.9, 0.8, 0.7)  # scales that a candidate is judged by, in units of amax / 7


def choose_smoothing(
    plan: Plan, folder: Path, statistics: Statistics, device: str, progress: Callable[[int], object]
) -> Smoothing:
    """Exponents for every pair that an entry with method `awq` reads, layer by layer in `folder`, which keeps what is
    finished; `progress` is called with weights."""
    entries = {entry.spec.name: entry for entry in plan.entries if entry.method == "awq"}
    tensors: dict[str, np.ndarray] = {}
    with Pieces(folder) as pieces:
        for layer in range(plan.checkpoint.config.num_hidden_layers):
            path = layer_file(folder, layer)
            if damaged := pieces.holds(path) and pieces.damaged([path]):
                logger.warning("%s: is not what was written to it; it is made again", path)
            if damaged or not pieces.holds(path):
                found: dict[str, np.ndarray] = {}
                for pair in smoothing_pairs(plan.checkpoint.config, layer):
                    readers = [entries[spec.name] for spec in pair.consumers if spec.name in entries]
                    if readers:
                        found |= Smoothing.of(pair, _exponents(plan, pair, readers, statistics, device))
                save_layer(path, found, pieces)
            tensors |= load(path.read_bytes())
            progress(sum(entry.spec.size for entry in entries.values() if entry.spec.layer == layer))
    return Smoothing(tensors)


def _exponents(
    plan: Plan, pair: SmoothingPair, readers: Iterable[Entry], statistics: Statistics, device: str
) -> np.ndarray:
    """The best exponents, int8 [K]."""
    reader = min(pair.consumers, key=lambda spec: spec.expert is not None)  # what sees all tokens, where there is one
    strength = statistics.mean_square(reader)
    logs = 0.5 * np.log2(np.maximum(strength, strength.max() * 1e-12 or 1.0))
    raised = np.rint(ALPHAS[:, None] * (logs - logs.mean())).clip(-REACH, REACH).astype(np.int8)  # [alphas, K]
    candidates = torch.from_numpy(np.unique(raised, axis=0)).to(device)
    losses = torch.zeros(len(candidates), dtype=torch.float64, device=device)
    for entry in readers:
        integers = CODECS[entry.scheme].integers
        assert integers is not None
        weight = plan.checkpoint.decode(entry.weight, torch.float32, device)
        importance = torch.from_numpy(statistics.mean_square(entry.spec)).to(device) * max(
            1, statistics.count(entry.spec)
        )
        group = integers.group_size or weight.shape[1]
        losses += torch.stack([_loss(weight, importance, e.float(), group) for e in candidates])
    # Ties go to the candidate that smooths least.
    least = candidates[losses == losses.min()]
    best: np.ndarray = least[least.abs().sum(1).argmin()].cpu().numpy()
    return best


def _loss(weight: torch.Tensor, importance: torch.Tensor, e: torch.Tensor, group: int) -> torch.Tensor:
    """Σ importance (w − rounded w)² for a weight [R, K] whose columns are × 2ᵉ while it is rounded, each group by the
    best of a few scales."""
    groups = (weight * e.exp2()).unflatten(1, (-1, group))
    weights = (importance * (-2 * e).exp2()).unflatten(0, (-1, group))
    unit = groups.abs().amax(-1, keepdim=True) / 7
    least = torch.full(unit.shape[:-1], float("inf"), device=weight.device)
    for factor in CLIPS:
        scales = (unit * factor).bfloat16().float()
        scales = torch.where(scales > 0, scales, 1.0)
        off = (groups / scales).round_().clamp_(-8, 7).mul_(scales).sub_(groups)
        least = torch.minimum(least, off.square_().mul_(weights).sum(-1))
    return least.sum(dtype=torch.float64)
