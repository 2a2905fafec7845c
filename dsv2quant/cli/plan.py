"""`dsv2quant plan`."""

from __future__ import annotations

from typing import Any

import click

from dsv2quant.cli import command as types
from dsv2quant.cli import common, gguf
from dsv2quant.cli.command import Command


@click.command(cls=Command)
@click.argument("model", type=types.Path())
@common.plan_options
@gguf.gguf_options
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
    **options: Any,
) -> None:
    """Show what a conversion of MODEL (a folder or hub id) would do, from headers alone.

    Prints each role's scheme, sizes and bits per weight, and every tensor that falls back with the rule behind it.
    No weight is read or downloaded.

    \b
    Example:
      dsv2quant plan deepseek-ai/DeepSeek-V2-Lite --fp8 --target vllm --tp 2
    """
    from dsv2quant.checkpoint.open import open_checkpoint

    common.set_verbosity(verbose, quiet)
    if not gguf.is_asked_for(options):
        common.choose_recipe(options)  # says what contradicts itself before anything is opened
    checkpoint = open_checkpoint(model, revision=revision, cache_dir=cache_dir, offline=offline, headers_only=True)
    gguf.print_plan(checkpoint, options, as_json, every_tensor=verbose > 0)
