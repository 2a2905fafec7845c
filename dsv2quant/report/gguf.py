"""A GGUF plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsv2quant.planning.gguf_plan import Entry, GgufPlan
from dsv2quant.report.tables import count, gigabytes, table


def plan_text(plan: GgufPlan, *, every_tensor: bool = False) -> str:
    """The plan as `dsv2quant plan --gguf` prints it; with `every_tensor`, tensor by tensor."""
    parts = [
        f"{plan.checkpoint.model}: {count(plan.parameters)} parameters, {plan.options.file_type} for llama.cpp",
        table(
            ["tensor", "type", "tensors", "layers", "size", "bits/weight"], [_row(*group) for group in _groups(plan)]
        ),
        f"{gigabytes(plan.bytes_in)} → {gigabytes(plan.bytes_out)}, "
        f"{8 * plan.bytes_out / plan.parameters:.2f} bits per weight",
    ]
    fallbacks = [(kind, entries) for kind, entries in _groups(plan) if entries[0].reason]
    if fallbacks:
        parts.append("Fallbacks:")
    parts += [f"  {kind}, {_layers(entries)} → {entries[0].type}: {entries[0].reason}" for kind, entries in fallbacks]
    if every_tensor:
        parts += [f"  {entry.name} {list(entry.tensor.shape)} {entry.type}" for entry in plan.entries]
    parts += [f"note: {note}" for note in plan.notes]
    return "\n".join(parts)


def plan_json(plan: GgufPlan) -> dict[str, Any]:
    """The object of `dsv2quant plan --gguf --json`."""
    return {
        "schema": "dsv2quant.plan-gguf/2",
        "model": plan.checkpoint.model,
        "revision": plan.checkpoint.revision,
        "file_type": plan.options.file_type,
        "parameters": plan.parameters,
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "bits_per_weight": 8 * plan.bytes_out / plan.parameters,
        "entries": [
            {
                "tensor": entry.name,
                "shape": list(entry.tensor.shape),
                "type": entry.type,
                "bytes": entry.nbytes,
                "reason": entry.reason,
            }
            for entry in plan.entries
        ],
        "notes": list(plan.notes),
    }


def _groups(plan: GgufPlan) -> list[tuple[str, list[Entry]]]:
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in plan.entries:
        groups.setdefault((entry.tensor.kind, entry.type), []).append(entry)
    return [(kind, entries) for (kind, _), entries in groups.items()]


def _row(kind: str, entries: Sequence[Entry]) -> list[object]:
    nbytes = sum(entry.nbytes for entry in entries)
    weights = sum(entry.tensor.size for entry in entries)
    return [kind, entries[0].type, len(entries), _layers(entries), gigabytes(nbytes), f"{8 * nbytes / weights:.2f}"]


def _layers(entries: Sequence[Entry]) -> str:
    """'1-26', or '1-3, 7'."""
    spans: list[list[int]] = []
    for layer in (entry.tensor.layer for entry in entries if entry.tensor.layer is not None):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
