"""Opening a model on a backend: the reference in torch, or the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.model.load import LoadOptions
from dsv2quant.progress import Progress, no_progress

if TYPE_CHECKING:
    from dsv2quant.model.fused_model import FusedModel
from dsv2quant.model.runtime import Model


def open_model(
    checkpoint: Checkpoint, options: LoadOptions, *, stream: bool = False, progress: Progress = no_progress
) -> Model | FusedModel:
    """The model on the backend that the options name."""
    layers = 0 if stream else checkpoint.config.num_hidden_layers
    with progress(layers, "layers", f"load {checkpoint.model}") as loaded:
        return _open(checkpoint, options, stream, loaded)


def _open(
    checkpoint: Checkpoint, options: LoadOptions, stream: bool, loaded: Callable[[int], object]
) -> Model | FusedModel:
    if options.backend == "torch":
        return Model(checkpoint, options, stream=stream, loaded=loaded)
    from dsv2quant.model.fused_model import FusedModel  # with Triton, which is not on every machine
    from dsv2quant.model.source import CheckpointSource

    return FusedModel(
        CheckpointSource(checkpoint, options.device, options.dtype), options, stream=stream, loaded=loaded
    )
