"""What an evaluation is asked: refused before anything is opened where it contradicts itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv2quant.errors import UsageError
from dsv2quant.planning.options import check_values


def check_evaluation(given: Mapping[str, Any], *, weight_only: bool, decode_path: bool, ranks: int) -> None:
    """Raise UsageError for options of `evaluate`, None where not given, that can't be had, together or by so many
    ranks."""
    check_values(given)
    asked = {name for name, value in given.items() if value is not None}
    kv_cache = given["kv_cache"]
    if "serving" in asked and weight_only:
        raise UsageError("--as and --weight-only exclude each other: a consumer does as it does")
    if "reference" not in asked and {"max_ppl_increase", "max_kld"} & asked:
        raise UsageError("--max-ppl-increase and --max-kld need --reference")
    if {"save_reference", "reference"} <= asked:
        raise UsageError("--save-reference and --reference exclude each other: what is kept is MODEL itself")
    if "save_reference" in asked and ranks > 1:
        raise UsageError("--save-reference: one process makes the file of a reference", fix="run it without torchrun")
    if "save_reference" in asked and kv_cache != "auto":
        raise UsageError(f"--kv-cache {kv_cache}: a reference that is kept has the compute dtype in its cache")
    if {"text", "dataset"} <= asked:
        raise UsageError("--text and --dataset exclude each other")
    if kv_cache != "auto" and not decode_path:
        raise UsageError("--kv-cache needs --decode-path: prefill reads no cache")
