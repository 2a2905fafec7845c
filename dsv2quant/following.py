"""What ranks other than the first do while that one makes statistics or an artifact: they read the same model and text,
compute their share of what it calibrates, and write nothing."""

from __future__ import annotations

from typing import Any, Unpack

import dsv2quant.api as dq
from dsv2quant.calib.calibrate import follow
from dsv2quant.calib.calibration import calibrated_on, check_ranks, read_calibration
from dsv2quant.calib.distributed import Ranks
from dsv2quant.planning import options as asked
from dsv2quant.planning.options import HubOptions, Options, StrPath
from dsv2quant.planning.plan import Plan
from dsv2quant.progress import no_progress
from dsv2quant.text.tokenizer import Protocol


def follow_calibration(
    model: dq.Model, ranks: Ranks, *, text: StrPath | None = None, samples: int | None = None,
    length: int | None = None, seed: int | None = None, protocol: Protocol = "default", imatrix: StrPath | None = None,
    **hub: Unpack[HubOptions],
) -> None:  # fmt: skip
    """Beside `calibrate` of rank 0, with its options. Raises as that does."""
    asked.check_values({"samples": samples, "length": length, "seed": seed, "protocol": protocol})
    checkpoint = dq.open(model, **hub)
    where = hub.get("cache_dir"), hub.get("offline", False)
    calibration = read_calibration(checkpoint, text, samples, length, seed, protocol, *where)
    follow(checkpoint, calibration, ranks, halves=imatrix is not None)


def follow_conversion(model: dq.Model, ranks: Ranks, **options: Unpack[Options]) -> None:
    """Beside `convert` of rank 0, with its options. Raises as that does."""
    given: dict[str, Any] = asked.given_of(options)
    recipe = asked.check_options(given)
    plan = asked.plan_of(dq.open(model, **asked.hub_of(given)), recipe, given)
    used = calibrated_on(plan, given, no_progress) if isinstance(plan, Plan) else None
    check_ranks(plan, None if used is None else used.statistics, ranks)
    assert isinstance(plan, Plan)
    assert used is not None
    assert used.calibration is not None
    follow(plan.checkpoint, used.calibration, ranks, plan=plan)
