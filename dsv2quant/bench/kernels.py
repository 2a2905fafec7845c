"""`dsv2quant bench kernels`: every operation in DeepSeek-V2's and V2-Lite's shapes, beside its peers and the floor.

Times are CUDA-graph replays over random operands in rotation, so that none is in the cache: the median of 7. Each call
is checked against float64 on the dequantized operands before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv2quant.bench import experts, fp8, fused, gguf, int4, mla
from dsv2quant.bench.device import Measured, append, check_device, limits, measured_on

SECTIONS = {"fp8": fp8, "int4": int4, "gguf": gguf, "experts": experts, "mla": mla, "fused": fused}
PEERS = list(dict.fromkeys(peer for section in SECTIONS.values() for peer in section.PEERS))


def run(names: Sequence[str], results: Path | None, say: Callable[[str], object]) -> dict[str, Any]:
    """Measure the sections of these names; `say` gets a line for each call, `results` a row.

    Returns what was measured, the rows of the summary, and the calls whose error is beyond its limit. Raises UsageError
    without a Hopper GPU.
    """
    check_device()
    torch.manual_seed(0)
    reached, where = limits(), measured_on()
    say(f"{where['GPU']}, driver {where['driver']}, {where['versions']}: {reached}")
    measured: list[Measured] = []
    for name in names:
        for call in SECTIONS[name].measure(reached):
            measured.append(call)
            say(call.line())
    rows = [call.columns(PEERS) | {"limits": str(reached)} | where for call in measured]
    append(results, rows)
    summaries = [row.summary(measured) for name in names for row in SECTIONS[name].ROWS]
    return {
        **where,
        "read_bytes_per_s": reached.read,
        "bf16_flops": reached.products,
        "kernels": [call._asdict() for call in measured],
        "rows": [summary for summary in summaries if summary],
        "wrong": [call.label for call in measured if call.wrong],
    }


def summary_line(row: dict[str, Any]) -> str:
    """A row of the summary as text."""
    return (
        f"{row['row']}, against {row['against']}: {row['mean']:.2f} in the mean of {row['calls']}, "
        f"worst {row['worst']:.2f} ({row['worst call']})"
    )
