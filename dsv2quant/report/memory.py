"""What a model takes of a GPU's memory, as text and as JSON."""

from __future__ import annotations

from typing import Any

from dsv2quant.planning.memory import GIB, Cell, MemoryPlan
from dsv2quant.report.tables import table, values_of

PARTS = ("weights", "cache", "logits", "activations", "unused", "total")


def memory_text(plan: MemoryPlan) -> str:
    """What `dsv2quant memory` prints: GiB."""
    w = plan.workload
    split = [f"layers over {w.pp}" * (w.pp > 1), f"matrices over {w.tp}" * (w.tp > 1)]
    gpus = f", the fullest of {w.pp * w.tp} GPUs ({', '.join(filter(None, split))})" if w.pp * w.tp > 1 else ""
    card = "" if plan.capacity is None else f"; {plan.card} has {plan.capacity / GIB:.2f}"
    header = [
        f"{plan.model}: {w.prefill} prefill, {w.kv_cache} cache of {plan.cache_per_token / 1024:,.1f} KiB per token",
        f"GiB{gpus}{card}",
    ]
    columns = ["batch", "context", *PARTS] + ["fits"] * (plan.capacity is not None)
    return "\n".join([*header, table(columns, [_row(cell) for cell in plan.cells])])


def _row(cell: Cell) -> list[object]:
    sizes = [f"{getattr(cell, part) / GIB:.2f}" for part in PARTS]
    said = {True: ["yes"], False: ["no"], None: []}[cell.fits]
    return [cell.batch, cell.context, *sizes, *said]


def memory_json(plan: MemoryPlan) -> dict[str, Any]:
    """The object of `dsv2quant memory --json`: bytes."""
    return {
        "schema": "dsv2quant.memory/1",
        **values_of(plan, "model", "card", "capacity", "cache_per_token"),
        **values_of(plan.workload, "prefill", "kv_cache", "tp", "pp"),
        "cells": [values_of(cell, "batch", "context", *PARTS, "allocated", "fits") for cell in plan.cells],
    }
