"""`convert`: the jobs of a plan into its sink, a folder of shards or GGUF files."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dsv2quant.calib.distributed import ALONE, Ranks
from dsv2quant.checkpoint.identity import sampled_bytes
from dsv2quant.conversion.sink import Sink
from dsv2quant.conversion.stream import streamed
from dsv2quant.planning.plan import Plan
from dsv2quant.progress import Progress, no_progress
from dsv2quant.report.calibration import Conversion
from dsv2quant.storage import engine
from dsv2quant.storage.card import is_persons
from dsv2quant.storage.durable import FileEntry, dump_json, file_entry, resumable, tell_kept
from dsv2quant.storage.manifest import CARD_FILE, sealed

if TYPE_CHECKING:
    from dsv2quant.calib.calibration import Calibration, Tuning
    from dsv2quant.calib.statistics import Statistics
    from dsv2quant.planning.gguf_plan import GgufPlan

logger = logging.getLogger(__name__)


def convert(
    plan: Plan | GgufPlan,
    out: str | os.PathLike[str],
    *,
    command: str = "",
    calibration: Calibration | None = None,
    statistics: Statistics | None = None,
    tuning: Tuning | None = None,
    split_max_size: int | None = None,
    device: str = "cpu",
    force: bool = False,
    inputs: Iterable[Path] = (),
    progress: Progress = no_progress,
    ranks: Ranks = ALONE,
) -> Conversion:
    """Write the plan's artifact: into folder `out`, or of a GGUF plan the file `out`, or with `split_max_size` bytes
    those that it is split into.

    Where the plan's methods need it, `calibration` is what they calibrate on; `statistics`, measured before, save the
    pass that measures. The artifact is then tuned on `tuning`, where that is given (calib/tuning.py). `inputs` are
    further files that were read for it: neither they nor the checkpoint are ever written to. `command` is what
    manifest and card say. GGUF files have the same bytes from every device. Of several `ranks` this is the first, and
    calibration of a folder all that the others take part in (`follow` of calib/calibrate.py).

    A run that was killed continues from its finished layers and shards, or tensors of a GGUF file. Raises InputError
    where the plan quantizes nothing, the tokenizer is damaged or another model's, a weight is NaN, infinite or beyond
    what its type holds, the source changes meanwhile, or `out` can't take the artifact; and PlanViolation, with nothing
    finished, where a codec does not return what was planned.
    """
    started = time.perf_counter()
    sink: Sink
    if isinstance(plan, Plan):  # imports what this plan needs alone: each takes some tenths of a second
        from dsv2quant.conversion.shards import Folder

        sink = Folder(
            plan, Path(out), command, calibration, statistics, tuning, device,
            force=force, inputs=inputs, progress=progress, ranks=ranks,
        )  # fmt: skip
    elif tuning is None:
        from dsv2quant.conversion.gguf import GgufFiles

        sink = GgufFiles(plan, Path(out), split_max_size, device, force=force, inputs=inputs, progress=progress)
    else:
        from dsv2quant.conversion.gguf_tuned import TunedGgufFiles

        untuned = partial(convert, plan, command=command, device=device, inputs=inputs, progress=progress)
        sink = TunedGgufFiles(
            plan, Path(out), split_max_size, device, tuning, untuned, force=force, inputs=inputs, progress=progress
        )
    (resumed, total), files = sink.counted, sink.complete
    with tell_kept(sink.out, partial(resumable, sink.out)), closing(sink):
        if files is None:
            if any(written.done for written in sink.written):
                logger.info("continuing: %d of %d %s are finished", resumed, total, sink.units)
            jobs = sink.jobs(progress)
            with progress(plan.bytes_in, "B", "convert") as advance:
                _write_files(sink, plan, jobs, advance)
            sink.source.check_unchanged(plan.checkpoint)
            sink.source = sink.source.finished(plan.checkpoint)
            if statistics is not None:
                statistics.check_identity(plan.checkpoint, sink.source.identity["weights"])
            files = _write_small_files(sink, plan, command)
            sink.finish()
    bytes_out = sum(written.file.nbytes for written in sink.written)
    return Conversion(
        plan, sink.out, files, bytes_out, resumed, sink.complete is not None, sink.outcomes, sink.expert_tokens,
        time.perf_counter() - started, sink.tuned,
    )  # fmt: skip


def _write_files(
    sink: Sink, plan: Plan | GgufPlan, jobs: Iterator[engine.Job], advance: Callable[[int], object]
) -> None:
    """Encode and write what is not durable yet."""
    write = partial(
        engine.write, files=sink.written, advance=advance, record=sink.record,
        check=partial(sink.source.check_unchanged, plan.checkpoint),
    )  # fmt: skip
    if sink.stream is None:
        write(jobs)
        return
    with closing(streamed(jobs, sink.written, sink.stream, sampled_bytes(plan.checkpoint))) as ordered:
        write(ordered)  # on leaving, no shard is loaded any more


def _write_small_files(sink: Sink, plan: Plan | GgufPlan, command: str) -> dict[str, FileEntry]:
    """Write what lies beside the weights, and the manifest before config.json; returns the manifest's file list."""
    files = {written.file.path.name: written.entry for written in sink.written}
    files = dict(sorted((files | {name: file_entry(content) for name, content in sink.small.items()}).items()))
    source = {"model": plan.checkpoint.model, "revision": plan.checkpoint.revision, "identity": sink.source.identity}
    about = {"schema": sink.schema, "plan": sink.digest, "command": command, "source": source} | sink.about()
    small = sink.small | {sink.manifest.name: dump_json(sealed(about | {"files": files}))}
    for name in sorted(small, key="config.json".__eq__):  # nothing loads a folder without it
        if name != CARD_FILE or not is_persons(sink.out / name):
            sink.write_file(name, small[name])
    return files
