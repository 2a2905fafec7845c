"""`dsv2quant inspect`."""

from __future__ import annotations

from typing import Any

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal


@click.command(cls=shared.Command)
@click.argument("model", type=shared.PATH)
@shared.hub_options
@shared.output_options
def command(model: str, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Show what MODEL (a checkpoint, artifact, GGUF file or hub id) holds: roles, schemes, sizes and configuration.

    Opening it also checks it: every tensor that config.json implies must be there, in its shape, and nothing else.

    \b
    Example:
      dsv2quant inspect DeepSeek-V2-Lite-FP8-BLOCK --json
    """
    from dsv2quant.report.inspection import inspection_json, inspection_text

    terminal.set_verbosity(verbose, quiet)
    terminal.show(dq.inspect(model, **shared.asked(options)), inspection_json, inspection_text, as_json)
