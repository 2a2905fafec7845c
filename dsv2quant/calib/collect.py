"""Collecting statistics: calibration tokens through the unquantized model by layer, every linear's input measured.

One layer's weights are in memory; hidden states lie in a work folder beside the statistics file, from which a killed
run continues with the layer it was at.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from dsv2quant.calib.calibration import Calibration, layer_file
from dsv2quant.calib.statistics import K_HALF, V_HALF
from dsv2quant.calib.streams import Made, Spool, batches, through_layers
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import InputError
from dsv2quant.model.attention import Rope
from dsv2quant.model.decoder import DecoderLayer
from dsv2quant.model.layers import FFN, MoE, add_rows, dispatch, route
from dsv2quant.model.load import Loader, LoadOptions


class Sums:
    """Running statistics of inputs by site (`calib/statistics.py`), on the device; sums in float64."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self._tensors: dict[str, torch.Tensor] = {}

    def add(self, site: str, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Inputs x [tokens, K] of a site, and routing weights [tokens] before an expert's linears."""
        self.counts[site] += len(x)
        self.widen(f"{site}.amax", x.abs())
        squares = x.square()
        self.accumulate(f"{site}.square", squares.sum(0, dtype=torch.float64))
        if weights is not None:
            weighted = squares * weights.square()[:, None]
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

    def process(index: int, before: Sequence[Spool], behind: Sequence[Spool]) -> Made:
        layer, sums, at = loader.layer(index), Sums(), f"model.layers.{index}"
        for rows in batches(len(before[0]), ctx):
            x = before[0][rows]
            x = x + _attention(layer, at, x, rope, ctx, halves, sums)
            normed = layer.post_attention_layernorm(x)
            if isinstance(layer.ffn, MoE):
                out = _moe(layer.ffn, f"{at}.mlp", normed, sums)
            else:
                sums.add(f"{at}.mlp.gate_proj", normed)
                out = _ffn(layer.ffn, f"{at}.mlp", normed, sums)
            behind[0][rows] = x + out
            progress(rows.stop - rows.start)
        if isinstance(layer.ffn, MoE):
            for expert in range(config.n_routed_experts):
                sums.unseen(f"{at}.mlp.experts.{expert}.gate_proj", config.hidden_size)
                sums.unseen(f"{at}.mlp.experts.{expert}.down_proj", config.moe_intermediate_size)
        return sums.arrays(), dict(sorted(sums.counts.items()))

    through_layers(folder, loader, ids, ("ideal",), process, lambda layers: progress(layers * ids.size))
    counts: dict[str, int] = {}
    for index in range(config.num_hidden_layers):
        counts |= json.loads(safe_open(layer_file(folder, index), "np").metadata()["about"])
    return counts


def _attention(
    layer: DecoderLayer, at: str, x: torch.Tensor, rope: torch.Tensor, ctx: int, halves: bool, sums: Sums
) -> torch.Tensor:
    """The attention's output for hidden states x [tokens, hidden], its linears' inputs and the cache's ranges added.

    With `halves` it is absorbed: so kv_b_proj's halves have inputs of their own.
    """
    attention, at = layer.attention, f"{at}.self_attn"
    normed = layer.input_layernorm(x)
    sums.add(f"{at}.kv_a_proj_with_mqa", normed)
    if attention.q_a_proj is not None:
        assert attention.q_a_layernorm is not None
        sums.add(f"{at}.q_b_proj", attention.q_a_layernorm(attention.q_a_proj(normed)))
    q_nope, q_pe, latent, k_pe = attention.projected(normed.unflatten(0, (-1, ctx)), rope)
    sums.add(f"{at}.kv_b_proj", latent.flatten(0, 1))
    sums.widen(f"{at}.k_pe_radius", k_pe.flatten(0, 1).unflatten(1, (-1, 2)).square().sum(-1).sqrt())
    if halves:
        mixed = attention.mixed(q_nope, q_pe, latent, k_pe)
        for half, x in ((K_HALF, q_nope), (V_HALF, mixed)):  # [windows, heads, ctx, ·]
            sums.accumulate(f"{at}.{half}.square", x.square().sum((0, 2), dtype=torch.float64).flatten())
        context = attention.values(mixed).flatten(0, 1)
    else:
        context = attention.expanded(q_nope, q_pe, latent, k_pe).flatten(0, 1)
    sums.add(f"{at}.o_proj", context)
    return attention.o_proj(context)


def _ffn(ffn: FFN, at: str, x: torch.Tensor, sums: Sums) -> torch.Tensor:
    activation = ffn.activation(x)
    sums.add(f"{at}.down_proj", activation)
    return ffn.down_proj(activation)


def _moe(moe: MoE, at: str, x: torch.Tensor, sums: Sums) -> torch.Tensor:
    """As `MoE.__call__`, with the inputs of router, experts and shared experts added."""
    sums.add(f"{at}.gate", x)
    out = torch.zeros_like(x)
    weights, chosen = route(x, moe.router, moe.routing)
    for expert, rows, routed in dispatch(weights, chosen, len(moe.experts)):
        ffn, name = moe.experts[expert], f"{at}.experts.{expert}"
        sums.add(f"{name}.gate_proj", x[rows], routed)
        activation = ffn.activation(x[rows])
        sums.add(f"{name}.down_proj", activation, routed)
        add_rows(out, rows, ffn.down_proj(activation) * routed[:, None])
    return out if moe.shared is None else out + _ffn(moe.shared, f"{at}.shared_experts", x, sums)
