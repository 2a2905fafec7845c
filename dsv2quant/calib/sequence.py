"""Quantizing a whole model with calibration: each layer in turn, on the streams that the layers before it left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from dsv2quant.calib.calibration import Calibration, Encoded, Prepared, work_weights
from dsv2quant.calib.layerwise import Job, copied, quantize_layer
from dsv2quant.calib.streams import Made, Spool, through_layers
from dsv2quant.checkpoint.checkpoint import torch_dtype
from dsv2quant.formats.fp8 import INPUT_SCALE
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.attention import Rope
from dsv2quant.model.load import Loader, LoadOptions
from dsv2quant.planning.plan import Entry, Plan
from dsv2quant.planning.recipe import CALIBRATED


@torch.inference_mode()
def quantize_layers(
    plan: Plan,
    folder: Path,
    calibration: Calibration,
    device: str = "cpu",
    progress: Callable[[int], object] = lambda weights: None,
    prepared: Prepared | None = None,
) -> Encoded:
    """Encode every line whose method needs calibration, in `folder`, which keeps what is finished; `progress` is called
    with weights whose codes are chosen. Other lines may need statistics, in `prepared`."""
    prepared = prepared or Prepared(plan)
    config, ids = plan.checkpoint.config, calibration.ids
    loader = Loader(plan.checkpoint, LoadOptions(torch.float32, device, weight_only=True))
    windows, ctx = (int(n) for n in ids.shape)
    rope = Rope(config, torch.device(device)).table(torch.arange(ctx, device=device))
    width = config.num_attention_heads * config.v_head_dim

    def process(layer: int, before: Sequence[Spool], behind: Sequence[Spool]) -> Made:
        job = _job(plan, loader, layer, rope, (windows, ctx), device, prepared)
        real, ideal = (Spool(folder / f"context-{side}", ids.size, width, device) for side in ("real", "ideal"))
        job.progress = progress
        quantize_layer(job, (before[0], before[1]), (behind[0], behind[1]), (real, ideal))
        real.remove()
        ideal.remove()
        tensors = {f"{module}.{suffix}": bits for module, parts in job.parts.items() for suffix, bits in parts.items()}
        return tensors, [asdict(outcome) for outcome in job.outcomes]

    through_layers(
        folder, loader, ids, ("real", "ideal"), process, lambda layers: progress(work_weights(plan, range(layers)))
    )
    return Encoded(folder, config.num_hidden_layers)


def _job(
    plan: Plan, loader: Loader, layer: int, rope: torch.Tensor, shape: tuple[int, int], device: str, prepared: Prepared
) -> Job:
    """The layer unquantized, and a copy in which everything that needs no calibration is quantized already."""
    ideal = loader.layer(layer)
    job = Job(f"model.layers.{layer}", {}, ideal, copied(ideal), rope, *shape)
    choices: dict[str, tuple[str, str, str]] = {}
    for step in plan.steps:
        entries = [entry for entry in step.entries if entry.spec.layer == layer and not entry.spec.keep]
        choices |= {entry.spec.module: (entry.spec.role, entry.scheme, entry.method) for entry in entries}
        for entry in entries:
            _check_finite(plan, entry, job.linear(entry.spec.module).weight)
        if not entries or entries[0].is_copy or entries[0].method in CALIBRATED:
            continue
        codec = CODECS[entries[0].scheme]
        weights = [plan.checkpoint.encodable(entry.weight) for entry in entries]
        inputs = [prepared.inputs(entry) for entry in entries if entry.needs_inputs]
        for entry, parts in zip(entries, codec.encode(weights, device, entries[0].encoding, inputs), strict=True):
            tensors = {
                part.suffix: torch.from_numpy(parts[part.suffix]).view(torch_dtype(part.dtype)).to(device)
                for part in codec.layout(entry.spec.shape)
            }
            linear = job.linear(entry.spec.module)
            linear.weight, linear.activation = codec.decode(tensors, torch.float32), codec.activation
            linear.input_scale = tensors.get(INPUT_SCALE)
    job.choices = choices
    return job


def _check_finite(plan: Plan, entry: Entry, weight: torch.Tensor) -> None:
    """Raise InputError where a weight is NaN, infinite or beyond BF16's range: GPTQ would round it to anything."""
    if not torch.stack(weight.aminmax()).bfloat16().isfinite().all():
        raise plan.checkpoint.not_finite(entry.weight, (~weight.bfloat16().isfinite()).nonzero()[0].tolist())
