"""GGUF files that are tuned: an untuned file is made first, what is trained of it replaces its blocks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dsv2quant.arch.spec import GgufTensor
from dsv2quant.calib.calibration import Tuning, tuning_bytes
from dsv2quant.checkpoint.gguf import GgufCheckpoint
from dsv2quant.conversion.gguf import GgufFiles, pieces
from dsv2quant.formats.gguf.heads import as_pairs
from dsv2quant.planning.gguf_plan import Entry, GgufPlan
from dsv2quant.progress import Progress
from dsv2quant.storage.durable import disk_errors
from dsv2quant.storage.engine import Job
from dsv2quant.storage.gguf import padded, read
from dsv2quant.version import __version__


class TunedGgufFiles(GgufFiles):
    """`GgufFiles` whose work folder, `<out>.work`, keeps what a resumed run needs; `untuned` writes the plan's file to
    a path."""

    def __init__(
        self,
        plan: GgufPlan,
        out: Path,
        split_max_size: int | None,
        device: str,
        tuning: Tuning,
        untuned: Callable[[Path], object],
        *,
        force: bool,
        inputs: Iterable[Path],
        progress: Progress,
    ) -> None:
        self.work, self._tuning, self._untuned = out.with_name(out.name + ".work"), tuning, untuned
        self._parts: Mapping[str, Mapping[str, np.ndarray]] = {}
        super().__init__(
            plan, out, split_max_size, device, force=force, inputs=inputs, progress=progress,
            calibration={"tuning": tuning.describe(device)},
            aside=plan.bytes_out + tuning_bytes(plan.checkpoint, tuning),
        )  # fmt: skip

    def about(self) -> dict[str, Any]:
        return {
            "versions": {"dsv2quant": __version__, "torch": version("torch")},
            "tuned": self.tuned,
            "calibration": self._calibration,
            "calibration_fingerprint": self._tuning.text.fingerprint,
        }

    def _clear(self, names: list[str], manifest: Mapping[str, Any] | None, inputs: list[Path]) -> None:
        super()._clear(names, manifest, inputs)
        shutil.rmtree(self.work, ignore_errors=True)

    def finish(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        super().finish()

    def jobs(self, progress: Progress) -> Iterator[Job]:
        before = self.work / "untuned.gguf"
        self._untuned(before)
        file = GgufCheckpoint.of_file(before)
        with progress(0, "", "starting"):  # imports torch
            from dsv2quant.calib.held import of_gguf
            from dsv2quant.calib.tuning import tune

        specs, folder = [weight.spec for weight in file.weights], self.work / "tuning"
        with disk_errors(self.out):
            tuned = tune(self.plan.checkpoint, specs, of_gguf(file), self._tuning, folder, self._device, progress)
        self._parts, self.tuned = tuned.parts, tuned.about
        held = read(before)
        begins = {tensor.name: tensor.begin for tensor in held.tensors}
        data = np.memmap(before, np.uint8, "r", held.data_start)
        for number, laid_out in enumerate(self._layout):
            for entry, first in laid_out.entries:
                nbytes = padded(entry.nbytes)
                write = partial(self._tensor, entry, data[begins[entry.name] :][:nbytes], first)
                read_of = sum(piece.bytes_in for piece in pieces(self.plan, entry))
                yield Job(number, entry.name, ((first, first + nbytes),), read_of, nbytes, write, frozenset())

    def _tensor(self, entry: Entry, before: np.ndarray, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """A tensor's bytes with their padding, to be written from byte `first` on; `before` are the untuned file's."""
        trained = [_stored(entry.tensor, self._parts.get(spec.name)) for spec in entry.tensor.specs]
        found = [part for part in trained if part is not None]
        data = np.concatenate(found) if len(found) == len(trained) else before[: entry.nbytes]
        yield first, data
        if padding := padded(entry.nbytes) - entry.nbytes:
            yield first + entry.nbytes, np.zeros(padding, np.uint8)


def _stored(tensor: GgufTensor, parts: Mapping[str, np.ndarray] | None) -> np.ndarray | None:
    """A weight's bytes in the tensor's order of rows; None where it was not trained."""
    if parts is None:
        return None
    (rows,) = parts.values()
    heads = tensor.specs[0].gguf_heads
    return (rows if heads is None else as_pairs(rows, heads)).reshape(-1).view(np.uint8)
