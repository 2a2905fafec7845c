"""Collecting statistics: calibration tokens through the unquantized model by layer, every linear's input measured.

One layer's weights are in memory. A work folder beside the statistics file has the finished layers, from which a killed
run continues. Of several ranks each takes some of the tokens through all layers; what is measured of a layer is added
up at the first, in an order that doesn't depend on how many ranks there are.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from dsv2quant.arch.config import ModelConfig
from dsv2quant.calib.calibration import Calibration, layer_file
from dsv2quant.calib.distributed import ALONE, Ranks, TreeSum
from dsv2quant.calib.hidden import batches, make_streams
from dsv2quant.calib.statistics import vectors
from dsv2quant.calib.streams import Made, through_layers
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import InputError
from dsv2quant.model.attention import Rope
from dsv2quant.model.layers import Stage, finish
from dsv2quant.model.load import DecoderLayer, Loader, LoadOptions


class Sums:
    """Statistics of one layer's inputs, on the device: maxima, and sums in float64 of each batch of tokens, which are
    added up in a tree over batches. `lengths` are those of all vectors, by name (`calib/statistics.py`)."""

    def __init__(self, lengths: Mapping[str, int], batches: int, device: str) -> None:
        self._lengths = {name: length for name, length in lengths.items() if name.endswith("square")}
        self._sites = {name.removesuffix(".square") for name in lengths}
        self._tree, self._device = TreeSum(batches), device
        self._batch: dict[str, torch.Tensor] = {}
        self._maxima = {
            name: torch.zeros(length, device=device) for name, length in lengths.items() if name not in self._lengths
        }
        self._counts: dict[str, int] = defaultdict(int)

    def add(self, stage: Stage) -> None:
        """What a stage's linears are applied to, in this batch. Of those that share an input, one gives its site the
        name."""
        if stage.half:
            (kv_b_proj,) = stage.linears
            squares = stage.x.square().sum((0, 2), dtype=torch.float64)  # of [windows, heads, ctx, columns]
            self._batch[f"{kv_b_proj.module}.{stage.half}.square"] = squares.flatten()
            return
        for site in self._sites & {linear.module for linear in stage.linears}:
            x = stage.x.flatten(0, -2)
            self._counts[site] += len(x)
            self.widen(f"{site}.amax", x.abs())
            squares = x.square()
            self._batch[f"{site}.square"] = squares.sum(0, dtype=torch.float64)
            if stage.routed is not None:
                weighted = squares * stage.routed.square()[:, None]
                self._batch[f"{site}.weighted_square"] = weighted.sum(0, dtype=torch.float64)

    def widen(self, name: str, magnitudes: torch.Tensor) -> None:
        """Largest magnitudes [tokens, K] of a tensor of their own."""
        self._maxima[name] = torch.maximum(self._maxima[name], magnitudes.amax(0).float())

    def end_batch(self, number: int) -> None:
        """Of the numbers of this rank's share, each behind the one before. An expert may have seen no token."""
        sums = [
            self._batch.get(name, torch.zeros(length, dtype=torch.float64, device=self._device))
            for name, length in self._lengths.items()
        ]
        self._tree.add(number, [torch.cat(sums)])
        self._batch = {}

    def total(self, ranks: Ranks) -> Made:
        """Of all ranks at the first, nothing elsewhere: float32 arrays by name, and tokens by site, both sorted. Raises
        InputError where an input was NaN or infinite."""
        summed = self._tree.total(ranks)
        maxima = ranks.gather({name: values.cpu().numpy() for name, values in self._maxima.items()})
        counts = ranks.gather(dict(self._counts))
        if summed is None or maxima is None or counts is None:
            return {}, {}
        parts = summed[0].float().cpu().split(list(self._lengths.values()))
        arrays = {name: part.numpy() for name, part in zip(self._lengths, parts, strict=True)}
        arrays |= {name: np.max([some[name] for some in maxima], 0) for name in self._maxima}
        odd = next((name for name in sorted(arrays) if not np.isfinite(arrays[name]).all()), None)
        if odd is not None:
            fix = "the checkpoint is damaged, or its activations overflow float32"
            raise InputError("its inputs are not finite", where=odd.rpartition(".")[0], fix=fix)
        sites = sorted(name.removesuffix(".amax") for name in self._maxima if name.endswith(".amax"))
        tokens = {site: sum(some.get(site, 0) for some in counts) for site in sites}
        return {name: arrays[name] for name in sorted(arrays)}, tokens


@torch.inference_mode()
def collect(
    checkpoint: Checkpoint,
    folder: Path | None,
    calibration: Calibration,
    device: str = "cpu",
    halves: bool = False,
    progress: Callable[[int], object] = lambda tokens: None,
    ranks: Ranks = ALONE,
) -> dict[str, int]:
    """Measure every layer, in `folder`, which keeps what is finished and is the first rank's alone; returns tokens by
    site, to that rank. `progress` is called with tokens of this rank that went through a layer. Raises UsageError for
    more ranks than batches of tokens.

    `halves` adds the inputs of kv_b_proj's halves, for which attention over latents takes three times the arithmetic.
    """
    config, ids = checkpoint.config, calibration.ids
    loader = Loader(checkpoint, LoadOptions(torch.float32, device, weight_only=True))
    ctx = int(ids.shape[1])
    rope = Rope(config, torch.device(device)).table(torch.arange(ctx, device=device))
    every, lengths = batches(ids.size, ctx), vectors(config, halves)
    own = ranks.span(every)
    mine = ids.reshape(-1)[own].reshape(-1, ctx)
    (hidden,) = make_streams(1, mine.size, config.hidden_size, device, folder)

    def measured(index: int) -> Sums:
        at, layer = f"model.layers.{index}", loader.layer(index)
        of_layer = {name: length for name, length in lengths.items() if name.startswith(f"{at}.")}
        sums = Sums(of_layer, len(every), device)
        for number, rows in zip(ranks.share(len(every)), batches(mine.size, ctx), strict=True):
            x = hidden[rows].unflatten(0, (-1, ctx))
            hidden[rows] = _measured(layer, at, x, rope, halves, sums).flatten(0, 1)
            sums.end_batch(number)
            progress(rows.stop - rows.start)
        return sums

    def process(index: int) -> Made:
        return measured(index).total(ranks)

    again = measured if ranks.size > 1 else None  # one rank keeps its hidden states instead, behind each layer
    through_layers(
        folder, loader, mine, {"ideal": hidden}, process, lambda layers: progress(layers * mine.size), again, ranks
    )
    hidden.remove()
    counts: dict[str, int] = {}
    if folder is None:
        return counts
    for index in range(config.num_hidden_layers):
        counts |= json.loads(safe_open(layer_file(folder, index), "np").metadata()["about"])
    return counts


def _measured(
    layer: DecoderLayer, at: str, x: torch.Tensor, rope: torch.Tensor, halves: bool, sums: Sums
) -> torch.Tensor:
    """Hidden states behind the layer for those before it, x [windows, ctx, hidden], with everything added to `sums`.

    With `halves` attention is absorbed: so kv_b_proj's halves have inputs of their own.
    """
    keys = _Keys(f"{at}.self_attn", layer.attention.config, sums)
    out, _ = finish(layer.stages(x, rope, keys, absorbed=halves), sums.add)
    return out


@dataclass
class _Keys:
    """In the place of a layer's cache: measures the keys that it would take, and the values of plain attention."""

    at: str
    config: ModelConfig
    sums: Sums

    def append(
        self, first: torch.Tensor, second: torch.Tensor, *, as_stored: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = second if self.config.is_mla else first
        by_head = keys.flatten(0, 1).unflatten(1, (-1, self.config.qk_rope_head_dim))  # [tokens, heads, width]
        radii = Rope.pairs(by_head, self.config.rope_halves).square().sum(-1).sqrt()
        self.sums.widen(f"{self.at}.k_pe_radius", radii.flatten(1))
        if not self.config.is_mla:
            self.sums.widen(f"{self.at}.v_amax", second.flatten(0, 1).abs())
        return first, second
