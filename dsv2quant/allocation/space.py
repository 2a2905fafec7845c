"""What a mix is chosen from, whatever the budget: candidates of a whole model, its parts, and a text."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dsv2quant.api as dq
from dsv2quant.allocation.choosing import Budget, Mix, choose
from dsv2quant.allocation.items import Part, parts_of
from dsv2quant.allocation.measuring import Measuring
from dsv2quant.allocation.recipes import Recipe, folder_recipe, gguf_recipe, only_scheme, only_type
from dsv2quant.allocation.swaps import Text, passed
from dsv2quant.arch.config import ModelConfig
from dsv2quant.calib.calibration import calibrates, read_calibration
from dsv2quant.calib.distributed import ALONE, Ranks
from dsv2quant.checkpoint.checkpoint import HfCheckpoint
from dsv2quant.checkpoint.identity import sampled
from dsv2quant.conversion.gguf import metadata_of
from dsv2quant.errors import InputError, UsageError
from dsv2quant.evaluation.divergence import TOKENS_TOGETHER
from dsv2quant.following import convert_on_all
from dsv2quant.formats.gguf import blocks, imatrix
from dsv2quant.formats.gguf.imatrix import Imatrix
from dsv2quant.model.load import Loader, LoadOptions
from dsv2quant.planning import consumers
from dsv2quant.planning import options as asked
from dsv2quant.planning.gguf_plan import GgufPlan, Options, lay_out, make_gguf_plan
from dsv2quant.planning.gguf_recipe import GgufRecipe
from dsv2quant.planning.plan import Plan, make_plan
from dsv2quant.progress import Progress
from dsv2quant.storage.durable import StateLog, disk_errors, is_regular
from dsv2quant.version import __version__

WINDOWS = 32  # of calibration text that swaps are measured on
# Schemes that a folder is mixed of, with the method of each; kv_b_proj is none's: engines decode it.
SCHEMES = {
    "int2-g64": "gptq", "int3-g64": "gptq", "int4-g128": "gptq", "int4-g64": "gptq", "int4-g32": "gptq",
    "int8-channel": "rtn", "fp8-channel": "rtn", "bf16": "rtn",
}  # fmt: skip
# Of these routed experts alone, and all else in FP8: GPTQ would fit each layer to what such attention leaves of its
# inputs, and no mix has that.
OF_EXPERTS = ("int2-g64", "int3-g64")
STATE = "state"  # what was measured, in the folder of candidates
NEEDING = 3.1  # bits up to which block types are useless, or refused, without importance
# Block types that no mix is made of: BF16 holds as much, and the ternary ones are for models trained so.
LEFT_OUT = ("F32", "F16", "TQ1_0", "TQ2_0")


@dataclass(frozen=True)
class Space:
    """All that a mix is chosen from, whatever the budget: parts of a model, candidates' artifacts by name, and the text
    that divergences are measured on, from `source`; `own` are the windows of this rank. `fixed` are bytes of a whole
    artifact that no part takes. `folder` holds the artifacts, and what was measured."""

    checkpoint: HfCheckpoint
    folder: Path
    into_gguf: bool
    parts: Sequence[Part]
    candidates: Mapping[str, dq.Checkpoint]
    text: Text
    own: Text
    source: str
    fixed: int
    loading: LoadOptions
    ranks: Ranks

    @property
    def parameters(self) -> int:
        return sum(weight.spec.size for weight in self.checkpoint.weights)

    def choose(self, most: int | None, max_kld: float | None, progress: Progress) -> Mix:
        """The best mix of at most so many bytes, or the smallest that costs at most so many nats, for all ranks. Raises
        UsageError where there is none."""
        base, *others = (Loader(each, self.loading) for each in (self.checkpoint, *self.candidates.values()))
        with progress(0, "", "reference"):
            reference = passed(base, self.own)
        loaders = dict(zip(self.candidates, others, strict=True))
        measuring = Measuring({part.key: part for part in self.parts}, base, loaders, self.own, reference, self.ranks)
        found: Mix | None = None
        if self.ranks.is_first:
            found = choose(measuring, Budget(most, max_kld, self.fixed), self.folder / STATE, self._about(), progress)
            self.ranks.dismiss()
        else:
            measuring.follow()
        mix: Mix = self.ranks.agreed(found)
        return mix

    def _about(self) -> dict[str, Any]:
        return {
            "schema": "dsv2quant.search-state/1", "dsv2quant": __version__, "model": sampled(self.checkpoint),
            "tokens": hashlib.sha256(self.text.ids.tobytes()).hexdigest(),
            "candidates": {name: sampled(artifact) for name, artifact in self.candidates.items()},
        }  # fmt: skip

    def recipe(self, name: str, said: Sequence[str], mix: Mix) -> Recipe | GgufRecipe:
        """A mix as a recipe, with lines `said` in front."""
        options = ((part.layer, part.options[mix.chosen[part.key]]) for part in self.parts)
        chosen = [(tensor, layer, kind, option.nbytes) for layer, option in options for tensor, kind in option.kinds]
        return gguf_recipe(name, said, chosen) if self.into_gguf else folder_recipe(name, said, chosen, SCHEMES)


def prepare(
    checkpoint: HfCheckpoint, folder: Path, into_gguf: bool, given: Mapping[str, Any], device: str, progress: Progress,
    ranks: Ranks = ALONE,
) -> Space:  # fmt: skip
    """Make the candidates in a folder, or find them made, for `given` options of `search`. Of several ranks each calls
    this, and shares in what candidates are calibrated with; the first one alone writes."""
    if checkpoint.config.is_classifier:
        fix = "a search needs a language model"
        raise InputError(f"is a {checkpoint.config.architecture}", where=checkpoint.model, fix=fix)
    if "transformers" in given.get("targets", ()) and checkpoint.config.n_routed_experts:
        what = "--target transformers: it reads all routed experts in one scheme, and a search mixes theirs by layer"
        raise UsageError(what, fix="search for vllm or sglang")
    recipes, weighted = _candidates(checkpoint, into_gguf, given), importance(given)
    plans = {name: planned(checkpoint, recipe, given, weighted) for name, recipe in recipes.items()}
    name, plan = next(iter(plans.items()))
    parts = parts_of(plans)
    with progress(0, "", "tokenize"):
        text, source = _text(checkpoint, given)
    own = text.own(ranks)
    if ranks.is_first:
        _claim(folder)
    made = {name: _made(plan, folder / name, given, device, progress, ranks) for name, plan in plans.items()}
    fixed = _size(plan) - sum(part.options[name].nbytes for part in parts)
    # In bfloat16 what a swap does to the last bits, and so to which experts are chosen, costs more than a good type.
    loading = LoadOptions(torch.float32, device)
    return Space(checkpoint, folder, into_gguf, parts, made, text, own, source, fixed, loading, ranks)


def _claim(folder: Path) -> None:
    """Make the folder, or find it as a search left it. Raises InputError for one that is none of a search's: it is
    removed in the end."""
    state = folder / STATE
    with disk_errors(folder):
        if os.path.lexists(folder) and not (folder.is_dir() and (is_regular(state) or not any(folder.iterdir()))):
            raise InputError("is there, and no search's work", where=folder, fix="move it away")
        folder.mkdir(parents=True, exist_ok=True)
        StateLog(state, folder).close()


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
    experts = checkpoint.config.n_routed_experts
    rest = {name: "fp8-channel" if name in OF_EXPERTS else None for name in takes if experts or name not in OF_EXPERTS}
    return {name: only_scheme(name, SCHEMES, beside) for name, beside in rest.items()}


def _is_refused(scheme: str, targets: Sequence[str], config: ModelConfig) -> bool:
    try:
        consumers.choose(targets, {scheme}, config)
    except UsageError:
        return True
    return False


def importance(given: Mapping[str, Any]) -> Imatrix | None:
    """What is given of it, read."""
    return imatrix.read(Path(given["imatrix"])) if "imatrix" in given else None


def planned(
    checkpoint: HfCheckpoint, recipe: Recipe | GgufRecipe, given: Mapping[str, Any], weighted: Imatrix | None
) -> Plan | GgufPlan:
    """As `plan` makes it of options."""
    if isinstance(recipe, GgufRecipe):
        return make_gguf_plan(checkpoint, Options(recipe, imatrix=weighted, shrink=given.get("imatrix_shrink", False)))
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
    plan: Plan | GgufPlan, path: Path, given: Mapping[str, Any], device: str, progress: Progress, ranks: Ranks
) -> dq.Checkpoint:
    """A candidate's artifact, opened; the model itself where nothing of it is changed."""
    if isinstance(plan, Plan) and not plan.schemes:
        return plan.checkpoint
    path = path.with_suffix(".gguf") if isinstance(plan, GgufPlan) else path
    names = asked.CALIBRATION if calibrates(plan) else ()
    calibrating = {name: given[name] for name in names if name in given}
    convert_on_all(plan, plan, path, calibrating, ranks, device=device, progress=progress)
    return dq.open(path)
