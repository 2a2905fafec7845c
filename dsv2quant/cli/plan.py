"""`dsv2quant plan`."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal


@click.command(cls=shared.Command)
@click.argument("model", type=shared.PATH)
@shared.plan_options
@shared.hub_options
@shared.output_options
def command(model: str, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Show what a conversion of MODEL (a folder or hub id) would do, from headers alone.

    Prints each role's scheme, sizes and bits per weight, and every tensor that falls back with the rule behind it.
    No weight is read or downloaded.

    \b
    Example:
      dsv2quant plan deepseek-ai/DeepSeek-V2-Lite --fp8 --target vllm --tp 2
    """
    terminal.set_verbosity(verbose, quiet)
    show(model, shared.asked(options), as_json, every_tensor=verbose > 0)


def show(model: str, asked: dict[str, Any], as_json: bool, *, every_tensor: bool) -> None:
    """Print a plan."""
    from dsv2quant.report.plans import plan_json, plan_text

    terminal.show(dq.plan(model, **asked), plan_json, partial(plan_text, every_tensor=every_tensor), as_json)
