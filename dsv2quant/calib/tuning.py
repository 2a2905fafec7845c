"""Tuning what is continuous in a quantized model: codes stay, and what multiplies them is trained.

Every scale of a group of INT4 codes, every norm's weight and every router's gets a factor e^m, |m| ≤ BOUND. All m are
trained together by Adam (arXiv:1412.6980) to bring the quantized model's next-token distribution to the unquantized
model's, KL(unquantized ‖ quantized), as mlx-lm's DWQ does (its pull request 279); the rate rises over the first tenth
of the steps and falls by a cosine. Weights and activations are float32, activations unquantized.

The unquantized model goes through all tokens first, a layer at a time, and leaves its last hidden states on disk; the
quantized one is held whole (factors.py). One window in 16, at most 64, is held out: what is trained is rounded to the
dtypes that it is stored in, and where the divergence of these windows has not fallen, nothing of it is taken.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from dsv2quant.calib.calibration import Calibration, Tuned
from dsv2quant.calib.factors import Stored, Whole, whole_model
from dsv2quant.calib.layerwise import HELD
from dsv2quant.calib.streams import Made, Pieces, Spool, batches, save_layer, through_layers
from dsv2quant.errors import InputError
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.attention import Rope
from dsv2quant.model.load import Loader, LoadOptions
from dsv2quant.planning.plan import Plan

BOUND = 0.1  # of |m|: a router may not drift, and no scale moves by more than 10%
RATE, WARM = 1e-3, 0.1  # Adam's largest step, and the share of all steps over which it is reached
BETAS, EPSILON = (0.9, 0.99), 1e-8
STEP_TOKENS = 2048  # that a step takes, at least one window
HELD_MOST = 64  # windows held out, at most
SNAPSHOTS = 16  # of the training, from the last of which a killed run continues


class Tokens(NamedTuple):
    """Windows [windows, ctx] with the unquantized model's last hidden states, and which are trained on and held out."""

    ids: torch.Tensor
    hidden: Spool
    trained: Sequence[np.ndarray]  # of each step
    held: Sequence[np.ndarray]  # what goes together

    def of(self, windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Some windows: tokens, and hidden states."""
        ctx = self.ids.shape[1]
        rows = (windows[:, None] * ctx + np.arange(ctx)).ravel()
        return self.ids[windows].to(self.hidden.device), self.hidden[rows].unflatten(0, (-1, ctx))


def tune(
    plan: Plan,
    folder: Path,
    calibration: Calibration,
    stored: Stored,
    device: str = "cpu",
    progress: Callable[[int], object] = lambda tokens: None,
) -> Tuned:
    """Train on windows of `calibration`, at least HELD of them, in `folder`, which keeps what is finished: hidden
    states, and snapshots from which a killed run continues with the same numbers. `stored` gives what the plan's
    artifact has of a weight; `progress` is called with tokens that went through the unquantized model, and again with
    those that were trained on.

    Raises InputError where the model does not fit into the device's memory, and OSError.
    """
    ids = calibration.ids
    loader = Loader(plan.checkpoint, LoadOptions(torch.float32, device, weight_only=True))
    check_memory(plan, device)
    rope = Rope(plan.checkpoint.config, torch.device(device)).table(torch.arange(ids.shape[1], device=device))
    hidden = _ideal(loader, folder / "ideal", ids, rope, progress)
    held = np.arange(HELD // 2, len(ids), HELD)[:HELD_MOST]
    together = max(1, STEP_TOKENS // ids.shape[1])
    order = np.random.default_rng(calibration.seed).permutation(np.setdiff1d(np.arange(len(ids)), held))
    steps = np.split(order, range(together, len(order), together))
    checks = np.split(held, range(together, len(held), together))
    tokens = Tokens(torch.from_numpy(ids), hidden, steps, checks)
    whole = whole_model(plan, loader, rope, stored)
    with Pieces(folder / "training") as pieces:
        before, m = _train(whole, tokens, pieces, progress)
        taken = [
            [factor.stored(part) for factor, part in zip(factors, parts, strict=True)]
            for factors, parts in zip(whole.factors, whole.split(m), strict=True)
        ]
        after = _held_out(replace(whole, factors=[[factor for factor, _ in some] for some in taken]), tokens)
    accepted = after < before
    about = {
        "tokens": int(order.size * ids.shape[1]),
        "held_out_tokens": int(held.size * ids.shape[1]),
        "kld_before": before,
        "kld_after": after,
        "accepted": accepted,
    }
    found = {factor.entry.spec.name: parts for some in taken for factor, parts in some}
    return Tuned(found if accepted else {}, about)


def check_memory(plan: Plan, device: str) -> None:
    """Raise InputError where the model can't be held: a byte per INT4 weight and 4 per other one, and 12 per weight of
    the largest layer, which is there in float32 with its gradient."""
    layers: dict[int | None, int] = defaultdict(int)
    held = 0
    for entry in plan.entries:
        layers[entry.spec.layer] += entry.spec.size
        held += entry.spec.size * (1 if CODECS[entry.scheme].integers is not None else 4)
    needed = held + 12 * max(layers.values())
    if device == "cpu":
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        there = torch.cuda.get_device_properties(device).total_memory
    if needed > there:
        what = f"tuning holds the whole model, {needed:,} bytes; {device} has {there:,}"
        raise InputError(what, where=plan.checkpoint.model, fix="leave out --tune")


@torch.inference_mode()
def _ideal(
    loader: Loader, folder: Path, ids: np.ndarray, rope: torch.Tensor, progress: Callable[[int], object]
) -> Spool:
    """The unquantized model's hidden states behind its last layer, [tokens, hidden]."""
    config, ctx = loader.checkpoint.config, int(ids.shape[1])
    count, told = config.num_hidden_layers, 0

    def tell(passed: int) -> None:
        """Tokens times layers so far, as tokens that went through all layers."""
        nonlocal told
        progress(passed // count - told)
        told = passed // count

    def process(index: int, before: Sequence[Spool], behind: Sequence[Spool]) -> Made:
        layer = loader.layer(index)
        for rows in batches(ids.size, ctx):
            out, _ = layer(before[0][rows].unflatten(0, (-1, ctx)), rope)
            behind[0][rows] = out.flatten(0, 1)
            tell(index * ids.size + rows.stop)
        return {}, None

    through_layers(folder, loader, ids, ("ideal",), process, lambda layers: tell(layers * ids.size))
    last = folder / f"hidden-{count:05d}-ideal"
    return Spool(last, ids.size, config.hidden_size, loader.options.device)


@torch.no_grad()
def _held_out(whole: Whole, tokens: Tokens) -> float:
    """The mean divergence of the windows that are held out, with every m 0."""
    m = torch.zeros(whole.count, device=whole.rope.device)
    sums = [len(windows) * whole.divergence(m, *tokens.of(windows)).item() for windows in tokens.held]
    return sum(sums) / sum(map(len, tokens.held))


def _train(
    whole: Whole, tokens: Tokens, pieces: Pieces, progress: Callable[[int], object]
) -> tuple[float, torch.Tensor]:
    """The divergence of what is held out before, and every m, flat."""
    device = whole.rope.device
    resumed = _resumed(pieces)
    if resumed is None:
        before, begin, (m, mean, square) = _held_out(whole, tokens), 0, torch.zeros(3, whole.count, device=device)
        for path in pieces.folder.glob("*.safetensors"):
            path.unlink()
    else:
        before, begin, (m, mean, square) = resumed[0], resumed[1], resumed[2].to(device)
    steps, ctx = len(tokens.trained), tokens.ids.shape[1]
    progress(sum(map(len, tokens.trained[:begin])) * ctx)
    every = max(1, steps // SNAPSHOTS)
    for step in range(begin, steps):
        m.requires_grad_()
        (gradient,) = torch.autograd.grad(whole.divergence(m, *tokens.of(tokens.trained[step])), m)
        m = m.detach()
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        unbiased = (square / (1 - BETAS[1] ** (step + 1))).sqrt() + EPSILON
        m.sub_(_rate(step, steps) / (1 - BETAS[0] ** (step + 1)) * mean / unbiased).clamp_(-BOUND, BOUND)
        progress(len(tokens.trained[step]) * ctx)
        if (step + 1) % every == 0 or step + 1 == steps:
            last = sorted(pieces.folder.glob("*.safetensors"))
            state = torch.stack([m, mean, square]).cpu().numpy()
            save_layer(pieces.folder / f"step-{step + 1:09d}.safetensors", {"state": state}, pieces, before)
            for path in last:
                path.unlink()
    return before, m


def _rate(step: int, steps: int) -> float:
    """Adam's rate: a line up to RATE, and a cosine down."""
    share = (step + 1) / steps
    return RATE * (share / WARM if share < WARM else 0.5 + 0.5 * math.cos(math.pi * (share - WARM) / (1 - WARM)))


def _resumed(pieces: Pieces) -> tuple[float, int, torch.Tensor] | None:
    """Of the last snapshot that is as it was written: the divergence before, steps done, and m with Adam's moments,
    [3, ·]. None without one."""
    for path in sorted(pieces.folder.glob("step-*.safetensors"), reverse=True):
        if pieces.holds(path) and not pieces.damaged([path]):
            with safe_open(path, "pt") as file:
                return json.loads(file.metadata()["about"]), int(path.stem[-9:]), file.get_tensor("state")
    return None
