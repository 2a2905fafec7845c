"""Quantizing a whole model with calibration, layer by layer, resumable after each.

The work folder holds, per finished layer, its encoded matrices (`layer-N.safetensors`), and the two streams of hidden
states in front of the next one. Only one layer's weights are in memory.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.numpy import save

from dsv2quant.calib.calibration import Calibration, Encoded, layer_file
from dsv2quant.calib.layerwise import Job, quantize_layer, twin
from dsv2quant.calib.spool import ROWS, Spool
from dsv2quant.formats.codec import CODECS
from dsv2quant.formats.fp8 import INPUT_SCALE
from dsv2quant.model.load import TORCH_DTYPES, Loader, LoadOptions
from dsv2quant.model.rope import Rope
from dsv2quant.names import LINEAR_ROLES
from dsv2quant.plan import Plan
from dsv2quant.recipe import CALIBRATED

logger = logging.getLogger(__name__)


@torch.inference_mode()
def quantize_layers(
    plan: Plan,
    folder: Path,
    calibration: Calibration,
    device: str = "cpu",
    progress: Callable[[int], object] = lambda tokens: None,
) -> Encoded:
    """Encode every line whose method needs calibration, in `folder`, which keeps what is finished; `progress` is called
    with tokens that passed a layer."""
    folder.mkdir(exist_ok=True)
    config = plan.checkpoint.config
    loader = Loader(plan.checkpoint, LoadOptions(torch.float32, device, weight_only=True))
    tokens, layers = calibration.ids.size, config.num_hidden_layers
    start = _first_unfinished(folder, layers, tokens, config.hidden_size)
    progress(start * tokens)
    if start:
        logger.info("calibration continues at layer %d of %d", start, layers)
    rope = Rope(config, torch.device(device)).table(torch.arange(calibration.ids.shape[1], device=device))

    def streams(layer: int) -> tuple[Spool, Spool]:
        real, ideal = (Spool(p, tokens, config.hidden_size, device) for p in _stream_files(folder, layer))
        return real, ideal

    if start == 0:
        shutil.rmtree(folder)
        folder.mkdir()
        _embed(loader, torch.from_numpy(calibration.ids.reshape(-1)), streams(0))
    for layer in range(start, layers):
        for path in _stream_files(folder, layer + 1):
            path.unlink(missing_ok=True)
        job = _job(plan, loader, layer, rope, int(calibration.ids.shape[1]), device)
        width = config.num_attention_heads * config.v_head_dim
        contexts = tuple(Spool(folder / f"context-{side}", tokens, width, device) for side in ("real", "ideal"))
        before, behind = streams(layer), streams(layer + 1)
        quantize_layer(job, before, behind, (contexts[0], contexts[1]), progress)
        for spool in behind:
            spool.keep()
        _save(folder, layer, job)
        for spool in (*before, *contexts):
            spool.remove()
    return Encoded(folder, layers)


def _embed(loader: Loader, tokens: torch.Tensor, streams: tuple[Spool, Spool]) -> None:
    ends = loader.ends()
    for stream in streams:
        for first in range(0, len(tokens), ROWS):
            stream[slice(first, first + ROWS)] = ends.embed(tokens[first : first + ROWS].to(stream.device))
        stream.keep()


def _job(plan: Plan, loader: Loader, layer: int, rope: torch.Tensor, ctx: int, device: str) -> Job:
    """The layer unquantized, and its twin in which everything that needs no calibration is quantized already."""
    ideal = loader.layer(layer)
    job = Job(f"model.layers.{layer}", {}, ideal, twin(ideal), rope, ctx)
    choices: dict[str, tuple[str, str, str]] = {}
    for step in plan.steps:
        lines = [line for line in step.lines if line.slot.layer == layer and line.slot.role in LINEAR_ROLES]
        choices |= {line.slot.module: (line.slot.role, line.scheme, line.method) for line in lines}
        if not lines or lines[0].is_copy or lines[0].method in CALIBRATED:
            continue
        codec = CODECS[lines[0].scheme]
        weights = [plan.checkpoint.encodable(line.weight) for line in lines]
        for line, parts in zip(lines, codec.encode(weights, device, lines[0].method), strict=True):
            tensors = {
                part.suffix: torch.from_numpy(parts[part.suffix]).view(TORCH_DTYPES[part.dtype]).to(device)
                for part in codec.layout(line.slot.shape)
            }
            linear = job.linear(line.slot.module)
            linear.weight, linear.activation = codec.decode(tensors, torch.float32), codec.activation
            linear.input_scale = tensors.get(INPUT_SCALE)
    job.choices = choices
    return job


def _first_unfinished(folder: Path, layers: int, tokens: int, hidden: int) -> int:
    """The first layer without a file, if the streams in front of it are there; otherwise 0."""
    done = 0
    while done < layers and layer_file(folder, done).exists():
        done += 1
    whole = all(Spool.holds(path, tokens, hidden) for path in _stream_files(folder, done))
    return done if whole else 0


def _save(folder: Path, layer: int, job: Job) -> None:
    path = layer_file(folder, layer)
    partial = path.with_name(path.name + ".partial")
    tensors = {f"{module}.{suffix}": bits for module, parts in job.parts.items() for suffix, bits in parts.items()}
    # Not save_file(): on a full disk it raises no OSError.
    partial.write_bytes(save(tensors, {"outcomes": json.dumps([asdict(o) for o in job.outcomes])}))
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)


def _stream_files(folder: Path, layer: int) -> tuple[Path, Path]:
    return folder / f"hidden-{layer:05d}-real", folder / f"hidden-{layer:05d}-ideal"
