"""What calibration has ready before weights are read: statistics, smoothing, and matrices that are encoded already."""

from __future__ import annotations

import logging
from pathlib import Path

from dsv2quant.calib.calibration import (
    Calibration,
    Prepared,
    needs_calibration,
    needs_statistics,
    work_weights,
)
from dsv2quant.calib.statistics import Statistics
from dsv2quant.errors import InputError
from dsv2quant.planning.plan import Plan
from dsv2quant.planning.smoothing import Smoothing
from dsv2quant.progress import Progress
from dsv2quant.storage.durable import disk_errors

logger = logging.getLogger(__name__)


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
    with disk_errors(work.parent), progress(work_weights(plan), "weights", "gptq") as advance:
        encoded = quantize_layers(plan, work / "gptq", calibration, device, advance, prepared)
    return Prepared(plan, statistics, smoothing, encoded)
