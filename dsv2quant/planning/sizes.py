"""At which tensor-parallel sizes a consumer loads what a plan makes, beside the size that it was made for."""

from __future__ import annotations

from dsv2quant.arch.spec import TensorSpec
from dsv2quant.errors import InputError, UsageError
from dsv2quant.planning.consumers import ENGINES, Parallel, check_parallel, check_unquantized, refusal
from dsv2quant.planning.plan import Plan

SIZES = (1, 2, 4, 8, 16)  # GPUs that one server, or two, have


def tensor_parallel_sizes(plan: Plan, target: str) -> list[int]:
    """Those of `SIZES` at which `target` splits the model and takes each tensor in the scheme that it has."""
    if target not in ENGINES:
        return [1]  # transformers loads the whole model
    # One of each kind: layers and experts are alike.
    kinds = {(e.spec.role, e.spec.shape, e.scheme, e.spec.is_prediction): e for e in plan.entries}
    schemes = {entry.spec: entry.scheme for entry in kinds.values()}
    return [tp for tp in SIZES if _loads(plan, schemes, target, Parallel(tp, plan.parallel.ep))]


def _loads(plan: Plan, schemes: dict[TensorSpec, str], target: str, parallel: Parallel) -> bool:
    try:
        check_parallel(plan.checkpoint.config, parallel, [target])
        check_unquantized(schemes, [target], parallel)
    except (UsageError, InputError):
        return False
    return all(refusal(spec, scheme, [target], parallel) is None for spec, scheme in schemes.items())
