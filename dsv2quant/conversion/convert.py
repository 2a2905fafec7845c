"""Run a plan: read, encode and write overlap, one step at a time per worker, in bounded memory.

Workers read a step's weights and encode them (both release the GIL); the main thread writes results in plan order;
hashing, fsync and renaming run behind it. At most `MAX_IN_FLIGHT` bytes of steps are held, or one step if it is larger,
so peak memory does not grow with the model.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsv2quant.calib.calibrate import prepare
from dsv2quant.calib.calibration import Calibration, Outcome, Prepared, needs_calibration, needs_statistics, work_bytes
from dsv2quant.calib.statistics import Statistics
from dsv2quant.checkpoint.checkpoint import HfCheckpoint
from dsv2quant.checkpoint.identity import Source
from dsv2quant.conversion.folder import CARD_FILE, ArtifactFolder
from dsv2quant.errors import InputError, PlanViolation
from dsv2quant.formats.codec import NonFiniteError, TooLargeError, check_finite, too_large
from dsv2quant.formats.e4m3 import E4M3_VALUES
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning.plan import Entry, Plan, Step
from dsv2quant.planning.recipe import CALIBRATED
from dsv2quant.planning.smoothing import SMOOTHING_FILE
from dsv2quant.progress import Progress, no_progress
from dsv2quant.report.calibration import expert_tokens
from dsv2quant.report.card import calibrated, manifest, model_card, source_card
from dsv2quant.storage.durable import MANIFEST_FILE, FileEntry, dump_json, file_entry
from dsv2quant.storage.files import Scratch
from dsv2quant.storage.manifest import sealed
from dsv2quant.storage.safetensors import INDEX_FILE
from dsv2quant.storage.shards import ShardWriter
from dsv2quant.storage.work import resumable, tell_kept

logger = logging.getLogger(__name__)
MAX_IN_FLIGHT = 192 << 20
CHUNK = 8 << 20  # a copied tensor is read and written in pieces of this size


@dataclass(frozen=True)
class Result:
    """What a conversion did. `files` is the manifest's list; `resumed` counts shards kept from an earlier run,
    `outcomes` say what calibration did to each matrix, `expert_tokens` how many tokens each expert had, by layer."""

    out: Path
    files: dict[str, FileEntry]
    bytes_in: int
    bytes_out: int
    resumed: int
    already_complete: bool
    outcomes: list[Outcome]
    expert_tokens: dict[int, list[int]]
    seconds: float


@dataclass(frozen=True)
class _Job:
    """A piece of work for one worker: a step to encode, or a chunk of a part to copy."""

    step: Step
    entry: Entry | None = None
    suffix: str = ""
    begin: int = 0
    nbytes: int = 0

    @property
    def bytes_in(self) -> int:
        return self.nbytes if self.entry else self.step.bytes_in

    @property
    def memory(self) -> int:
        return self.nbytes if self.entry else self.step.bytes_in + self.step.bytes_out


_scratch = Scratch()
Piece = tuple[str, np.ndarray, int | None]  # output name, the tensor; or bytes of it, and the first one's place


def convert(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    command: str,
    calibration: Calibration | None = None,
    statistics: Statistics | None = None,
    device: str = "cpu",
    force: bool = False,
    inputs: Iterable[Path] = (),
    progress: Progress = no_progress,
) -> Result:
    """Write the plan's artifact into folder `out`. Where the plan's methods need it, `calibration` is what they
    calibrate on; `statistics`, measured before, save the pass that measures. `inputs` are further files that were read
    for it: neither they nor the checkpoint are ever written to.

    A run that was killed continues from its finished layers and shards. Raises InputError where the plan quantizes
    nothing, the tokenizer is damaged or another model's, a weight is NaN or infinite, the source changes meanwhile, or
    `out` can't take the artifact; and PlanViolation, with nothing finished, where a codec does not return what was
    planned.
    """
    started = time.perf_counter()
    if not plan.schemes:
        fix = "`dsv2quant plan` shows the rules; change the recipe or --target"
        raise InputError("nothing would be quantized: every tensor falls back", where=plan.checkpoint.model, fix=fix)
    if calibration is None and (needs_calibration(plan) or (needs_statistics(plan) and statistics is None)):
        raise ValueError(f"recipe {plan.recipe.name} needs calibration")
    plan.checkpoint.check_tokenizer()
    copied = plan.checkpoint.carried_files()
    with progress(0, "", "prepare"):
        source = Source.of(plan.checkpoint, copied | _card_of(plan.checkpoint))
    small = _small_files(plan, command, copied)
    aside = sum(map(len, small.values()))
    described: dict[str, Any] = {}
    if calibration is not None:
        described |= calibration.describe(device)
        aside += work_bytes(plan, calibration)
    if statistics is not None:
        statistics.check(plan.checkpoint)
        described |= {"statistics": statistics.describe()}
    measured = statistics.path if statistics is not None else None
    read = [*plan.checkpoint.inputs, *([measured] if measured is not None else []), *inputs]
    folder = ArtifactFolder(
        Path(out), plan, source, small=small, calibration=described or None, aside=aside, force=force, inputs=read,
        progress=progress,
    )  # fmt: skip
    prepared = Prepared(plan)
    with closing(folder), tell_kept(folder.path, partial(resumable, folder.path)):
        resumed = len(folder.finished)
        if folder.complete is not None:
            files = folder.complete
        else:
            if resumed:
                logger.info("continuing: %d of %d shards are finished", resumed, len(plan.shards))
            prepared = prepare(plan, folder.work, calibration, statistics, device, progress)
            if prepared.smoothing.tensors:
                small = {SMOOTHING_FILE: prepared.smoothing.to_bytes()} | small
            with progress(plan.bytes_in, "B", "convert") as advance:
                files = _write_shards(plan, folder, prepared, device, advance)
            source.check_unchanged(plan.checkpoint)
            about = manifest(plan, command, described) | calibrated(plan, calibration, prepared)
            about["source"]["identity"] = source.identity
            files = _write_small_files(folder, small, files, about)
            folder.finish()
    seconds = time.perf_counter() - started
    complete = folder.complete is not None
    return Result(
        folder.path, files, plan.bytes_in, plan.bytes_out, resumed, complete,
        prepared.outcomes, expert_tokens(prepared), seconds,
    )  # fmt: skip


def _write_shards(
    plan: Plan, folder: ArtifactFolder, prepared: Prepared, device: str, progress: Callable[[int], object]
) -> dict[str, FileEntry]:
    """Encode and write every shard that is not finished; returns the manifest entries of all."""
    with ThreadPoolExecutor(max(2, min(16, os.cpu_count() or 2))) as workers:
        pipeline = _Pipeline(plan, folder, progress)
        try:
            for job in _jobs(plan, folder.finished.keys(), progress):
                pipeline.make_room(job)
                pipeline.running.append((job, workers.submit(_run, plan.checkpoint, job, prepared, device)))
            written = pipeline.drain() | folder.finished
        finally:
            workers.shutdown(wait=False, cancel_futures=True)
            pipeline.close()
    if missing := {shard.file for shard in plan.shards} - written.keys():
        raise PlanViolation(f"{folder.path}: {', '.join(sorted(missing))} never came")
    return written


class _Pipeline:
    """Jobs in flight, the shard being written, and the shards being hashed, fsynced and renamed behind it."""

    def __init__(self, plan: Plan, folder: ArtifactFolder, progress: Callable[[int], object]) -> None:
        self._plan, self._folder, self._progress = plan, folder, progress
        self.running: deque[tuple[_Job, Future[list[Piece]]]] = deque()
        self._writer: ShardWriter | None = None
        self._finishing: dict[str, Future[FileEntry]] = {}
        self._hasher, self._finisher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def make_room(self, job: _Job) -> None:
        """Write finished results, oldest first, until `job` fits beside the rest."""
        while self.running and sum(j.memory for j, _ in self.running) + job.memory > MAX_IN_FLIGHT:
            self._write_oldest()

    def drain(self) -> dict[str, FileEntry]:
        """Write what is left and wait until every shard is durable; returns the manifest entries."""
        while self.running:
            self._write_oldest()
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.finish()  # raises: it isn't full
        return {file: future.result() for file, future in self._finishing.items()}

    def _write_oldest(self) -> None:
        job, future = self.running.popleft()
        pieces = future.result()
        shard = self._plan.shards[job.step.shard]
        if shard.file in self._finishing:
            raise PlanViolation(f"{shard.file}: {job.step.entries[0].spec.name} came after the shard was full")
        if self._writer is None:
            self._writer = ShardWriter(self._folder.path, shard, self._hasher, self._finisher)
        for piece in pieces:
            self._writer.put(*piece)
        self._progress(job.bytes_in)
        if self._writer.is_full:
            for finished in self._finishing.values():
                if finished.done():
                    finished.result()  # a disk that fails ends the run now
            logger.debug("%s is written", shard.file)
            record = partial(self._folder.record, shard.file)
            self._finishing[shard.file] = self._finisher.submit(self._writer.finish, record)
            self._writer = None

    def close(self) -> None:
        """Drop the unfinished shard, and wait for the threads."""
        self._finisher.shutdown()  # first: shards being finished still wait for their hashes
        self._hasher.shutdown(cancel_futures=True)
        if self._writer is not None:
            self._writer.abandon()


def _jobs(plan: Plan, finished: Set[str], progress: Callable[[int], object]) -> Iterator[_Job]:
    for step in plan.steps:
        if plan.shards[step.shard].file in finished:
            progress(step.bytes_in)
        elif all(entry.is_copy for entry in step.entries):
            for entry in step.entries:
                for suffix, part in entry.weight.parts.items():
                    for begin in range(0, part.nbytes, CHUNK):
                        yield _Job(step, entry, suffix, begin, min(CHUNK, part.nbytes - begin))
        else:
            yield _Job(step)


def _run(checkpoint: HfCheckpoint, job: _Job, prepared: Prepared, device: str) -> list[Piece]:
    """A worker's part: read, and encode or check; or fetch what calibration encoded."""
    if job.entry is not None:
        return _copy(checkpoint, job.entry, job.suffix, job.begin, job.nbytes)
    entries = job.step.entries
    if entries[0].method in CALIBRATED:
        found = [prepared.encoded_parts(entry) for entry in entries]
    else:
        found = _encode(checkpoint, entries, prepared, device)
    pieces: list[Piece] = []
    for entry, arrays in zip(entries, found, strict=True):
        arrays = arrays | prepared.kv_scales(entry)
        planned = {output.name for output in entry.outputs}
        if arrays.keys() != planned:
            raise PlanViolation(f"{entry.spec.name}: {sorted(arrays)} came, {sorted(planned)} were planned")
        pieces += [(output.name, arrays[output.name], None) for output in entry.outputs]
    return pieces


def _encode(
    checkpoint: HfCheckpoint, entries: Sequence[Entry], prepared: Prepared, device: str
) -> list[dict[str, np.ndarray]]:
    sizes = [entry.weight.stored.nbytes for entry in entries]
    buffers = np.split(_scratch.take(sum(sizes)), np.cumsum(sizes)[:-1])
    weights = [
        prepared.weight(entry, checkpoint.encodable(entry.weight, buffer))
        for entry, buffer in zip(entries, buffers, strict=True)
    ]
    inputs = [prepared.inputs(entry) for entry in entries if entry.needs_inputs]
    try:
        encoded = CODECS[entries[0].scheme].encode(weights, device, entries[0].encoding, inputs)
    except NonFiniteError as error:
        raise checkpoint.not_finite(entries[error.which].weight, error.index) from None
    except TooLargeError as error:
        entry = entries[error.which]
        raise too_large(entry.spec.module, entry.scheme) from None
    if len(encoded) != len(entries):
        raise PlanViolation(f"{entries[0].spec.name}: {len(encoded)} weights came, {len(entries)} were planned")
    return [
        {f"{entry.spec.module}.{suffix}": array for suffix, array in parts.items()}
        for entry, parts in zip(entries, encoded, strict=True)
    ]


def _copy(checkpoint: HfCheckpoint, entry: Entry, suffix: str, begin: int, nbytes: int) -> list[Piece]:
    part = entry.weight.parts[suffix]
    data = checkpoint.read(part, begin, nbytes)
    values = data.view({"BF16": np.uint16, "F32": np.float32, "F8_E4M3": np.uint8}[part.dtype])
    try:
        check_finite(values if part.dtype != "F8_E4M3" else E4M3_VALUES[values])
    except NonFiniteError as error:
        element = begin // values.itemsize + error.index[0]
        index = tuple(int(i) for i in np.unravel_index(element, part.shape))
        raise checkpoint.not_finite(entry.weight, index) from None
    return [(part.name, data, begin)]


def _card_of(checkpoint: HfCheckpoint) -> dict[str, bytes]:
    """{name: content} of the source's model card, which the artifact's is made with."""
    card = source_card(checkpoint)
    return {} if card is None else {CARD_FILE: card}


def _small_files(plan: Plan, command: str, copied: dict[str, bytes]) -> dict[str, bytes]:
    """Everything beside the shards and the manifest, config.json last."""
    files = copied | {CARD_FILE: model_card(plan, command).encode(errors="backslashreplace")}
    if (index := plan.index()) is not None:
        files[INDEX_FILE] = dump_json(index)
    return files | {"config.json": dump_json(plan.config)}


def _write_small_files(
    folder: ArtifactFolder, small: dict[str, bytes], files: dict[str, FileEntry], about: dict[str, Any]
) -> dict[str, FileEntry]:
    """Write them, and the manifest before config.json; returns the manifest's whole file list."""
    files = dict(sorted((files | {name: file_entry(content) for name, content in small.items()}).items()))
    for name, content in small.items():
        if name == "config.json":
            folder.write_file(MANIFEST_FILE, dump_json(sealed(about | {"files": files})))
        folder.write_file(name, content)
    return files
