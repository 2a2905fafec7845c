"""Tuning a quantized model: its codes, what multiplies them, norms and routers are trained (trained.py).

All are trained together to bring the quantized model's next-token distribution to the unquantized model's,
KL(unquantized ‖ quantized), as mlx-lm's DWQ does with scales (its pull request 279); the rate rises over the first
tenth of the steps and falls by a cosine. Weights and activations are float32, activations unquantized.

The unquantized model goes through all tokens first, a layer at a time, and leaves its last hidden states on disk; the
quantized one is held whole (whole.py). Where the device has no room for that, each layer is trained by itself
(local.py). One window in 16, at most 64, is held out: what is trained is rounded to what is stored, and where the
divergence of these windows has not fallen, nothing of it is taken.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open

from dsv2quant.arch.spec import TensorSpec
from dsv2quant.calib.calibration import Tuned, Tuning
from dsv2quant.calib.hidden import Stream, batches, make_streams, rows_of
from dsv2quant.calib.layer import HELD
from dsv2quant.calib.local import tune_layers
from dsv2quant.calib.streams import Made, Pieces, by_layers, save_layer, through_layers
from dsv2quant.calib.whole import Held, Whole, whole_model
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import InputError
from dsv2quant.model.attention import Rope
from dsv2quant.model.load import Loader, LoadOptions
from dsv2quant.progress import Progress, no_progress

logger = logging.getLogger(__name__)
WARM = 0.1  # the share of all steps over which the largest step is reached
STEP_TOKENS = 8192  # that a step takes, at least one window
HELD_MOST = 64  # windows held out, at most
SNAPSHOTS = 16  # of the training, from the last of which a killed run continues


class Tokens(NamedTuple):
    """Windows [windows, ctx] with the unquantized model's last hidden states, and which are trained on and held out."""

    ids: torch.Tensor
    hidden: Stream
    trained: Sequence[np.ndarray]  # of each step
    held: Sequence[np.ndarray]  # what goes together

    def of(self, windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Some windows: tokens, and hidden states."""
        ctx = self.ids.shape[1]
        return self.ids[windows].to(self.hidden.device), self.hidden[rows_of(windows, ctx)].unflatten(0, (-1, ctx))


def tune(
    checkpoint: Checkpoint,
    specs: Sequence[TensorSpec],
    held: Held,
    tuning: Tuning,
    folder: Path,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Tuned:
    """Train `tuning.tokens` tokens on windows of its text, at least HELD of them, in `folder`, which keeps what is
    finished: hidden states, and snapshots or layers from which a killed run continues with the same numbers.
    `checkpoint` is the unquantized model, and `held` what the artifact has of each of its weights, `specs`. `progress`
    counts tokens that go through the unquantized model, and again those that are trained on.

    Raises InputError where a layer does not fit into the device's memory, and OSError.
    """
    ids = tuning.text.ids
    ctx = ids.shape[1]
    loader = Loader(checkpoint, LoadOptions(torch.float32, device, weight_only=True))
    fits = _fits(checkpoint.model, specs, device)
    rope = Rope(checkpoint.config, torch.device(device)).table(torch.arange(ctx, device=device))
    apart = np.arange(HELD // 2, len(ids), HELD)[:HELD_MOST]
    together = max(1, STEP_TOKENS // ctx)
    order = _order(np.setdiff1d(np.arange(len(ids)), apart), tuning)
    steps = np.split(order, range(together, len(order), together))
    with progress(ids.size + order.size * ctx, "tok", "tune") as advance:
        if fits:
            hidden = _ideal(loader, folder / "ideal", ids, rope, advance)
            checks = np.split(apart, range(together, len(apart), together))
            tokens = Tokens(torch.from_numpy(ids), hidden, steps, checks)
            whole = whole_model(loader, rope, specs, held)
            with Pieces(folder / "training") as pieces:
                before = _train(whole, tokens, pieces, advance)
            parts = {one.name: one.settle() for one in whole.trained}
            after = _held_out(whole, tokens)
        else:
            logger.info("%s: %s can't hold it whole: each layer is tuned by itself", checkpoint.model, device)
            shared = [(windows, _share(step, len(steps))) for step, windows in enumerate(steps)]
            layers = folder / "layers"
            parts, before, after = tune_layers(loader, rope, specs, held, ids, apart, shared, layers, advance)
    accepted = after < before
    about = {
        "together": fits,
        "tokens": int(order.size * ctx),
        "held_out_tokens": int(apart.size * ctx),
        "kld_before": before,
        "kld_after": after,
        "accepted": accepted,
    }
    return Tuned(parts if accepted else {}, about)


def _order(windows: np.ndarray, tuning: Tuning) -> np.ndarray:
    """The windows in the order in which they are trained on: all in another one each time."""
    rng = np.random.default_rng(tuning.text.seed)
    count = tuning.windows - (len(tuning.text.ids) - len(windows))
    times = -(-count // len(windows))
    return np.concatenate([rng.permutation(windows) for _ in range(times)])[:count]


def _fits(model: str, specs: Sequence[TensorSpec], device: str) -> bool:
    """Whether the model can be held: 4 bytes per weight, and 12 per weight of the largest layer, which is there in
    float32 with its gradient. Raises InputError where not even that layer can."""
    layers: dict[int | None, int] = defaultdict(int)
    for spec in specs:
        layers[spec.layer] += spec.size
    largest = max(layers.values())
    if device == "cpu":
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        there = torch.cuda.get_device_properties(device).total_memory
    if 16 * largest > there:
        what = f"tuning holds its largest layer, {16 * largest:,} bytes; {device} has {there:,}"
        raise InputError(what, where=model, fix="leave out --tune")
    return 4 * sum(layers.values()) + 12 * largest <= there


@torch.inference_mode()
def _ideal(
    loader: Loader, folder: Path, ids: np.ndarray, rope: torch.Tensor, progress: Callable[[int], object]
) -> Stream:
    """The unquantized model's hidden states behind its last layer, [tokens, hidden]."""
    count, ctx = loader.config.num_hidden_layers, int(ids.shape[1])
    tell = by_layers(progress, count)

    (hidden,) = make_streams(1, ids.size, loader.config.hidden_size, loader.options.device, folder)

    def process(index: int) -> Made:
        layer = loader.layer(index)
        for rows in batches(ids.size, ctx):
            out, _ = layer(hidden[rows].unflatten(0, (-1, ctx)), rope)
            hidden[rows] = out.flatten(0, 1)
            tell(index * ids.size + rows.stop)
        return {}, None

    through_layers(folder, loader, ids, {"ideal": hidden}, process, lambda layers: tell(layers * ids.size))
    return hidden


def _held_out(whole: Whole, tokens: Tokens) -> float:
    """The mean divergence of the windows that are held out."""
    sums = [len(windows) * whole.divergence(*tokens.of(windows)) for windows in tokens.held]
    return sum(sums) / sum(map(len, tokens.held))


def _train(whole: Whole, tokens: Tokens, pieces: Pieces, progress: Callable[[int], object]) -> float:
    """Train what the model has. Returns the divergence of what is held out before."""
    before, begin = _resumed(whole, pieces)
    if begin == 0:
        before = _held_out(whole, tokens)
        for path in pieces.folder.glob("*.safetensors"):
            path.unlink()
    steps, ctx = len(tokens.trained), tokens.ids.shape[1]
    progress(sum(map(len, tokens.trained[:begin])) * ctx)
    every = max(1, steps // SNAPSHOTS)
    for step in range(begin, steps):
        whole.learn(*tokens.of(tokens.trained[step]), _share(step, steps))
        progress(len(tokens.trained[step]) * ctx)
        if (step + 1) % every == 0 or step + 1 == steps:
            last = sorted(pieces.folder.glob("*.safetensors"))
            state = {name: tensor.cpu().numpy() for name, tensor in _state(whole)}
            save_layer(pieces.folder / f"step-{step + 1:09d}.safetensors", state, pieces, before)
            for path in last:
                path.unlink()
    return before


def _share(step: int, steps: int) -> float:
    """Of the largest step: a line up to it, and a cosine down."""
    share = (step + 1) / steps
    return share / WARM if share < WARM else 0.5 + 0.5 * math.cos(math.pi * (share - WARM) / (1 - WARM))


def _state(whole: Whole) -> Iterator[tuple[str, torch.Tensor]]:
    """All that training changes."""
    for one in whole.trained:
        for key, tensor in one.state.items():
            yield f"{one.name}.{key}", tensor


def _resumed(whole: Whole, pieces: Pieces) -> tuple[float, int]:
    """Go on from the last snapshot that is as it was written: the divergence before, and steps done, 0 without one."""
    for path in sorted(pieces.folder.glob("step-*.safetensors"), reverse=True):
        if pieces.holds(path) and not pieces.damaged([path]):
            with safe_open(path, "pt") as file:
                for name, tensor in _state(whole):
                    tensor.copy_(file.get_tensor(name))
                return json.loads(file.metadata()["about"]), int(path.stem[-9:])
    return math.inf, 0
