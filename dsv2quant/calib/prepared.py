"""What calibration has ready before weights are read: statistics, folds, and matrices that are encoded already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv2quant.calib.calibration import Calibration, Encoded, Outcome, needs_calibration, needs_statistics, work_tokens
from dsv2quant.calib.statistics import Statistics
from dsv2quant.folds import Folds
from dsv2quant.formats.part import Inputs
from dsv2quant.plan import Line, Plan
from dsv2quant.progress import Progress
from dsv2quant.report.calibration import expert_tokens
from dsv2quant.writer import disk_errors


@dataclass(frozen=True)
class Prepared:
    """Use `weight` and `inputs` for what a codec is given; `encoded` holds what needs no codec any more."""

    statistics: Statistics | None = None
    folds: Folds = Folds({})  # noqa: RUF009 - nothing changes it
    encoded: Encoded | None = None

    @property
    def outcomes(self) -> list[Outcome]:
        """What became of each matrix that is encoded already."""
        return self.encoded.outcomes if self.encoded is not None else []

    @property
    def expert_tokens(self) -> dict[int, list[int]]:
        """Tokens that each routed expert was calibrated on, by layer."""
        return expert_tokens(self.outcomes, self.statistics.counts if self.statistics is not None else {})

    def weight(self, line: Line, weight: np.ndarray) -> np.ndarray:
        """The weight to encode: BF16 bits (uint16) or float32, scaled where it is part of a fold."""
        return self.folds.apply(line.slot, weight)

    def inputs(self, line: Line) -> Inputs:
        """What the inputs of a weight that needs them were in calibration, behind the folds."""
        assert self.statistics is not None
        amax, importance = self.statistics.amax(line.slot), self.statistics.mean_square(line.slot)
        columns = self.folds.columns(line.slot)
        if columns is not None:
            amax, importance = np.ldexp(amax, -columns), np.ldexp(importance, -2 * columns)
        return Inputs(importance, float(amax.max()))


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
        from dsv2quant.calib.calibrate import calibrate

        assert calibration is not None
        work.mkdir(exist_ok=True)
        path = work / "statistics.safetensors"
        statistics = calibrate(plan.checkpoint, path, calibration, device=device, progress=progress)
    folds = Folds({})
    wanted = sum(line.slot.size for line in plan.lines if line.method == "awq")
    if wanted:
        from dsv2quant.calib.awq import choose_folds

        assert statistics is not None
        with disk_errors(work.parent), progress(wanted, "weights", "awq") as advance:
            folds = choose_folds(plan, work / "awq", statistics, device, advance)
    prepared = Prepared(statistics, folds)
    if not needs_calibration(plan):
        return prepared
    from dsv2quant.calib.sequence import quantize_layers

    assert calibration is not None
    with disk_errors(work.parent), progress(work_tokens(plan, calibration), "tok·layer", "gptq") as advance:
        return Prepared(
            statistics, folds, quantize_layers(plan, work / "gptq", calibration, device, advance, prepared)
        )
