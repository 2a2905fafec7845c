"""Quantizing a whole model with calibration: each layer in turn, on the streams that the layers before it left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from dsv2quant.arch.deepseek_v2 import LINEAR_ROLES
from dsv2quant.calib.calibration import Calibration, Encoded, Prepared, work_weights
from dsv2quant.calib.layerwise import Job, quantize_layer, twin
from dsv2quant.calib.streams import Made, Spool, through_layers
from dsv2quant.formats.fp8 import INPUT_SCALE
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.attention import Rope
from dsv2quant.model.load import TORCH_DTYPES, Loader, LoadOptions
from dsv2quant.planning.plan import Line, Plan
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
    """The layer unquantized, and its twin in which everything that needs no calibration is quantized already."""
    ideal = loader.layer(layer)
    job = Job(f"model.layers.{layer}", {}, ideal, twin(ideal), rope, *shape)
    choices: dict[str, tuple[str, str, str]] = {}
    for step in plan.steps:
        lines = [line for line in step.lines if line.slot.layer == layer and line.slot.role in LINEAR_ROLES]
        choices |= {line.slot.module: (line.slot.role, line.scheme, line.method) for line in lines}
        for line in lines:
            _check_finite(plan, line, job.linear(line.slot.module).weight)
        if not lines or lines[0].is_copy or lines[0].method in CALIBRATED:
            continue
        codec = CODECS[lines[0].scheme]
        weights = [plan.checkpoint.encodable(line.weight) for line in lines]
        inputs = [prepared.inputs(line) for line in lines if line.needs_inputs]
        for line, parts in zip(lines, codec.encode(weights, device, lines[0].encoding, inputs), strict=True):
            tensors = {
                part.suffix: torch.from_numpy(parts[part.suffix]).view(TORCH_DTYPES[part.dtype]).to(device)
                for part in codec.layout(line.slot.shape)
            }
            linear = job.linear(line.slot.module)
            linear.weight, linear.activation = codec.decode(tensors, torch.float32), codec.activation
            linear.input_scale = tensors.get(INPUT_SCALE)
    job.choices = choices
    return job


def _check_finite(plan: Plan, line: Line, weight: torch.Tensor) -> None:
    """Raise InputError where a weight is NaN, infinite or beyond BF16's range: GPTQ would round it to anything."""
    if not torch.stack(weight.aminmax()).bfloat16().isfinite().all():
        raise plan.checkpoint.not_finite(line.weight, (~weight.bfloat16().isfinite()).nonzero()[0].tolist())
