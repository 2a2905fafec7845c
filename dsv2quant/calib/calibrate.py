"""Making a statistics file: locked while it is made, resumed after a kill, whole or not there."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dsv2quant import __version__
from dsv2quant.calib.calibration import Calibration, layer_file
from dsv2quant.calib.statistics import SCHEMA, Statistics
from dsv2quant.checkpoint import Checkpoint
from dsv2quant.config import ModelConfig
from dsv2quant.errors import InputError
from dsv2quant.progress import Progress, no_progress
from dsv2quant.shards import Output, Shard
from dsv2quant.writer import ShardWriter, disk_errors, dump_json, open_locked, sync_folder

logger = logging.getLogger(__name__)
STATE_FILE = "state.json"


def statistics_bytes(config: ModelConfig) -> int:
    """Size of a statistics file, its header aside: three vectors per routed expert's input, two per other one's."""
    expert = 3 * (config.hidden_size + config.moe_intermediate_size)
    rest = 2 * (3 * config.hidden_size + (config.q_lora_rank or 0) + config.kv_lora_rank)
    rest += 2 * (config.num_attention_heads * config.v_head_dim + config.intermediate_size)
    rest += config.num_attention_heads * (config.qk_nope_head_dim + config.kv_lora_rank)  # if asked for
    return 4 * config.num_hidden_layers * (config.n_routed_experts * expert + rest)


def calibrate(
    checkpoint: Checkpoint,
    out: Path,
    calibration: Calibration,
    *,
    device: str = "cpu",
    halves: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
) -> Statistics:
    """Measure `checkpoint` on `calibration` and write the statistics file `out`; what is there already is opened.

    `halves` adds what an importance matrix needs of kv_b_proj's halves. Work goes into the folder `<out>.work`, from
    which a killed run continues. Raises InputError where `out` holds something else, another run is making it, or the
    disk is too small.
    """
    with progress(0, "", "starting"):  # imports torch
        from dsv2quant.calib.collect import collect

    work = out.with_name(out.name + ".work")
    with progress(0, "", "prepare"):
        wanted: dict[str, Any] = {"model": checkpoint.identity(), "calibration": calibration.describe(device)}
    if out.exists() and not force:
        made = Statistics(out)
        shutil.rmtree(work, ignore_errors=True)  # a kill may have left it
        same = wanted == {"model": made.identity, "calibration": made.about["calibration"]}
        if same and (made.halves or not halves):
            return made
        what = "holds statistics of another model or another calibration"
        if same:
            what = "was measured without what an importance matrix needs"
        raise InputError(what, where=out, fix="give another file, or --force to replace it")
    config = checkpoint.config
    total = calibration.ids.size * config.num_hidden_layers
    with disk_errors(out), _claimed(work, wanted | {"halves": halves}, force):
        needed = 2 * statistics_bytes(config) + 2 * 4 * calibration.ids.size * config.hidden_size
        logger.info("%s and hidden states take at most %s bytes", out, f"{needed:,}")
        _check_space(out, needed)
        with progress(total, "tok·layer", "calibrate") as advance:
            counts = collect(checkpoint, work / "layers", calibration, device, halves, advance)
        about = {
            "schema": SCHEMA,
            "dsv2quant": __version__,
            "model": {"name": checkpoint.model, "revision": checkpoint.revision, "identity": wanted["model"]},
            "calibration": wanted["calibration"],
            "halves": halves,
            "counts": counts,
            "fingerprint": calibration.fingerprint,
        }
        _write(out, work / "layers", config.num_hidden_layers, about)
    return Statistics(out)


@contextmanager
def _claimed(work: Path, wanted: dict[str, Any], force: bool) -> Iterator[None]:
    """The work folder, locked; removed at the end, kept where it ends early."""
    work.mkdir(parents=True, exist_ok=True)
    state = open_locked(work / STATE_FILE, work)
    try:
        content, found = dump_json(wanted), os.pread(state, 1 << 20, 0)
        if found != content:
            begun = any(entry.name != STATE_FILE for entry in work.iterdir())
            if begun and not force:
                what = "holds an unfinished calibration of another model or text"
                raise InputError(what, where=work, fix="delete it, or --force to start over")
            shutil.rmtree(work / "layers", ignore_errors=True)
            os.ftruncate(state, 0)
            os.pwrite(state, content, 0)
            os.fsync(state)
        yield
        shutil.rmtree(work)
    finally:
        os.close(state)


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        what = f"needs {needed:,} bytes beside it, the disk has {free:,} free"
        raise InputError(what, where=out, fix="free space, or give a file on another disk")


def _write(out: Path, layers: Path, count: int, about: dict[str, Any]) -> None:
    """Join the layers' files, one tensor at a time."""
    files = [safe_open(layer_file(layers, layer), "np") for layer in range(count)]
    where = {name: file for file in files for name in sorted(file.keys())}
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in where.items()}
    outputs = tuple(Output(name, "F32", shape, 4 * shape[0]) for name, shape in shapes.items())
    shard = Shard(out.name, outputs, {"statistics": json.dumps(about, sort_keys=True)})
    with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as finisher:
        writer = ShardWriter(out.parent, shard, hasher, finisher)
        try:
            for name, file in where.items():
                writer.put(name, file.get_tensor(name))
        except BaseException:
            writer.abandon()
            raise
        writer.finish()
    sync_folder(out.parent)
