"""What a calibrated conversion takes on some machines, as text and as JSON."""

from __future__ import annotations

from typing import Any

from dsv2quant.calib.costs import PHASES
from dsv2quant.calib.forecast import Forecast, Forecasts
from dsv2quant.report.tables import table, values_of

GB = 10**9


def forecast_text(found: Forecasts, *, markdown: bool = False) -> str:
    """What `dsv2quant plan --time` prints: seconds of all layers and of one with experts, minutes of it all; bytes of a
    rank."""
    model, recipe = found.plan.checkpoint.model, found.plan.recipe.name
    times = ["GPUs", *PHASES, "layer", "artifact", "minutes", "bound by"]
    sizes = ["GPUs", "device", "host", "NVLink", "network", "disk"]
    return "\n".join(
        [
            f"{model}: {recipe}, {found.samples} windows of {found.length:,} tokens; seconds of all layers, of one",
            table(times, [_times(found, each) for each in found.each], markdown=markdown),
            "GB of a rank's memory, sent over each link by a rank, and read and written by a node",
            table(sizes, [_sizes(each) for each in found.each], markdown=markdown),
        ]
    )


def _name(each: Forecast) -> str:
    machines = each.machines
    return (f"{machines.nodes} × " if machines.nodes > 1 else "") + f"{machines.gpus} {machines.gpu}"


def _times(found: Forecasts, each: Forecast) -> list[str]:
    phases = (f"{each.seconds[phase]:.0f}" for phase in PHASES)
    layer = each.layers[-1 if found.experts is None else found.experts]
    saturated = next(iter(each.busy))
    return [_name(each), *phases, f"{layer:.1f}", f"{each.artifact:.0f}", f"{each.total / 60:.1f}", saturated]


def _sizes(each: Forecast) -> list[str]:
    sizes = (each.device, each.host, each.nvlink, each.network, each.disk)
    return [_name(each), *(f"{size / GB:,.1f}" for size in sizes)]


def forecast_json(found: Forecasts) -> dict[str, Any]:
    """The object of `dsv2quant plan --time --json`: seconds and bytes."""
    sizes = ("device", "host", "nvlink", "network", "disk")
    return {
        "schema": "dsv2quant.time/1",
        "model": found.plan.checkpoint.model,
        "recipe": found.plan.recipe.name,
        **values_of(found, "samples", "length"),
        "machines": [
            {
                **values_of(each.machines, "gpu", "gpus", "nodes"),
                **values_of(each, "seconds", "artifact", "total", *sizes, "busy"),
                "layers": list(each.layers),
            }
            for each in found.each
        ],
    }
