"""`search`: from a budget to a recipe.

RECIPE                the mix that was found, for `convert`
RECIPE.search/        candidates, and what was measured, until it is done: a run that was killed goes on from there
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

import dsv2quant.api as dq
from dsv2quant.allocation.choosing import Budget, Mix, choose
from dsv2quant.allocation.items import Part, parts_of
from dsv2quant.allocation.recipes import Recipe, folder_recipe, gguf_recipe, only_scheme, only_type
from dsv2quant.allocation.swaps import Text
from dsv2quant.arch.config import ModelConfig
from dsv2quant.calib.calibration import needs_calibration, read_calibration
from dsv2quant.checkpoint.checkpoint import HfCheckpoint
from dsv2quant.checkpoint.identity import sampled
from dsv2quant.conversion.gguf import metadata_of
from dsv2quant.errors import InputError, UsageError
from dsv2quant.evaluation.divergence import TOKENS_TOGETHER
from dsv2quant.formats.gguf import blocks, imatrix
from dsv2quant.model.load import LoadOptions
from dsv2quant.planning import consumers
from dsv2quant.planning import options as asked
from dsv2quant.planning.gguf_plan import GgufPlan, Options, lay_out, make_gguf_plan
from dsv2quant.planning.gguf_recipe import GgufRecipe
from dsv2quant.planning.options import HubOptions, StrPath
from dsv2quant.planning.plan import Plan, make_plan
from dsv2quant.progress import Progress, no_progress
from dsv2quant.storage.durable import disk_errors, write_whole
from dsv2quant.storage.safetensors import parse_size
from dsv2quant.version import __version__

if TYPE_CHECKING:
    from dsv2quant.report.calibration import Conversion

WINDOWS = 32  # of calibration text that swaps are measured on
# Schemes that a folder is mixed of, with the method of each; kv_b_proj is none's: engines decode it.
SCHEMES = {
    "int4-g128": "gptq", "int4-g64": "gptq", "int4-g32": "gptq", "int8-channel": "rtn", "fp8-channel": "rtn",
    "bf16": "rtn",
}  # fmt: skip
NEEDING = 3.1  # bits up to which block types are useless, or refused, without importance
# Block types that no mix is made of: BF16 holds as much, and the ternary ones are for models trained so.
LEFT_OUT = ("F32", "F16", "TQ1_0", "TQ2_0")


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
    **options: Unpack[asked.Options],
) -> Searched:  # fmt: skip
    """Find the mix of schemes, or with `into_gguf` of block types, that costs the least divergence from the model in a
    file or folder of at most `bits` for each weight or `size` bytes ("9GB"), or the smallest that costs at most
    `max_kld` nats; and write it to `out`, a recipe for `convert`.

    What each part of the model costs in each type is measured on calibration text; of a folder, on windows that
    candidates were not calibrated on. Of `options` it takes `calibration`, `samples`, `length` and `seed`, and for a
    folder `targets`, `tp` and `ep`, for GGUF `imatrix` and `imatrix_shrink`. Candidates and measurements lie in
    `<out>.search` until it is done: a run that was killed goes on from there. Raises UsageError for options that
    contradict each other and a budget that nothing keeps to, InputError where another file has the recipe's name, else
    as `convert` does.
    """
    started = time.perf_counter()
    given, budgets = asked.given_of(options), {"bits": bits, "size": size, "max_kld": max_kld}
    _check(out, into_gguf, given, budgets, device)
    if os.path.lexists(out):
        raise InputError("is there already", where=out, fix="give another name, or remove it")
    hub = {name: given[name] for name in HubOptions.__annotations__ if name in given}
    checkpoint = dq.open(model, **hub).as_source()
    path, folder = Path(out), Path(f"{os.fspath(out)}.search")
    space = prepare(checkpoint, folder, into_gguf, given, device, progress)
    most = parse_size(str(size)) if size is not None else None if bits is None else int(bits * space.parameters / 8)
    mix = space.choose(most, max_kld, progress)
    said = [_command(checkpoint.model, into_gguf, given, budgets), *_description(mix, space)]
    recipe = space.recipe(path.stem, said, mix)
    planned = _planned(checkpoint, recipe, given)
    with disk_errors(path):
        write_whole(path, [recipe.text.encode()])
        shutil.rmtree(folder)
    return Searched(path, planned, mix, space.text.ids.size, space.source, time.perf_counter() - started)


def convert_within(
    model: dq.Model, out: StrPath, *, bits: float | None = None, size: int | str | None = None,
    max_kld: float | None = None, device: str = "cpu", force: bool = False, progress: Progress = no_progress,
    **options: Unpack[asked.Options],
) -> Conversion:  # fmt: skip
    """Search, as `search` does, and `convert` by the recipe, which stays beside `out` as `<out>.yaml`; one that the
    same search wrote there is taken as it is. A GGUF file is written where `out` ends in .gguf."""
    given, into_gguf = asked.given_of(options), os.fspath(out).endswith(".gguf")
    budgets: dict[str, Any] = {"bits": bits, "size": size, "max_kld": max_kld}
    recipe = Path(f"{os.fspath(out)}.yaml")
    for name in ("scheme", "recipe", "method", "group_size", "layout", "gguf", "tensor_types"):
        if name in given:
            raise UsageError(f"{asked.spelled(name, given)} does not go with a budget: a search chooses what it says")
    searching = {name: value for name, value in given.items() if name in _takes(into_gguf)}
    _check(recipe, into_gguf, searching, budgets, device)
    hub = {name: given[name] for name in HubOptions.__annotations__ if name in given}
    checkpoint = dq.open(model, **hub)
    said = f"# {_command(checkpoint.model, into_gguf, searching, budgets)}\n"
    if not (recipe.is_file() and recipe.read_text(encoding="utf-8").startswith(said)):
        search(checkpoint, recipe, **budgets, into_gguf=into_gguf, device=device, progress=progress, **searching)
    calibrating: dict[str, Any] = {name: given.pop(name) for name in asked.CALIBRATION if name in given}
    given["gguf" if into_gguf else "recipe"] = os.fspath(recipe)
    plan = dq.plan(checkpoint, **given)
    if not (isinstance(plan, Plan) and needs_calibration(plan)):
        calibrating = {name: given[name] for name in ("split_max_size",) if name in given}
    return dq.convert(plan, out, device=device, force=force, progress=progress, **calibrating)


@dataclass(frozen=True)
class Space:
    """All that a mix is chosen from, whatever the budget: parts of a model, candidates' artifacts by name, and the text
    that divergences are measured on, from `source`. `fixed` are bytes of a whole artifact that no part takes. `folder`
    holds the artifacts and what was measured, of which `about` says what it is of."""

    checkpoint: HfCheckpoint
    folder: Path
    into_gguf: bool
    parts: Sequence[Part]
    candidates: Mapping[str, dq.Checkpoint]
    text: Text
    source: str
    fixed: int
    loading: LoadOptions

    @property
    def parameters(self) -> int:
        return sum(weight.spec.size for weight in self.checkpoint.weights)

    def choose(self, most: int | None, max_kld: float | None, progress: Progress) -> Mix:
        """The best mix of at most so many bytes, or the smallest that costs at most so many nats. Raises UsageError
        where there is none."""
        about = {
            "schema": "dsv2quant.search-state/1", "dsv2quant": __version__, "model": sampled(self.checkpoint),
            "tokens": hashlib.sha256(self.text.ids.tobytes()).hexdigest(),
            "candidates": {name: sampled(artifact) for name, artifact in self.candidates.items()},
        }  # fmt: skip
        budget = Budget(most, max_kld, self.fixed)
        return choose(
            self.parts, self.candidates, self.checkpoint, self.text, budget, self.folder / "state", about, self.loading,
            progress,
        )  # fmt: skip

    def recipe(self, name: str, said: Sequence[str], mix: Mix) -> Recipe | GgufRecipe:
        """A mix as a recipe, with lines `said` in front."""
        options = ((part.layer, part.options[mix.chosen[part.key]]) for part in self.parts)
        chosen = [(tensor, layer, kind, option.nbytes) for layer, option in options for tensor, kind in option.kinds]
        return gguf_recipe(name, said, chosen) if self.into_gguf else folder_recipe(name, said, chosen, SCHEMES)


def prepare(
    checkpoint: HfCheckpoint, folder: Path, into_gguf: bool, given: Mapping[str, Any], device: str, progress: Progress
) -> Space:
    """Make the candidates in a folder, or find them made, for `given` options of `search`."""
    recipes = _candidates(checkpoint, into_gguf, given)
    plans = {name: _planned(checkpoint, recipe, given) for name, recipe in recipes.items()}
    name, plan = next(iter(plans.items()))
    parts = parts_of(plans)
    with progress(0, "", "tokenize"):
        text, source = _text(checkpoint, given)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    made = {name: _made(plan, folder / name, given, device, progress) for name, plan in plans.items()}
    fixed = _size(plan) - sum(part.options[name].nbytes for part in parts)
    # In bfloat16 what a swap does to the last bits, and so to which experts are chosen, costs more than a good type.
    loading = LoadOptions(torch.float32, device)
    return Space(checkpoint, folder, into_gguf, parts, made, text, source, fixed, loading)


def _check(out: StrPath, gguf: bool, given: Mapping[str, Any], budgets: Mapping[str, Any], device: str) -> None:
    """Raise UsageError or InputError for what is refused before anything is opened."""
    asked.check_values(given)
    if (count := sum(value is not None for value in budgets.values())) != 1:
        raise UsageError(f"{count or 'no'} budgets are given", fix="give one of --bits, --size and --max-kld")
    for name, value in budgets.items():
        if isinstance(value, int | float) and not value > 0:
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


def _candidates(checkpoint: HfCheckpoint, gguf: bool, given: Mapping[str, Any]) -> dict[str, Recipe | GgufRecipe]:
    """Recipes of one type or scheme each. Block types of the fewest bits need importance."""
    if gguf:
        bits = {name: 8 * kind.bytes / kind.values for name, kind in blocks.TYPES.items() if name not in LEFT_OUT}
        # What needs importance has none for embedding and head: these then are as another candidate has them.
        ends = {name: name if bits[name] > NEEDING else "Q8_0" for name in bits}
        return {name: only_type(name, ends[name]) for name in bits if "imatrix" in given or bits[name] > NEEDING}
    takes = [
        name for name in SCHEMES if not _is_refused(name, given.get("targets", consumers.ENGINES), checkpoint.config)
    ]
    return {name: only_scheme(name, SCHEMES) for name in takes}


def _is_refused(scheme: str, targets: Sequence[str], config: ModelConfig) -> bool:
    try:
        consumers.choose(targets, {scheme}, config)
    except UsageError:
        return True
    return False


def _planned(checkpoint: HfCheckpoint, recipe: Recipe | GgufRecipe, given: Mapping[str, Any]) -> Plan | GgufPlan:
    """As `plan` makes it of options."""
    if isinstance(recipe, GgufRecipe):
        found = imatrix.read(Path(given["imatrix"])) if "imatrix" in given else None
        return make_gguf_plan(checkpoint, Options(recipe, imatrix=found, shrink=given.get("imatrix_shrink", False)))
    targets = given.get("targets", consumers.ENGINES)
    return make_plan(checkpoint, recipe, for_targets=targets, tp=given.get("tp", 1), ep=given.get("ep", 1))


def _size(plan: Plan | GgufPlan) -> int:
    """Bytes of the files that an artifact's weights are in."""
    if isinstance(plan, Plan):
        return plan.bytes_out
    (file,) = lay_out(plan, Path("any.gguf"), metadata_of(plan))
    return len(file.header) + plan.bytes_out


def _text(checkpoint: HfCheckpoint, given: Mapping[str, Any]) -> tuple[Text, str]:
    """Windows behind those that candidates are calibrated on."""
    found = read_calibration(
        checkpoint, given.get("calibration"), given.get("samples", 512) + WINDOWS, given.get("length"),
        given.get("seed"), cache_dir=given.get("cache_dir"), offline=given.get("offline", False),
    )  # fmt: skip
    ids = found.ids[-WINDOWS:]
    return Text(ids, max(1, TOKENS_TOGETHER // ids.shape[1])), found.source


def _made(
    plan: Plan | GgufPlan, path: Path, given: Mapping[str, Any], device: str, progress: Progress
) -> dq.Checkpoint:
    """A candidate's artifact, opened; the model itself where nothing of it is changed."""
    if isinstance(plan, Plan) and not plan.schemes:
        return plan.checkpoint
    if isinstance(plan, GgufPlan):
        path = path.with_suffix(".gguf")
        dq.convert(plan, path, device=device, progress=progress)
    else:
        names = asked.CALIBRATION if needs_calibration(plan) else ()
        calibrating = {name: given[name] for name in names if name in given}
        dq.convert(plan, path, device=device, progress=progress, **calibrating)
    return dq.open(path)


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
