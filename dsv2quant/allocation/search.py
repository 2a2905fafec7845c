"""`search`: from a budget to a recipe.

RECIPE                the mix that was found, for `convert`
RECIPE.search/        candidates, and what was measured, until it is done: a run that was killed goes on from there
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import dsv2quant.api as dq
from dsv2quant.allocation.choosing import Mix
from dsv2quant.allocation.space import Space, importance, planned, prepare
from dsv2quant.calib.calibration import used_by
from dsv2quant.calib.distributed import ALONE, Ranks
from dsv2quant.errors import InputError, UsageError
from dsv2quant.following import convert_on_all
from dsv2quant.planning import options as asked
from dsv2quant.planning.gguf_plan import GgufPlan
from dsv2quant.planning.options import HubOptions, StrPath
from dsv2quant.planning.plan import Plan
from dsv2quant.progress import Progress, no_progress
from dsv2quant.storage.durable import disk_errors, write_whole
from dsv2quant.storage.safetensors import parse_size

if TYPE_CHECKING:
    from dsv2quant.report.calibration import Conversion


@dataclass(frozen=True)
class Searched:
    """A search's outcome: the recipe's file, the plan that it makes, what was measured on `tokens` of calibration text
    from `source`, and the seconds that it took."""

    out: Path
    plan: Plan | GgufPlan
    mix: Mix
    tokens: int
    source: str
    seconds: float


def search(
    model: dq.Model, out: StrPath, *, bits: float | None = None, size: int | str | None = None,
    max_kld: float | None = None, into_gguf: bool = False, device: str = "cpu", progress: Progress = no_progress,
    ranks: Ranks = ALONE, **options: Unpack[asked.Options],
) -> Searched:  # fmt: skip
    """Find the mix of schemes, or with `into_gguf` of block types, that costs the least divergence from the model in a
    file or folder of at most `bits` for each weight or `size` bytes ("9GB"), or the smallest that costs at most
    `max_kld` nats; and write it to `out`, a recipe for `convert`.

    What each part of the model costs in each type is measured on calibration text; of a folder, on windows that
    candidates were not calibrated on. Of `options` it takes `calibration`, `samples`, `length` and `seed`, and for a
    folder `targets`, `tp` and `ep`, for GGUF `imatrix` and `imatrix_shrink`. Candidates and measurements lie in
    `<out>.search` until it is done: a run that was killed goes on from there. Several `ranks` measure some windows
    each, and all get the same; the first one writes. Raises UsageError for options that contradict each other, a budget
    that nothing keeps to and more ranks than batches of windows, InputError where another file has the recipe's name,
    else as `convert` does.
    """
    started = time.perf_counter()
    given, budgets = asked.given_of(options), {"bits": bits, "size": size, "max_kld": max_kld}
    _check(out, into_gguf, given, budgets, device)
    if os.path.lexists(out):
        raise InputError("is there already", where=out, fix="give another name, or remove it")
    checkpoint = dq.open(model, **asked.hub_of(given)).as_source()
    path, folder = Path(out), Path(f"{os.fspath(out)}.search")
    space = prepare(checkpoint, folder, into_gguf, given, device, progress, ranks)
    most = parse_size(str(size)) if size is not None else None if bits is None else int(bits * space.parameters / 8)
    mix = space.choose(most, max_kld, progress)
    said = [_command(checkpoint.model, into_gguf, given, budgets), *_description(mix, space)]
    recipe = space.recipe(path.stem, said, mix)
    plan = planned(checkpoint, recipe, given, importance(given))
    if ranks.is_first:
        with disk_errors(path):
            write_whole(path, [recipe.text.encode()])
            shutil.rmtree(folder)
    seconds = ranks.agreed(time.perf_counter() - started)  # when it is written
    return Searched(path, plan, mix, space.text.ids.size, space.source, seconds)


def convert_within(
    model: dq.Model, out: StrPath, *, bits: float | None = None, size: int | str | None = None,
    max_kld: float | None = None, device: str = "cpu", force: bool = False, progress: Progress = no_progress,
    ranks: Ranks = ALONE, **options: Unpack[asked.Options],
) -> Conversion | None:  # fmt: skip
    """Search, as `search` does, and `convert` by the recipe, which stays beside `out` as `<out>.yaml`; one that the
    same search wrote there is taken as it is. A GGUF file is written where `out` ends in .gguf. Several `ranks` share
    in both; None on any but the first."""
    given, into_gguf = asked.given_of(options), os.fspath(out).endswith(".gguf")
    budgets: dict[str, Any] = {"bits": bits, "size": size, "max_kld": max_kld}
    recipe = Path(f"{os.fspath(out)}.yaml")
    for name in ("scheme", "recipe", "method", "group_size", "layout", "gguf", "tensor_types"):
        if name in given:
            raise UsageError(f"{asked.spelled(name, given)} does not go with a budget: a search chooses what it says")
    searching = {name: value for name, value in given.items() if name in _takes(into_gguf)}
    _check(recipe, into_gguf, searching, budgets, device)
    checkpoint = dq.open(model, **asked.hub_of(given))
    said = f"# {_command(checkpoint.model, into_gguf, searching, budgets)}\n"
    if not ranks.agreed(recipe.is_file() and recipe.read_text(encoding="utf-8").startswith(said)):
        search(
            checkpoint, recipe, **budgets, into_gguf=into_gguf, device=device, progress=progress, ranks=ranks,
            **searching,
        )  # fmt: skip
    calibrating: dict[str, Any] = {name: given.pop(name) for name in asked.CALIBRATION if name in given}
    given["gguf" if into_gguf else "recipe"] = os.fspath(recipe)
    plan = dq.plan(checkpoint, **given)
    given |= used_by(plan, given, calibrating)
    return convert_on_all(checkpoint, plan, out, given, ranks, device=device, force=force, progress=progress)


def _check(out: StrPath, gguf: bool, given: Mapping[str, Any], budgets: Mapping[str, Any], device: str) -> None:
    """Raise UsageError or InputError for what is refused before anything is opened."""
    asked.check_values(given)
    if (count := sum(value is not None for value in budgets.values())) != 1:
        raise UsageError(f"{count or 'no'} budgets are given", fix="give one of --bits, --size and --max-kld")
    for name, value in budgets.items():
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise UsageError(f"{asked.dashed(name)} {value:g} is out of range", fix="it must be above 0")
    for name in sorted(given.keys() - _takes(gguf)):
        of_other = name in ("imatrix", "imatrix_shrink", "targets", "tp", "ep")
        why = "a search" if not of_other else "--gguf"
        raise UsageError(
            f"{asked.spelled(name, given)} {'goes' if of_other and not gguf else 'does not go'} with {why}"
        )
    if not os.fspath(out).endswith((".yaml", ".yml")):
        raise UsageError(f"-o {os.fspath(out)}: a recipe's name ends in .yaml")
    asked.check_text(given.get("calibration"))
    asked.check_device(device)


def _takes(gguf: bool) -> set[str]:
    """Options that a search has a use for."""
    takes = {*asked.CALIBRATION, *HubOptions.__annotations__} - {"figure"}
    return takes | ({"imatrix", "imatrix_shrink"} if gguf else {"targets", "tp", "ep"})


def _command(model: str, into_gguf: bool, given: Mapping[str, Any], budgets: Mapping[str, Any]) -> str:
    """What was asked for, in words, with no path of this machine."""
    words = ["--gguf"] * into_gguf
    words += [f"{asked.dashed(name)} {value}" for name, value in budgets.items() if value is not None]
    names = ("samples", "length", "seed")
    text = [f"--calibration {Path(given['calibration']).name}"] if "calibration" in given else []
    text += [f"{asked.dashed(name)} {given[name]}" for name in names if name in given]
    return " ".join(["dsv2quant search", model, *words, *asked.words_of(given), *text])


def _description(mix: Mix, space: Space) -> list[str]:
    """What a person should know of a recipe."""
    point = mix.point
    lines = [
        f"Measured on {space.text.ids.size:,} tokens of {space.source}: {point.nbytes:,} bytes, "
        f"KLD {point.measured:.5f} ± {point.stderr:.5f} nats ({point.predicted:.5f} predicted).",
        "The best mixes of other sizes, as single swaps predict them:",
    ]
    return [*lines, *(f"  {p.nbytes:>15,} bytes  {p.predicted:.5f}" for p in mix.curve)]
