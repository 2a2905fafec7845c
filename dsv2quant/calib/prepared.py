"""What calibration has ready before weights are read: statistics, folds, and matrices that are encoded already."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

import numpy as np

from dsv2quant.calib.calibration import Calibration, Encoded, Outcome, needs_calibration, needs_statistics, work_weights
from dsv2quant.calib.kv import kv_scale
from dsv2quant.calib.statistics import Statistics
from dsv2quant.errors import InputError
from dsv2quant.folds import Folds
from dsv2quant.formats.part import Inputs
from dsv2quant.plan import Line, Plan
from dsv2quant.progress import Progress
from dsv2quant.targets import input_group
from dsv2quant.writer import disk_errors

logger = logging.getLogger(__name__)


class Prepared:
    """Use `weight` and `inputs` for what a codec is given, and `kv_scales`; `encoded` holds what needs no codec any
    more."""

    def __init__(
        self,
        plan: Plan,
        statistics: Statistics | None = None,
        folds: Folds | None = None,
        encoded: Encoded | None = None,
    ) -> None:
        self.statistics, self.folds, self.encoded = statistics, folds or Folds({}), encoded
        self._plan = plan
        self._amax: dict[str, float] = defaultdict(float)  # by group of tensors that share an input scale
        for line in plan.lines:
            if statistics is not None and line.needs_inputs:
                amax, columns = statistics.amax(line.slot), self.folds.columns(line.slot)
                largest = float((amax if columns is None else np.ldexp(amax, -columns)).max())
                self._amax[self._group(line)] = max(largest, self._amax[self._group(line)])

    @property
    def outcomes(self) -> list[Outcome]:
        """What became of each matrix that is encoded already."""
        return self.encoded.outcomes if self.encoded is not None else []

    def encoded_parts(self, line: Line) -> dict[str, np.ndarray]:
        """The parts of a matrix that is encoded already, by name."""
        assert self.encoded is not None
        names = [output.name for output in line.outputs if output not in line.kv_scales]
        return {name: self.encoded.part(name) for name in names}

    def weight(self, line: Line, weight: np.ndarray) -> np.ndarray:
        """The weight to encode: BF16 bits (uint16) or float32, scaled where it is part of a fold."""
        return self.folds.apply(line.slot, weight)

    def inputs(self, line: Line) -> Inputs:
        """What the inputs of a weight that needs them were in calibration, behind the folds. The largest magnitude is
        that of all that must share an input scale."""
        assert self.statistics is not None
        importance, columns = self.statistics.mean_square(line.slot), self.folds.columns(line.slot)
        if columns is not None:
            importance = np.ldexp(importance, -2 * columns)
        return Inputs(importance, self._amax[self._group(line)])

    def kv_scales(self, line: Line) -> dict[str, np.ndarray]:
        """The values of `line.kv_scales` by name: one for keys and values."""
        if not line.kv_scales:
            return {}
        assert self.statistics is not None
        assert line.slot.layer is not None
        value = kv_scale(*self.statistics.kv_ranges(line.slot.layer))
        return {output.name: np.full(output.shape, value, np.float32) for output in line.kv_scales}

    def _group(self, line: Line) -> str:
        return input_group(line.slot, self._plan.checkpoint.config, self._plan.targets)


def prepare(
    plan: Plan,
    work: Path,
    calibration: Calibration | None,
    statistics: Statistics | None,
    device: str,
    progress: Progress,
) -> Prepared:
    """Calibrate what the plan needs calibrated, in the folder `work`, which keeps what is finished.

    `calibration` is needed where the plan has methods that run the model on it, or needs statistics that aren't given.
    """
    if needs_statistics(plan) and statistics is None:
        from dsv2quant.calib.calibrate import measure

        assert calibration is not None
        work.mkdir(exist_ok=True)
        path = work / "statistics.safetensors"
        try:
            if path.exists():
                Statistics(path).check(plan.checkpoint)
        except InputError as error:
            logger.warning("%s; it is made again", error)
            path.unlink()
        statistics = measure(plan.checkpoint, path, calibration, device=device, progress=progress)
    folds = Folds({})
    wanted = sum(line.slot.size for line in plan.lines if line.method == "awq")
    if wanted:
        with progress(0, "", "starting"):
            from dsv2quant.calib.awq import choose_folds

        assert statistics is not None
        with disk_errors(work.parent), progress(wanted, "weights", "awq") as advance:
            folds = choose_folds(plan, work / "awq", statistics, device, advance)
    prepared = Prepared(plan, statistics, folds)
    if not needs_calibration(plan):
        return prepared
    with progress(0, "", "starting"):  # imports torch
        from dsv2quant.calib.sequence import quantize_layers

    assert calibration is not None
    with disk_errors(work.parent), progress(work_weights(plan), "weights", "gptq") as advance:
        encoded = quantize_layers(plan, work / "gptq", calibration, device, advance, prepared)
    return Prepared(plan, statistics, folds, encoded)
