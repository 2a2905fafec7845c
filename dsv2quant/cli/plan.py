"""`dsv2quant plan`."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal
from dsv2quant.planning import options as known

_time_options = shared.stack(
    click.option("--time", "timed", is_flag=True,
                 help="Tell instead what GPTQ's calibration and the conversion take on GPUs: seconds, memory, bytes."),
    click.option("--gpu", type=click.Choice(("H200", "H100")), default="H200", show_default=True, help="Kind of GPU."),
    click.option("--gpus", type=click.IntRange(min=1), help="GPUs of a machine. Default: 1, 2 and 8, and 4 machines."),
    click.option("--nodes", type=click.IntRange(min=1), help="Machines."),
    click.option("--num-calibration-samples", "samples", type=click.IntRange(min=1), default=512, show_default=True,
                 help="Windows of calibration text."),
    click.option("--max-seq-length", "length", type=click.IntRange(min=8),
                 help="Tokens of a window. Default: 2048, or the context the model was trained for."),
    section="Time",
)  # fmt: skip


@click.command(cls=shared.Command)
@click.argument("model", type=shared.PATH)
@shared.plan_options
@_time_options
@shared.hub_options
@shared.output_options
def command(model: str, as_json: bool, verbose: int, quiet: bool, timed: bool, **options: Any) -> None:
    """Show what a conversion of MODEL (a folder or hub id) would do, from headers alone.

    Prints each role's scheme, sizes and bits per weight, and every tensor that falls back with the rule behind it.
    No weight is read or downloaded.

    \b
    Example:
      dsv2quant plan deepseek-ai/DeepSeek-V2-Lite --fp8 --target vllm --tp 2
      dsv2quant plan deepseek-ai/DeepSeek-V2-Lite --int4 --time --gpus 2
    """
    terminal.set_verbosity(verbose, quiet)
    if not timed and (idle := shared.given(*known.MACHINES)):
        raise click.UsageError(f"{idle[0]} goes with --time")
    asked = shared.asked(options)
    machines = {name: asked.pop(name) for name in known.MACHINES if name in asked}
    if not timed:
        show(model, asked, as_json, every_tensor=verbose > 0)
        return
    if "gguf" in asked:
        raise click.UsageError("--gguf does not go with --time: GPTQ has no part in it")
    from dsv2quant.report.forecast import forecast_json, forecast_text

    plan: Any = dq.plan(model, **asked)
    terminal.show(dq.forecast(plan, **machines), forecast_json, forecast_text, as_json)


def show(model: str, asked: dict[str, Any], as_json: bool, *, every_tensor: bool) -> None:
    """Print a plan."""
    from dsv2quant.report.plans import plan_json, plan_text

    terminal.show(dq.plan(model, **asked), plan_json, partial(plan_text, every_tensor=every_tensor), as_json)
