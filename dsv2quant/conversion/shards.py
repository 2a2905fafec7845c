"""The safetensors sink: a folder of shards with what belongs to them, and the jobs that fill the shards.

config.json comes last: without it no consumer loads the folder.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dsv2quant.calib.calibrate import prepare
from dsv2quant.calib.calibration import (
    Calibration,
    Prepared,
    Tuned,
    Tuning,
    needs_calibration,
    needs_statistics,
    tuning_bytes,
    work_bytes,
)
from dsv2quant.calib.distributed import ALONE, Ranks
from dsv2quant.calib.statistics import Statistics
from dsv2quant.checkpoint.checkpoint import Weight
from dsv2quant.checkpoint.identity import Source
from dsv2quant.conversion.sink import Sink, check_stored
from dsv2quant.errors import InputError, PlanViolation, listing
from dsv2quant.formats.codec import NonFiniteError, TooLargeError, as_float32, too_large
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning.kept import POWERS_OF_TWO
from dsv2quant.planning.plan import Entry, Plan, Step
from dsv2quant.planning.recipe import CALIBRATED
from dsv2quant.planning.smoothing import SMOOTHING_FILE
from dsv2quant.progress import Progress
from dsv2quant.report.calibration import calibration_json, coverage_json, expert_tokens
from dsv2quant.report.card import CalibratedOn, folder_card
from dsv2quant.report.origin import origin, source_card
from dsv2quant.storage.card import is_persons
from dsv2quant.storage.durable import (
    MANIFEST_FILE,
    PARTIAL,
    STATE_FILE,
    WORK_FOLDER,
    disk_errors,
    dump_json,
    refuse_inputs,
)
from dsv2quant.storage.engine import File, Job, lanes, side_by_side
from dsv2quant.storage.files import Scratch
from dsv2quant.storage.manifest import CARD_FILE, is_inside
from dsv2quant.storage.safetensors import HELD_AS, INDEX_FILE, Shard, StoredTensor
from dsv2quant.storage.verified import VERIFIED_FILE
from dsv2quant.version import __version__

CHUNK = 8 << 20  # a copied tensor is read and written in pieces of this size
KEPT_EVERY = 256 << 20  # bytes of a shard that come between two places where a later run can go on
_ASIDE = 1 << 20  # what the manifest may need, and the file system
_scratch = Scratch()


class Folder(Sink):
    """A folder in Hugging Face layout. Its work folder keeps what a resumed calibration needs."""

    schema = "dsv2quant.manifest/1"
    kind, other, of_another, units = "folder", "another output folder", "holds the artifact of", "shards"

    def __init__(
        self,
        plan: Plan,
        out: Path,
        command: str,
        calibration: Calibration | None,
        statistics: Statistics | None,
        tuning: Tuning | None,
        device: str,
        *,
        force: bool,
        inputs: Iterable[Path],
        progress: Progress,
        ranks: Ranks = ALONE,
    ) -> None:
        _check(plan, out, calibration, statistics)
        self.plan, self._device, self._command, self._ranks = plan, device, command, ranks
        self._base = origin(plan.checkpoint, plan.base_model)
        self._given, self._statistics, self._tuning = calibration, statistics, tuning
        self._prepared: Prepared
        self._tuned: Mapping[str, Mapping[str, np.ndarray]] = {}
        copied, card = plan.checkpoint.carried_files(), source_card(plan.checkpoint)
        with progress(0, "", "prepare"):
            source = Source.of(plan.checkpoint, copied | ({CARD_FILE: card} if card is not None else {}))
        small = copied | {CARD_FILE: folder_card(plan, command, self._base)}
        if (index := plan.index()) is not None:
            small[INDEX_FILE] = dump_json(index)
        small["config.json"] = dump_json(plan.config)
        described = calibration.describe(device) if calibration is not None else {}
        if statistics is not None:
            if plan.checkpoint.stream is None:
                statistics.check(plan.checkpoint)
            else:  # which weights they are of can be told when all have come
                statistics.check_values(plan.checkpoint)
            described |= {"statistics": statistics.describe()}
        aside = _ASIDE + sum(map(len, small.values())) + (work_bytes(plan, calibration) if calibration else 0)
        if tuning is not None:
            described |= {"tuning": tuning.describe(device)}
            aside += tuning_bytes(plan.checkpoint, tuning)
        read = [*plan.checkpoint.inputs, *([statistics.path] if statistics is not None else []), *inputs]
        super().__init__(
            out, out / MANIFEST_FILE, [File(out / s.file, s.header, _marks(s)) for s in plan.shards], plan.digest,
            source, force=force, inputs=read, progress=progress, small=small,
            calibration=described or None, aside=aside, stream=plan.checkpoint.stream,
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        plan, prepared = self.plan, self._prepared
        content: dict[str, Any] = {
            "targets": {"consumers": list(plan.targets), "tp": plan.parallel.tp}
            | ({"ep": plan.parallel.ep} if plan.parallel.ep > 1 else {}),
            "versions": {"dsv2quant": __version__, "python": platform.python_version()}
            | {name: version(name) for name in ("numpy", "numba", "torch")},
        }
        if self._calibration is not None:
            content["calibration"] = self._calibration
        if self.tuned is not None:
            content["tuned"] = self.tuned
        text = self._given or (None if self._tuning is None else self._tuning.text)
        if text is not None:
            content["calibration_fingerprint"] = text.fingerprint
        elif prepared.statistics is not None:
            content["calibration_fingerprint"] = prepared.statistics.about["fingerprint"]
        if "calibration_fingerprint" in content:
            content["calibrated"] = calibration_json(plan, self.outcomes, self.expert_tokens)
        return content

    @property
    def work(self) -> Path:
        """Where an unfinished calibration keeps what a resumed run needs."""
        return self.out / WORK_FOLDER

    def _check_names(self, inputs: list[Path]) -> None:
        if self.work.is_symlink():
            raise InputError("is a link", where=self.work, fix="remove it")
        super()._check_names(inputs)

    def _refuse(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if {entry.name for entry in self.out.iterdir()} - {STATE_FILE}:
            what = "holds an unfinished conversion with another plan or source" if lines else "is not empty"
            raise InputError(what, where=self.out, fix=f"give {self.other}, or --force to start over")

    def _clear(self, names: list[str], manifest: Mapping[str, Any] | None, inputs: list[Path]) -> None:
        """What has a name that will be written, or that a consumer would load with it, must not be of others."""
        ours = {name for name in names if is_inside(self.out, name)} | ({SMOOTHING_FILE} if names else set())
        ours |= set(manifest["files"]) if manifest is not None else set()
        ours |= {name + PARTIAL for name in ours}
        ours |= {MANIFEST_FILE, VERIFIED_FILE} if ours or manifest is not None else set()
        held = {entry.name for entry in self.out.iterdir()}
        planned = {SMOOTHING_FILE, *self._names, *(name + PARTIAL for name in self._names)}
        loaded = {name for name in held if name.endswith(".safetensors")} | {INDEX_FILE}
        foreign = sorted(held & (planned | loaded) - ours)
        if foreign:
            what = f"no conversion of dsv2quant's wrote {listing(foreign)}, and --force removes nothing else"
            raise InputError(what, where=self.out, fix="give another output folder, or remove them yourself")
        if is_persons(self.out / CARD_FILE):
            ours.discard(CARD_FILE)
        refuse_inputs((self.out / name for name in ours), inputs)
        for name in sorted(ours, key=lambda name: (name == MANIFEST_FILE, name)):  # what says that they are ours, last
            if not (self.out / name).is_dir():
                (self.out / name).unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def finish(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        super().finish()

    def jobs(self, progress: Progress) -> Iterator[Job]:
        self._prepared = prepare(
            self.plan, self.work, self._given, self._statistics, self._device, progress, self._ranks
        )
        self.outcomes, self.expert_tokens = self._prepared.outcomes, expert_tokens(self._prepared)
        coverage = coverage_json(self.expert_tokens, self.plan.checkpoint.config.hidden_size)
        calibrated = CalibratedOn.of(self._calibration or {}, coverage)
        self.small[CARD_FILE] = folder_card(self.plan, self._command, self._base, calibrated=calibrated)
        if self._prepared.smoothing.tensors:
            self.small = {SMOOTHING_FILE: self._prepared.smoothing.to_bytes()} | self.small
        if self._tuning is not None:
            tuned = self._tune(self._tuning, progress)
            self._tuned, self.tuned = tuned.parts, tuned.about
        return self._jobs()

    def _tune(self, tuning: Tuning, progress: Progress) -> Tuned:
        with progress(0, "", "starting"):  # imports torch
            from dsv2quant.calib.held import of_folder
            from dsv2quant.calib.tuning import tune

        steps = {entry.spec.name: step for step in self.plan.steps for entry in step.entries}

        def stored(entry: Entry) -> dict[str, np.ndarray]:
            step = steps[entry.spec.name]
            found = self._found(step)[step.entries.index(entry)]
            return {name.removeprefix(f"{entry.module}."): array for name, array in found.items()}

        held, specs = of_folder(self.plan.entries, stored), [entry.spec for entry in self.plan.entries]
        with disk_errors(self.out):
            return tune(self.plan.checkpoint, specs, held, tuning, self.work / "tuning", self._device, progress)

    def _jobs(self) -> Iterator[Job]:
        """Those of several shards in turns; of a stream's in their order, so that few of its shards lie on disk."""
        steps: list[list[Step]] = [[] for _ in self.plan.shards]
        for step in self.plan.steps:
            steps[step.shard].append(step)
        shards = [self._shard_jobs(number, steps[number]) for number in range(len(steps))]
        return side_by_side(shards, 1 if self.stream is not None else lanes())

    def _shard_jobs(self, number: int, steps: Sequence[Step]) -> Iterator[Job]:
        places = {output.name: begin for output, begin in self.plan.shards[number].placed()}
        for step in steps:
            if all(entry.is_copy and entry.spec.name not in self._tuned for entry in step.entries):
                for entry in step.entries:
                    for part, output in zip(entry.weight.parts.values(), entry.outputs, strict=True):
                        yield from self._copies(part, step.shard, places[output.name], entry.weight)
                continue
            outputs = [output for entry in step.entries for output in entry.outputs if output.nbytes]
            spans = tuple((places[output.name], places[output.name] + output.nbytes) for output in outputs)
            decoded = sum(2 * 4 * entry.spec.size for entry in step.entries if entry.weight.scheme != "bf16")
            encode, memory = partial(self._encode, step, places), step.bytes_in + step.bytes_out + decoded
            reads = frozenset(part.file for entry in step.entries for part in entry.weight.parts.values())
            yield Job(step.shard, step.entries[0].spec.name, spans, step.bytes_in, memory, encode, reads)
        for copy in self.plan.copies:
            if copy.shard == number:
                yield from self._copies(copy.stored, number, places[copy.stored.name])

    def _copies(self, part: StoredTensor, shard: int, begin: int, weight: Weight | None = None) -> Iterator[Job]:
        """The jobs that write a tensor's bytes from `begin` on."""
        for offset in range(0, part.nbytes, CHUNK):
            nbytes, at = min(CHUNK, part.nbytes - offset), begin + offset
            copy = partial(self._copy, part, offset, nbytes, at, weight)
            yield Job(shard, part.name, ((at, at + nbytes),), nbytes, nbytes, copy, frozenset({part.file}))

    def _copy(
        self, part: StoredTensor, begin: int, nbytes: int, at: int, weight: Weight | None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Read bytes of a stored tensor, and check those of a weight."""
        data = self.plan.checkpoint.read(part, begin, nbytes)
        if weight is not None:
            values = data.view(HELD_AS[part.dtype])
            self._check_part(weight, part, values, begin // values.itemsize)
        yield at, data

    def _check_part(self, weight: Weight, part: StoredTensor, stored: np.ndarray, begin: int) -> None:
        """Raise InputError where a part of a weight, flat from element `begin` on, is not finite, or scales that the
        artifact declares to be powers of two are not."""
        checkpoint = self.plan.checkpoint
        check_stored(checkpoint, weight, part, stored, begin)
        declared = self.plan.config["quantization_config"].get("scale_fmt") == POWERS_OF_TWO
        if declared and part is weight.parts.get("weight_scale_inv") and (np.frexp(as_float32(stored))[0] != 0.5).any():
            what = f"{part.name} is no power of two, as scale_fmt of quantization_config says: {POWERS_OF_TWO}"
            fix = "consumers would round it: take scale_fmt out of config.json, or get the checkpoint again"
            raise InputError(what, where=checkpoint.model, fix=fix)

    def _encode(self, step: Step, places: Mapping[str, int]) -> Iterator[tuple[int, np.ndarray]]:
        """Read and encode, or fetch what calibration encoded."""
        for entry, arrays in zip(step.entries, self._found(step), strict=True):
            parts = self._tuned.get(entry.spec.name, {})
            arrays = arrays | {f"{entry.module}.{suffix}": array for suffix, array in parts.items()}
            arrays |= self._prepared.kv_scales(entry)
            planned = {output.name for output in entry.outputs}
            if arrays.keys() != planned:
                raise PlanViolation(f"{entry.spec.name}: {sorted(arrays)} came, {sorted(planned)} were planned")
            for output in entry.outputs:
                array = arrays[output.name]
                if array.dtype != HELD_AS[output.dtype] or array.shape != output.shape:
                    came = f"{array.dtype} {list(array.shape)} came"
                    what = f"{came}, {output.dtype} {list(output.shape)} was planned"
                    raise PlanViolation(f"{output.name}: {what}")
                yield places[output.name], array.reshape(-1).view(np.uint8)

    def _found(self, step: Step) -> list[dict[str, np.ndarray]]:
        """What each of a step's weights is encoded as, before tuning, by the parts' names."""
        if step.entries[0].method in CALIBRATED:
            return [self._prepared.encoded_parts(entry) for entry in step.entries]
        return self._encoded(step.entries)

    def _encoded(self, entries: Sequence[Entry]) -> list[dict[str, np.ndarray]]:
        try:
            encoded = [self._kept(entry) for entry in entries] if entries[0].is_kept else self._chosen(entries)
        except NonFiniteError as error:
            raise self.plan.checkpoint.not_finite(entries[error.which].weight, error.index) from None
        except TooLargeError as error:
            entry = entries[error.which]
            raise too_large(entry.spec.module, entry.scheme) from None
        if len(encoded) != len(entries):
            raise PlanViolation(f"{entries[0].spec.name}: {len(encoded)} weights came, {len(entries)} were planned")
        return [
            {self.plan.checkpoint.names.stored(entry.spec.part_name(suffix)): array for suffix, array in parts.items()}
            for entry, parts in zip(entries, encoded, strict=True)
        ]

    def _kept(self, entry: Entry) -> dict[str, np.ndarray]:
        """The source's codes and scales in the scheme's layout."""
        arrays = self.plan.checkpoint.arrays(entry.weight)
        for suffix, stored in arrays.items():
            self._check_part(entry.weight, entry.weight.parts[suffix], stored.reshape(-1), 0)
        return CODECS[entry.scheme].kept(arrays)

    def _chosen(self, entries: Sequence[Entry]) -> list[dict[str, np.ndarray]]:
        """The codes that the method chooses."""
        prepared = self._prepared
        sizes = [entry.weight.stored.nbytes for entry in entries]
        buffers = np.split(_scratch.take(sum(sizes)), np.cumsum(sizes)[:-1])
        weights = [
            prepared.smoothing.apply(entry.spec, self.plan.checkpoint.encodable(entry.weight, buffer))
            for entry, buffer in zip(entries, buffers, strict=True)
        ]
        inputs = [prepared.inputs(entry) for entry in entries if entry.needs_inputs]
        return CODECS[entries[0].scheme].encode(weights, self._device, entries[0].encoding, inputs)


def _marks(shard: Shard) -> tuple[int, ...]:
    """Behind which bytes of a shard a later run can go on: a tensor's last, now and then, and the last of all."""
    marks = [len(shard.header)]
    for _, begin in shard.placed():
        if begin - marks[-1] >= KEPT_EVERY:
            marks.append(begin)
    return (*marks[1:], shard.nbytes)


def _check(plan: Plan, out: Path, calibration: Calibration | None, statistics: Statistics | None) -> None:
    """Raise InputError where the plan gives no artifact, or `out` is the checkpoint's own folder."""
    if not plan.schemes:
        fix = "`dsv2quant plan` shows the rules; change the recipe or --target"
        raise InputError("nothing would be quantized: every tensor falls back", where=plan.checkpoint.model, fix=fix)
    if calibration is None and (needs_calibration(plan) or (needs_statistics(plan) and statistics is None)):
        raise ValueError(f"recipe {plan.recipe.name} needs calibration")
    plan.checkpoint.check_tokenizer()
    if out.exists() and any(map(out.samefile, plan.checkpoint.inputs)):
        raise InputError("is the checkpoint's own folder", where=out, fix="give another output folder")
