"""An artifact by layer and role: bits of its weights and, where it was held against its source, their errors."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv2quant.arch.spec import ROLES
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.weights import Weight
from dsv2quant.evaluation.results import TensorError, sqnr
from dsv2quant.report.measured import Cell


def cells(checkpoint: Checkpoint, errors: Sequence[TensorError] = ()) -> tuple[Cell, ...]:
    """Layer by layer, each in the order of `ROLES`, what is outside of layers first; `errors` are of all weights of the
    checkpoint, or none."""
    error_of = {error.name: error for error in errors}
    groups: dict[tuple[int, int], list[Weight]] = defaultdict(list)
    for weight in checkpoint.weights:
        layer = -1 if weight.spec.layer is None else weight.spec.layer
        groups[layer, ROLES.index(weight.spec.role)].append(weight)
    return tuple(_cell(groups[key], [error_of[w.spec.name] for w in groups[key] if error_of]) for key in sorted(groups))


def _cell(weights: Sequence[Weight], errors: Sequence[TensorError]) -> Cell:
    size = sum(weight.spec.size for weight in weights)
    spec, noisy = weights[0].spec, [error.sqnr for error in errors if error.noise]
    known: dict[str, Any] = {}
    if noisy:
        signal = sum(error.signal for error in errors)
        tenth = float(np.quantile([error.sqnr for error in errors], 0.1, method="lower"))
        known = {
            "signal": signal,
            "sqnr_db": sqnr(signal, sum(error.noise for error in errors)),
            "decile_db": tenth if math.isfinite(tenth) else None,  # where few differ, these are none of the worst
            "lowest_db": min(noisy),
        }
    return Cell(
        spec.layer, spec.role, tuple(sorted({weight.stored_scheme for weight in weights})), len(weights), size,
        8 * sum(weight.nbytes for weight in weights) / size, exact=bool(errors) and not noisy, **known,
    )  # fmt: skip
