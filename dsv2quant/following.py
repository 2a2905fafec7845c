"""What ranks other than the first do while that one makes statistics or an artifact: they read the same model and text,
compute their share of what it calibrates, and write nothing; and a conversion that all ranks call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

import dsv2quant.api as dq
from dsv2quant.calib.calibrate import follow
from dsv2quant.calib.calibration import calibrated_on, calibrates, check_ranks, read_calibration
from dsv2quant.calib.distributed import Ranks
from dsv2quant.planning import options as asked
from dsv2quant.planning.gguf_plan import GgufPlan
from dsv2quant.planning.options import HubOptions, Options, StrPath
from dsv2quant.planning.plan import Plan
from dsv2quant.progress import Progress, no_progress
from dsv2quant.text.tokenizer import Protocol

if TYPE_CHECKING:
    from dsv2quant.report.calibration import Conversion


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
    _follow_plan(asked.plan_of(dq.open(model, **asked.hub_of(given)), recipe, given), given, ranks)


def convert_on_all(
    model: dq.Model | Plan | GgufPlan, plan: Plan | GgufPlan, out: StrPath, given: Mapping[str, Any], ranks: Ranks,
    *, device: str = "cpu", force: bool = False, progress: Progress = no_progress,
) -> Conversion | None:  # fmt: skip
    """On every rank: `convert` of a model, or of the plan itself, with `given` options, by which `plan` is its plan.
    What calibrates nothing is rank 0's alone, and the others wait. None on any but rank 0."""
    run = partial(dq.convert, model, out, device=device, force=force, progress=progress, **given)
    if not calibrates(plan, "statistics" in given):
        made = run() if ranks.is_first else None
        ranks.agreed(None)  # that it is written
        return made
    if ranks.is_first:
        return run(ranks=ranks)
    _follow_plan(plan, given, ranks)
    return None


def _follow_plan(plan: Plan | GgufPlan, given: Mapping[str, Any], ranks: Ranks) -> None:
    used = calibrated_on(plan, given, no_progress) if isinstance(plan, Plan) else None
    check_ranks(plan, None if used is None else used.statistics, ranks)
    assert isinstance(plan, Plan)
    assert used is not None
    assert used.calibration is not None
    follow(plan.checkpoint, used.calibration, ranks, plan=plan)
