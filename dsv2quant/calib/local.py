"""Tuning a layer at a time, of a model that the device can't hold whole: each layer of the artifact is trained to give
what the unquantized layer gives, from what the tuned layers before it give.

Three streams of hidden states go through the layers: the unquantized model's, the artifact's as it was, and as it is
tuned. The loss is each token's squared error over its own mean square, as the last norm takes lengths away: else the
few tokens whose states are huge, a window's first among them, would be all that counts. What lies outside of the
layers stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from dsv2quant.arch.spec import TensorSpec
from dsv2quant.calib.calibration import layer_file
from dsv2quant.calib.hidden import Stream, batches, make_streams, rows_of
from dsv2quant.calib.streams import Made, by_layers, through_layers
from dsv2quant.calib.trained import Parts, Trained
from dsv2quant.calib.whole import Held, asked_values, held_ends, held_layer, put_values, take_step
from dsv2quant.model.load import DecoderLayer, Ends, Loader

SIDES = ("ideal", "before", "tuned")
IDEAL, BEFORE, TUNED = range(3)
Steps = Sequence[tuple[np.ndarray, float]]  # windows, and the share of the largest step


def tune_layers(
    loader: Loader, rope: torch.Tensor, specs: Sequence[TensorSpec], held: Held, ids: np.ndarray, apart: np.ndarray,
    steps: Steps, folder: Path, progress: Callable[[int], object],
) -> tuple[dict[str, Parts], float, float]:  # fmt: skip
    """Train each layer by all steps, on windows of ids [windows, ctx] without those that are held `apart`, in `folder`,
    where a killed run continues behind the last layer that is finished. `loader` is of the unquantized model, and
    `held` what the artifact has of each of its weights, `specs`. `progress` is called with tokens that went through
    all layers, and again with those that all were trained on.

    Returns what is stored of each weight that was trained, and the divergence of what is held apart, before and after.
    """
    count, ctx = loader.config.num_hidden_layers, ids.shape[1]
    behind = held_ends(loader, specs, held)
    put_values(behind.trained)
    of_layer = ids.size + sum(len(windows) for windows, _ in steps) * ctx
    tell = by_layers(progress, count)
    device, width = loader.options.device, loader.config.hidden_size
    out = make_streams(len(SIDES), ids.size, width, device, folder)
    before = make_streams(len(SIDES), ids.size, width, device, folder)

    def process(index: int) -> Made:
        for stream, last in zip(before, out, strict=True):
            stream.take(last)
        layer = _Layer(index, rope, ids, apart, behind.ends, before, out)
        layer.through(loader.layer(index), IDEAL)
        module, trained = held_layer(loader, index, specs, held)
        put_values(trained)
        layer.through(module, BEFORE)
        layer.through(module, TUNED)
        passed = index * of_layer + ids.size
        tell(passed)
        loss = layer.loss()
        for windows, share in steps:
            layer.learn(module, trained, windows, share)
            passed += len(windows) * ctx
            tell(passed)
        parts = {one.name: one.settle() for one in trained}
        put_values(trained)
        layer.through(module, TUNED)
        if not layer.loss() < loss:
            module, trained = held_layer(loader, index, specs, held)
            put_values(trained)
            layer.through(module, TUNED)
            parts = {}
        return {f"{name}/{suffix}": array for name, some in parts.items() for suffix, array in some.items()}, None

    through_layers(
        folder, loader, ids, dict(zip(SIDES, out, strict=True)), process, lambda layers: tell(layers * of_layer)
    )
    found: dict[str, Parts] = {}
    for index in range(count):
        for key, array in load_file(layer_file(folder, index)).items():
            name, suffix = key.split("/")
            found.setdefault(name, {})[suffix] = array
    rows = rows_of(apart, ctx)
    with torch.no_grad():
        was, now = (float(behind.divergence(out[s][rows], out[IDEAL][rows])) for s in (BEFORE, TUNED))
    for stream in (*before, *out):
        stream.remove()
    return found, was / len(rows), now / len(rows)


@dataclass(frozen=True)
class _Layer:
    """The streams before a layer and behind it, [tokens, hidden] each; `ends` are the artifact's."""

    index: int
    rope: torch.Tensor
    ids: np.ndarray
    apart: np.ndarray
    ends: Ends
    before: Sequence[Stream]
    out: Sequence[Stream]

    @torch.no_grad()
    def through(self, module: DecoderLayer, side: int) -> None:
        """A stream goes through the layer."""
        ctx = self.ids.shape[1]
        for rows in batches(self.ids.size, ctx):
            out, _ = module(self._inputs(side, np.arange(rows.start, rows.stop)), self.rope)
            self.out[side][rows] = out.flatten(0, 1)

    def _inputs(self, side: int, rows: np.ndarray) -> torch.Tensor:
        """[windows, ctx, hidden], of whole windows."""
        x = self.before[side][rows]
        if self.index == 0 and side != IDEAL:  # an embedding that is quantized
            x = self.ends.embed(torch.from_numpy(self.ids.reshape(-1)[rows]).to(x.device))
        return x.unflatten(0, (-1, self.ids.shape[1]))

    @torch.no_grad()
    def loss(self) -> float:
        """Of what is held apart."""
        rows = rows_of(self.apart, self.ids.shape[1])
        return float(_error(self.out[TUNED][rows], self.out[IDEAL][rows]))

    def learn(self, module: DecoderLayer, trained: Sequence[Trained], windows: np.ndarray, share: float) -> None:
        """Take a step of all weights that brings the windows' loss down."""
        rows = rows_of(windows, self.ids.shape[1])
        values = asked_values(trained)
        out, _ = module(self._inputs(TUNED, rows), self.rope)
        gradients = torch.autograd.grad(_error(out.flatten(0, 1), self.out[IDEAL][rows]), values, allow_unused=True)
        take_step(trained, values, gradients, share)


def _error(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The mean over tokens [tokens, hidden] of the squared error over the mean square."""
    return ((found - wanted).square().sum(-1) / wanted.square().mean(-1).clamp(min=1e-20)).mean()
