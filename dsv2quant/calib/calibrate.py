"""Making a statistics file: locked while it is made, resumed after a kill, whole or not there. An importance matrix
from statistics: the same sums, under llama.cpp's names. And what a calibrated conversion has ready before it reads
weights: statistics, smoothing, and matrices that are encoded already."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.spec import K_B, V_B, GgufTensor
from dsv2quant.calib.calibration import (
    Calibration,
    Prepared,
    layer_file,
    needs_calibration,
    needs_statistics,
    work_weights,
)
from dsv2quant.calib.distributed import ALONE, Ranks
from dsv2quant.calib.statistics import K_HALF, SCHEMA, V_HALF, Statistics, digest_of, read_about
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.identity import Source, configured
from dsv2quant.errors import InputError, listing
from dsv2quant.formats.gguf import imatrix
from dsv2quant.planning.plan import Plan
from dsv2quant.planning.smoothing import Smoothing
from dsv2quant.progress import Progress, no_progress
from dsv2quant.storage import engine
from dsv2quant.storage.durable import PARTIAL, StateLog, disk_errors, is_regular, refuse_inputs
from dsv2quant.storage.safetensors import Output, Shard, refuse_among_weights
from dsv2quant.version import __version__

logger = logging.getLogger(__name__)
STATE_FILE, LAYERS = "state.json", "layers"
MEASURE, QUANTIZE = "measure", "quantize"  # what ranks do together
_STATES = "dsv2quant.calibration/"  # schema of state files, in whichever version


def statistics_bytes(config: ModelConfig) -> int:
    """Size of a statistics file, its header aside: three vectors per routed expert's input, two per other one's."""
    expert = 3 * (config.hidden_size + config.moe_intermediate_size)
    rest = 2 * (3 * config.hidden_size + (config.q_lora_rank or 0) + sum(config.cached_widths))
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
    inputs: Iterable[Path] = (),
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
) -> Statistics:
    """Measure `checkpoint` on `calibration` and write the statistics file `out`; what is there already is opened.

    `halves` adds what an importance matrix needs of kv_b_proj's halves. Work goes into the folder `<out>.work`, from
    which a killed run continues. `inputs` are further files that were read for it. Raises InputError where `out` holds
    something else or is an input, another run is making it, the source changes meanwhile, or the disk is too small.
    `force` replaces statistics, nothing else. Of several `ranks` this is the first, which the others `follow`.
    """
    with progress(0, "", "starting"):  # imports torch
        from dsv2quant.calib.collect import collect

    work = work_folder(out)
    with progress(0, "", "prepare"):
        source = Source.of(checkpoint, {})
    model = {"identity": source.identity["weights"], "config": configured(checkpoint.config)}
    wanted = {"model": model, "calibration": calibration.describe(device)}
    _check_out(out, [*inputs, *checkpoint.inputs])
    if out.exists() and not force:
        made = _opened(out, wanted, halves)
        made.check(checkpoint)
        if work.is_dir() and set(os.listdir(work)) <= {STATE_FILE, LAYERS}:  # a kill may have left it
            with disk_errors(work), _claimed(work, {}, force=True):
                pass
        return made
    config = checkpoint.config
    total = calibration.ids.size * config.num_hidden_layers // ranks.size  # about, of several
    state = {"schema": f"{_STATES}1", "dsv2quant": __version__, "halves": halves, "stats": source.stats}
    with disk_errors(out), _claimed(work, state | wanted, force):
        needed = 2 * statistics_bytes(config) + 2 * 4 * calibration.ids.size * config.hidden_size
        logger.info("%s and hidden states take at most %s bytes", out, f"{needed:,}")
        if needed > (free := shutil.disk_usage(out.parent).free):
            what = f"needs {needed:,} bytes beside it, the disk has {free:,} free"
            raise InputError(what, where=out, fix="free space, or give a file on another disk")
        ranks.announce(MEASURE)
        with progress(total, "tok·layer", "calibrate") as advance:
            counts = collect(checkpoint, work / LAYERS, calibration, device, halves, advance, ranks)
        source.check_unchanged(checkpoint)
        about = {
            "schema": SCHEMA,
            "dsv2quant": __version__,
            "model": {"name": checkpoint.model, "revision": checkpoint.revision} | model,
            "calibration": wanted["calibration"],
            "halves": halves,
            "counts": counts,
            "fingerprint": calibration.fingerprint,
        }
        _write(out, work / LAYERS, config.num_hidden_layers, about)
    return Statistics(out)


def work_folder(out: Path) -> Path:
    """Where unfinished work on the statistics file `out` lies."""
    return out.with_name(out.name + ".work")


def is_begun(out: Path) -> bool:
    """Whether unfinished work on the statistics file `out` has a layer to go on behind."""
    return any((work_folder(out) / LAYERS).glob("layer-*.safetensors"))


def _check_out(out: Path, inputs: list[Path]) -> None:
    """Raise InputError where `out` is an input or would be read as one, or is neither free nor a statistics file."""
    refuse_inputs([out, out.with_name(out.name + PARTIAL)], inputs)
    refuse_among_weights(out, inputs)
    if not os.path.lexists(out):
        return
    if not out.is_file():
        raise InputError("is there and no file", where=out, fix="give another file")
    try:
        read_about(out)
    except InputError as error:
        what = str(error).removeprefix(f"{out}: ").partition(" (")[0]
        raise InputError(f"is there, and {what}", where=out, fix="give another file, or remove it yourself") from None


def _opened(out: Path, wanted: dict[str, Any], halves: bool) -> Statistics:
    """The statistics that are there. Raises InputError where these are others than is wanted."""
    made, fix = Statistics(out), "give another file, or --force to replace it"
    model = {key: made.about["model"][key] for key in wanted["model"]}
    if wanted != {"model": model, "calibration": made.about["calibration"]}:
        raise InputError("holds statistics of another model or another calibration", where=out, fix=fix)
    if halves and not made.halves:
        raise InputError("was measured without what an importance matrix needs", where=out, fix=fix)
    return made


@contextmanager
def _claimed(work: Path, wanted: dict[str, Any], force: bool) -> Iterator[None]:
    """The work folder, locked; removed at the end, kept where it ends early. Only what is in a folder with a state file
    of ours is ever removed, and only what we put there."""
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise InputError("is a link or no folder", where=work, fix="remove it")
    work.mkdir(parents=True, exist_ok=True)
    strange = {entry.name for entry in work.iterdir()} - {LAYERS, STATE_FILE}
    if strange or ((work / LAYERS).exists() and not is_regular(work / STATE_FILE)):
        what = f"is where unfinished work would go, and holds {listing(sorted(strange)) or LAYERS}, which is none"
        raise InputError(what, where=work, fix="give another output file, or move it away")
    state = StateLog(work / STATE_FILE, work)
    try:
        begun = (work / LAYERS).exists()
        if begun and not (state.lines and str(state.lines[0].get("schema")).startswith(_STATES)):
            raise InputError("holds files but no state of our work", where=work, fix="move them away")
        if not state.lines or state.lines[0] != wanted:
            if begun and not force:
                what = "holds an unfinished calibration of another model, text or version"
                raise InputError(what, where=work, fix="delete it, or --force to start over")
            shutil.rmtree(work / LAYERS, ignore_errors=True)
            state.start(wanted)
        yield
        shutil.rmtree(work / LAYERS, ignore_errors=True)
        os.unlink(work / STATE_FILE)  # last: what lies in a folder without it is not known to be ours
        work.rmdir()
    finally:
        state.close()


def _write(out: Path, layers: Path, count: int, about: dict[str, Any]) -> None:
    """Join the layers' files, one tensor at a time."""
    files = [safe_open(layer_file(layers, layer), "np") for layer in range(count)]
    where = {name: file for file in files for name in sorted(file.keys())}
    about = about | {"digest": digest_of(about, ((name, where[name].get_tensor(name)) for name in sorted(where)))}
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in where.items()}
    outputs = tuple(Output(name, "F32", shape, 4 * shape[0]) for name, shape in shapes.items())
    shard = Shard(out.name, outputs, {"statistics": json.dumps(about, sort_keys=True)})

    def jobs() -> Iterator[engine.Job]:
        for output, begin in shard.placed():
            span = (begin, begin + output.nbytes)
            encode = partial(_vector, where[output.name], output.name, begin)
            yield engine.Job(0, output.name, (span,), output.nbytes, output.nbytes, encode)

    engine.write(jobs(), [engine.Written(engine.File(out, shard.header, (shard.nbytes,)))])


def _vector(file: Any, name: str, begin: int) -> Iterator[tuple[int, np.ndarray]]:
    yield begin, file.get_tensor(name).view(np.uint8)


def check_imatrix(out: Path, statistics: Path, force: bool) -> None:
    """Raise InputError, before hours of work, where `out` holds something else than an imatrix of these statistics: no
    `force` replaces what is none."""
    if out.resolve() == statistics.resolve():
        raise InputError("is the statistics file", where=out, fix="give the imatrix a name of its own")
    if not os.path.lexists(out):
        return
    if not out.is_file() or (not statistics.exists() and not force):
        raise InputError("exists", where=out, fix="give another file, or --force to replace it")
    try:
        imatrix.read(out)
    except InputError:
        what, fix = "is there and no importance matrix", "give another file, or remove it yourself"
        raise InputError(what, where=out, fix=fix) from None


def write_imatrix(out: Path, statistics: Statistics, config: ModelConfig, force: bool) -> None:
    """Write what llama-imatrix measures on the same tokens, every matrix of the layers, routers included, and no other,
    to `out`, where it may be already; `statistics` hold kv_b_proj's halves. Raises InputError where something else is,
    unless `force`, or the disk is full."""
    matrices = [x for x in architecture(config).gguf_tensors() if x.layer is not None and len(x.shape) > 1]
    entries = {tensor.name: _imatrix_entry(statistics, tensor) for tensor in matrices}
    found = imatrix.Imatrix(entries, (statistics.source,), statistics.windows, statistics.ctx)
    with disk_errors(out):
        if out.exists() and not force:
            if not imatrix.is_written(out, found):
                raise InputError("holds something else", where=out, fix="give another file, or delete it")
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        imatrix.write(out, found)


def _imatrix_entry(statistics: Statistics, tensor: GgufTensor) -> imatrix.FileEntry:
    if tensor.kind in (K_B, V_B):
        assert tensor.layer is not None
        sums = statistics.half_squares(tensor.layer, K_HALF if tensor.kind == K_B else V_HALF)
        return imatrix.FileEntry(sums[None], np.array([statistics.tokens], np.float32))
    sums = np.stack([statistics.squares(spec) for spec in tensor.specs])
    return imatrix.FileEntry(sums, np.array([statistics.count(spec) for spec in tensor.specs], np.float32))


def prepare(
    plan: Plan,
    work: Path,
    calibration: Calibration | None,
    statistics: Statistics | None,
    device: str,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Prepared:
    """Calibrate what the plan needs calibrated, in the folder `work`, which keeps what is finished.

    `calibration` is needed where the plan has methods that run the model on it, or needs statistics that aren't given.
    Of several `ranks` this is the first, which the others `follow`.
    """
    if needs_statistics(plan) and statistics is None:
        assert calibration is not None
        work.mkdir(exist_ok=True)
        path = work / "statistics.safetensors"
        try:
            if path.exists():
                Statistics(path).check(plan.checkpoint)
        except InputError as error:
            logger.warning("%s; it is made again", error)
            path.unlink()
        statistics = calibrate(plan.checkpoint, path, calibration, device=device, progress=progress, ranks=ranks)
    smoothing = Smoothing({})
    wanted = sum(entry.spec.size for entry in plan.entries if entry.method == "awq")
    if wanted:
        with progress(0, "", "starting"):
            from dsv2quant.calib.awq import choose_smoothing

        assert statistics is not None
        with disk_errors(work.parent), progress(wanted, "weights", "awq") as advance:
            smoothing = choose_smoothing(plan, work / "awq", statistics, device, advance)
    prepared = Prepared(plan, statistics, smoothing)
    if not needs_calibration(plan):
        return prepared
    with progress(0, "", "starting"):  # imports torch
        from dsv2quant.calib.layerwise import quantize_layers

    assert calibration is not None
    uses = statistics is not None and any(entry.needs_inputs for entry in plan.entries)
    ranks.announce(QUANTIZE, statistics.path.resolve() if statistics is not None and uses else None, smoothing)
    with disk_errors(work.parent), progress(work_weights(plan), "weights", "gptq") as advance:
        encoded = quantize_layers(plan, work / "gptq", calibration, device, advance, prepared, ranks)
    return Prepared(plan, statistics, smoothing, encoded)


def follow(
    checkpoint: Checkpoint, calibration: Calibration, ranks: Ranks, *, plan: Plan | None = None, halves: bool = False
) -> None:
    """On every rank but the first: compute a share of what that does in `calibrate`, or for a `plan` in `prepare`, and
    write nothing. Statistics that layers are quantized with are read from its file."""
    from dsv2quant.calib.collect import collect
    from dsv2quant.calib.layerwise import quantize_layers

    def measure() -> None:
        collect(checkpoint, None, calibration, ranks.device, halves, ranks=ranks)

    def quantize(statistics: Path | None, smoothing: Smoothing) -> None:
        assert plan is not None
        prepared = Prepared(plan, None if statistics is None else Statistics(statistics), smoothing)
        quantize_layers(plan, None, calibration, ranks.device, prepared=prepared, ranks=ranks)

    ranks.follow({MEASURE: measure, QUANTIZE: quantize})
