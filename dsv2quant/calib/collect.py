"""Collecting statistics: calibration tokens through the unquantized model by layer, every linear's input measured.

One layer's weights are in memory; hidden states lie in a work folder beside the statistics file, from which a killed
run continues with the layer it was at.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from dsv2quant.arch.config import ModelConfig
from dsv2quant.calib.calibration import Calibration, layer_file
from dsv2quant.calib.hidden import batches, make_streams
from dsv2quant.calib.statistics import inputs
from dsv2quant.calib.streams import Made, through_layers
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import InputError
from dsv2quant.model.attention import Rope
from dsv2quant.model.layers import MoE, Stage, finish
from dsv2quant.model.load import DecoderLayer, Loader, LoadOptions


class Sums:
    """Running statistics of inputs by site (`calib/statistics.py`), on the device; sums in float64."""

    def __init__(self, sites: Set[str]) -> None:
        self._sites = sites
        self.counts: dict[str, int] = defaultdict(int)
        self._tensors: dict[str, torch.Tensor] = {}

    def add(self, stage: Stage) -> None:
        """What a stage's linears are applied to. Of those that share an input, one gives its site the name."""
        if stage.half:
            (kv_b_proj,) = stage.linears
            squares = stage.x.square().sum((0, 2), dtype=torch.float64)  # of [windows, heads, ctx, columns]
            self.accumulate(f"{kv_b_proj.module}.{stage.half}.square", squares.flatten())
            return
        for site in self._sites & {linear.module for linear in stage.linears}:
            x = stage.x.flatten(0, -2)
            self.counts[site] += len(x)
            self.widen(f"{site}.amax", x.abs())
            squares = x.square()
            self.accumulate(f"{site}.square", squares.sum(0, dtype=torch.float64))
            if stage.routed is not None:
                weighted = squares * stage.routed.square()[:, None]
                self.accumulate(f"{site}.weighted_square", weighted.sum(0, dtype=torch.float64))

    def widen(self, name: str, magnitudes: torch.Tensor) -> None:
        """Largest magnitudes [tokens, K] of a tensor of their own."""
        seen = magnitudes.amax(0).float()
        self._tensors[name] = torch.maximum(self._tensors[name], seen) if name in self._tensors else seen

    def accumulate(self, name: str, values: torch.Tensor) -> None:
        """Sums of a tensor of their own."""
        self._tensors[name] = self._tensors[name] + values if name in self._tensors else values

    def unseen(self, site: str, columns: int) -> None:
        """An expert that no token was routed to."""
        self.counts[site] += 0
        for suffix in ("amax", "square", "weighted_square"):
            self._tensors.setdefault(f"{site}.{suffix}", torch.zeros(columns))

    def arrays(self) -> dict[str, np.ndarray]:
        """float32 arrays by name, sorted. Raises InputError where an input was NaN or infinite."""
        arrays = {name: self._tensors[name].float().cpu().numpy() for name in sorted(self._tensors)}
        odd = next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)
        if odd is not None:
            fix = "the checkpoint is damaged, or its activations overflow float32"
            raise InputError("its inputs are not finite", where=odd.rpartition(".")[0], fix=fix)
        return arrays


@torch.inference_mode()
def collect(
    checkpoint: Checkpoint,
    folder: Path,
    calibration: Calibration,
    device: str = "cpu",
    halves: bool = False,
    progress: Callable[[int], object] = lambda tokens: None,
) -> dict[str, int]:
    """Measure every layer, in `folder`, which keeps what is finished; returns tokens by site.

    `halves` adds the inputs of kv_b_proj's halves, for which attention over latents takes three times the arithmetic.
    """
    config, ids = checkpoint.config, calibration.ids
    loader = Loader(checkpoint, LoadOptions(torch.float32, device, weight_only=True))
    ctx = int(ids.shape[1])
    rope = Rope(config, torch.device(device)).table(torch.arange(ctx, device=device))
    sites = {site for site, *_ in inputs(config)}

    (hidden,) = make_streams(1, ids.size, config.hidden_size, device, folder)

    def process(index: int) -> Made:
        layer, sums = loader.layer(index), Sums(sites)
        for rows in batches(len(hidden), ctx):
            x = hidden[rows].unflatten(0, (-1, ctx))
            hidden[rows] = _measured(layer, f"model.layers.{index}", x, rope, halves, sums).flatten(0, 1)
            progress(rows.stop - rows.start)
        if isinstance(layer.ffn, MoE):
            for expert in layer.ffn.experts:
                sums.unseen(expert.gate_proj.module, config.hidden_size)
                sums.unseen(expert.down_proj.module, config.moe_intermediate_size)
        return sums.arrays(), dict(sorted(sums.counts.items()))

    through_layers(folder, loader, ids, {"ideal": hidden}, process, lambda layers: progress(layers * ids.size))
    hidden.remove()
    counts: dict[str, int] = {}
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
