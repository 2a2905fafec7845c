"""An importance matrix from statistics: the same sums, under llama.cpp's names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.deepseek_v2 import architecture
from dsv2quant.arch.spec import K_B, V_B, GgufTensor
from dsv2quant.calib.statistics import K_HALF, V_HALF, Statistics
from dsv2quant.errors import InputError
from dsv2quant.formats.gguf.imatrix import FileEntry, Imatrix, is_written, read, write
from dsv2quant.storage.durable import disk_errors


def from_statistics(statistics: Statistics, config: ModelConfig) -> Imatrix:
    """What llama-imatrix measures on the same tokens: every matrix of the layers, routers included, and no other.

    `statistics` hold kv_b_proj's halves (`calibrate(…, halves=True)`).
    """
    matrices = [
        tensor for tensor in architecture(config).gguf_tensors() if tensor.layer is not None and len(tensor.shape) > 1
    ]
    entries = {tensor.name: _entry(statistics, tensor) for tensor in matrices}
    return Imatrix(entries, (statistics.source,), statistics.windows, statistics.ctx)


def _entry(statistics: Statistics, tensor: GgufTensor) -> FileEntry:
    if tensor.kind in (K_B, V_B):
        assert tensor.layer is not None
        sums = statistics.half_squares(tensor.layer, K_HALF if tensor.kind == K_B else V_HALF)
        return FileEntry(sums[None], np.array([statistics.tokens], np.float32))
    sums = np.stack([statistics.squares(spec) for spec in tensor.specs])
    return FileEntry(sums, np.array([statistics.count(spec) for spec in tensor.specs], np.float32))


def check_free(out: Path, statistics: Path, force: bool) -> None:
    """Raise InputError, before hours of work, where `out` holds something else than an imatrix of these statistics."""
    if out.resolve() == statistics.resolve():
        raise InputError("is the statistics file", where=out, fix="give the imatrix a name of its own")
    if not os.path.lexists(out):
        return
    if not out.is_file() or (not statistics.exists() and not force):
        raise InputError("exists", where=out, fix="give another file, or --force to replace it")
    _check_imatrix(out)


def _check_imatrix(out: Path) -> None:
    """Raise InputError for a file that is no imatrix: no --force replaces it."""
    try:
        read(out)
    except InputError:
        what, fix = "is there and no importance matrix", "give another file, or remove it yourself"
        raise InputError(what, where=out, fix=fix) from None


def write_imatrix(out: Path, statistics: Statistics, config: ModelConfig, force: bool) -> None:
    """Write the imatrix of `statistics` to `out`, where it may be already. Raises InputError where something else is,
    unless `force`, or the disk is full."""
    imatrix = from_statistics(statistics, config)
    with disk_errors(out):
        if out.exists() and not force:
            if not is_written(out, imatrix):
                raise InputError("holds something else", where=out, fix="give another file, or delete it")
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        write(out, imatrix)
