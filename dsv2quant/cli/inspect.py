"""`dsv2quant inspect`."""

from __future__ import annotations

import click

from dsv2quant.cli import command as types
from dsv2quant.cli import common
from dsv2quant.cli.command import Command


@click.command(cls=Command)
@click.argument("model", type=types.Path())
@common.hub_options
@common.output_options
def command(
    model: str,
    revision: str | None,
    cache_dir: str | None,
    offline: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Show what MODEL (a checkpoint, artifact, GGUF file or hub id) holds: roles, schemes, sizes and configuration.

    Opening it also checks it: every tensor that config.json implies must be there, in its shape, and nothing else.

    \b
    Example:
      dsv2quant inspect DeepSeek-V2-Lite-FP8-BLOCK --json
    """
    from dsv2quant.checkpoint.open import open_checkpoint
    from dsv2quant.report.plans import inspect_json, inspect_text

    common.set_verbosity(verbose, quiet)
    checkpoint = open_checkpoint(model, revision=revision, cache_dir=cache_dir, offline=offline, headers_only=True)
    if as_json:
        common.print_json(inspect_json(checkpoint))
    else:
        print(inspect_text(checkpoint))
