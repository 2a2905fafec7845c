"""What a plan warns of: a recipe of which targets leave little, a model that a target can't read, rules that do
nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from dsv2quant.arch.spec import TensorSpec
from dsv2quant.errors import Dsv2quantError
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning import consumers as targets
from dsv2quant.planning import recipe as recipes
from dsv2quant.planning.consumers import Parallel
from dsv2quant.planning.plan import Plan, choose_schemes
from dsv2quant.planning.recipe import Recipe
from dsv2quant.report.tables import gigabytes


def warnings(plan: Plan) -> list[str]:
    """One line each, the gravest first."""
    specs = [entry.spec for entry in plan.entries]
    if plan.recipe.builtin:
        wished = {plan.recipe.assign(spec)[0] for spec in {(spec.role, spec.layer): spec for spec in specs}.values()}
        idle = [f"no weight here becomes {scheme}: take --int4=pure" for scheme in plan.recipe.schemes - wished]
    else:
        config = plan.checkpoint.config
        idle = plan.recipe.idle_rules(specs, config.num_hidden_layers + config.num_nextn_predict_layers)
    return [*_unquantized(plan), *_unknown(plan), *(f"recipe {plan.recipe.name}: {entry}" for entry in idle)]


def _unknown(plan: Plan) -> list[str]:
    """What vLLM can't read of a model: 0.32 was run."""
    if "vllm" not in plan.targets or plan.checkpoint.raw_config.get("model_type") != "deepseek":
        return []
    return [
        "vLLM knows model_type deepseek by the model's own code alone, which no artifact carries: copy "
        "configuration_deepseek.py beside it, name it in its auto_map, and start vLLM with --trust-remote-code"
    ]


def _unquantized(plan: Plan) -> list[str]:
    """Whether most weights that the recipe quantizes stay in BF16; why, and what quantizes them."""
    left = _left(((entry.spec, entry.scheme, entry.reason) for entry in plan.entries), 1)
    if left <= 0.5:
        return []
    reasons: Counter[str] = Counter()
    for entry in plan.entries:
        if entry.reason and entry.scheme == "bf16":
            reasons[entry.reason] += entry.spec.size
    bits = plan.bits_per_weight
    said = f"{left:.0%} of what recipe {plan.recipe.name} quantizes stays in BF16, {bits:.2f} bits per weight in all"
    ways = [f"{words} (about {gigabytes(nbytes)})" for words, nbytes in _ways_out(plan).items()]
    instead = f". What quantizes most of it: {', '.join(ways)}" if ways else ""
    return [f"{said}: {max(reasons, key=lambda reason: reasons[reason])}{instead}"]


def _ways_out(plan: Plan) -> dict[str, int]:
    """{options: bytes of the artifact's weights} of plans near this one that do quantize most of what they should."""
    recipe, parallel = plan.recipe, plan.parallel
    finer = [(f"--group-size {size or 'channel'}", _regrouped(recipe, size)) for size in (64, 32, 0) if recipe.builtin]
    other = [("--fp8=channel", recipes.builtin("fp8-channel"))] if recipe.schemes != {"bf16", "fp8-channel"} else []
    smaller = [tp for tp in range(parallel.tp - 1, 0, -1) if parallel.tp % tp == 0]
    # Of each kind the first that helps.
    kinds: list[list[tuple[str, Recipe | None, Parallel]]] = [
        [(words, regrouped, parallel) for words, regrouped in finer],
        [(f"--ep {parallel.tp}", recipe, Parallel(parallel.tp, parallel.tp))] if parallel.ep == 1 else [],
        [(f"--tp {tp}", recipe, replace(parallel, tp=tp)) for tp in smaller],
        [(words, another, parallel) for words, another in other],
    ]
    ways: dict[str, int] = {}
    for kind in kinds:
        for words, near, split in kind:
            nbytes = _planned(plan, near, split) if near is not None else None
            if nbytes is not None:
                ways[words] = nbytes
                break
    return ways


def _regrouped(recipe: Recipe, size: int) -> Recipe | None:
    """The recipe with another INT4 group size (0: whole rows); None where that changes nothing, or its layout has no
    such size."""
    rules = tuple(replace(rule, scheme=CODECS[rule.scheme].variant(size)) for rule in recipe.rules)
    changed = replace(recipe, rules=rules)
    return changed if changed != recipe and changed.schemes <= set(CODECS) else None


def _planned(plan: Plan, recipe: Recipe, parallel: Parallel) -> int | None:
    """Bytes of the weights that a recipe gives at a parallel size; None where most of it falls back too, or it has no
    artifact. Looks at one expert of each layer: all of them are treated alike."""
    config = plan.checkpoint.config
    stored = {entry.spec: entry.weight.scheme for entry in plan.entries if not entry.spec.expert}
    try:
        targets.choose(plan.targets, recipe.schemes, config)
        targets.check_parallel(config, parallel, plan.targets)
        chosen = choose_schemes(stored, recipe, plan.targets, parallel)
        targets.check_unquantized({s: scheme for s, (scheme, _, _) in chosen.items()}, plan.targets, parallel)
    except Dsv2quantError:
        return None
    if _left(((spec, scheme, reason) for spec, (scheme, _, reason) in chosen.items()), config.n_routed_experts) > 0.5:
        return None
    nbytes = 0
    for spec, (scheme, _, _) in chosen.items():
        parts = CODECS[scheme].layout(spec.shape) if scheme != "bf16" else ()
        copies = 1 if spec.expert is None else config.n_routed_experts
        nbytes += copies * (sum(part.nbytes for part in parts) if parts else 2 * spec.size)
    return nbytes


def _left(decided: Iterable[tuple[TensorSpec, str, str | None]], experts: int) -> float:
    """The share of weights that fell back to BF16 among those that a recipe quantizes; each expert counts `experts`
    times."""
    kept = done = 0
    for spec, scheme, reason in decided:
        size = spec.size * (1 if spec.expert is None else experts)
        if scheme != "bf16":
            done += size
        elif reason:
            kept += size
    return kept / (kept + done) if kept else 0.0
