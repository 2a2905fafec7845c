"""`dsv2quant compare`."""

from __future__ import annotations

from typing import Any

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal
from dsv2quant.planning.options import DTYPES


@click.command(cls=shared.Command)
@click.argument("models", nargs=-1, required=True, type=shared.PATH)
@shared.stack(
    click.option("--reference", type=shared.PATH, metavar="MODEL", help="What distances are from. Default: the first."),
    click.option("--source", type=shared.PATH, metavar="MODEL",
                 help="The checkpoint that they were made from: measures errors of weights too."),
)  # fmt: skip
@shared.text_options
@shared.stack(
    click.option("--stream", is_flag=True, help="Hold one layer's weights at a time: for models larger than memory."),
    shared.device_option,
    click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Compute dtype."),
    section="Computing",
)
@shared.hub_options
@shared.output_options
def command(models: tuple[str, ...], as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Show MODELS beside each other: checkpoints, artifacts and GGUF files of one model, whoever made them.

    From headers alone sizes and bits; with --source the error of their weights by role; with --reference, --text or
    --dataset how far each is from the reference.

    \b
    Examples:
      dsv2quant compare DeepSeek-V2-Lite-FP8-BLOCK OTHERS-W4A16 Lite-Q4_K_M.gguf
      dsv2quant compare OUT OUT-Q4_K_M.gguf --reference BF16 --source BF16 --dataset wikitext2
    """
    terminal.set_verbosity(verbose, quiet)
    found = dq.compare(models, progress=terminal.progress(quiet), **shared.asked(options))
    from dsv2quant.report.beside import comparison_json, comparison_text

    terminal.show(found, comparison_json, comparison_text, as_json)
