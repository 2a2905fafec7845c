"""Taking calibration tokens through a model layer by layer, resumable after each.

A work folder holds, per finished layer, what was made of it (`layer-N.safetensors`), and one or two streams of hidden
states in front of the next. Only one layer's weights are in memory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from dsv2quant.calib.calibration import layer_file
from dsv2quant.calib.pieces import Pieces
from dsv2quant.calib.spool import ROWS, Spool
from dsv2quant.model.load import Loader
from dsv2quant.writer import file_entry, write_whole

logger = logging.getLogger(__name__)

Made = tuple[dict[str, np.ndarray], Any]  # tensors, and what goes beside them as JSON
# layer, hidden states before it, where those behind it go → what was made of it
Process = Callable[[int, Sequence[Spool], Sequence[Spool]], Made]


def through_layers(
    folder: Path,
    loader: Loader,
    ids: np.ndarray,
    sides: Sequence[str],
    process: Process,
    kept: Callable[[int], object],
) -> None:
    """Call `process` for every layer that `folder` doesn't hold yet, and keep what it returns there.

    `ids` are token windows [windows, ctx]; each of `sides` names a stream, all of which begin with their embeddings.
    `kept` is called with how many layers were finished before.
    """
    config, device, tokens = loader.checkpoint.config, loader.options.device, ids.size
    count = config.num_hidden_layers

    def files(layer: int) -> list[Path]:
        return [folder / f"hidden-{layer:05d}-{side}" for side in sides]

    def streams(layer: int) -> list[Spool]:
        return [Spool(path, tokens, config.hidden_size, device) for path in files(layer)]

    with Pieces(folder) as pieces:
        start = _finished(pieces, count, files)
        kept(start)
        if start:
            logger.info("calibration continues at layer %d of %d", start, count)
        else:
            pieces.clear()
            _embed(loader, torch.from_numpy(ids.reshape(-1)), streams(0), pieces)
        for layer in range(start, count):
            for path in files(layer + 1):
                path.unlink(missing_ok=True)
            before, behind = streams(layer), streams(layer + 1)
            tensors, about = process(layer, before, behind)
            for spool in behind:
                spool.keep(pieces)
            save_layer(layer_file(folder, layer), tensors, pieces, about)
            for spool in before:
                spool.remove()


def _finished(pieces: Pieces, count: int, streams: Callable[[int], list[Path]]) -> int:
    """Of how many layers a run before left what is needed: themselves and, if any is missing, the streams in front of
    the next. A layer can't be made again alone, so if one of these files isn't what was written, it is none."""
    layers = [layer_file(pieces.folder, layer) for layer in range(count)]
    start = next((layer for layer, path in enumerate(layers) if not pieces.holds(path)), count)
    damaged = pieces.damaged([*layers[:start], *(streams(start) if 0 < start < count else ())])
    for path in damaged:
        logger.warning("%s: is not what was written to it; calibration starts over", path)
    return 0 if damaged else start


def batches(tokens: int, ctx: int) -> list[slice]:
    """Slices of whole windows, about `ROWS` tokens each."""
    size = max(1, ROWS // ctx) * ctx
    return [slice(first, min(first + size, tokens)) for first in range(0, tokens, size)]


def _embed(loader: Loader, tokens: torch.Tensor, streams: Sequence[Spool], pieces: Pieces) -> None:
    ends = loader.ends()
    for stream in streams:
        for first in range(0, len(tokens), ROWS):
            stream[slice(first, first + ROWS)] = ends.embed(tokens[first : first + ROWS].to(stream.device))
        stream.keep(pieces)


def save_layer(path: Path, tensors: dict[str, np.ndarray], pieces: Pieces, about: Any = None) -> None:
    """Write what was made of a layer: durable under its own name and recorded, or not there."""
    content = save(tensors, {"about": json.dumps(about)})  # save_file() raises no OSError on a full disk
    pieces.record(path, file_entry(content))
    write_whole(path, [content])
