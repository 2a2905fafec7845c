"""`dsv2quant verify`."""

from __future__ import annotations

from typing import Any

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal


@click.command(cls=shared.Command)
@click.argument("artifact", type=shared.PATH)
@click.option(
    "--source",
    type=shared.PATH,
    metavar="MODEL",
    help="The checkpoint it was made from: measures each role's error too.",
)
@click.option("--device", default="cpu", show_default=True, help="Where --source is compared: cpu, cuda, cuda:1.")
@shared.hub_options
@shared.output_options
def command(artifact: str, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Check ARTIFACT: checksums, shapes and dtypes; with --source also the error of what consumers will decode.

    Of a GGUF file without a manifest beside it (NAME.gguf.json), every block's scales must be finite.

    Prints per role the signal-to-noise ratio (SQNR) and the largest error, and names the worst tensors.

    \b
    Example:
      dsv2quant verify DeepSeek-V2-Lite-FP8-BLOCK --source deepseek-ai/DeepSeek-V2-Lite
    """
    terminal.set_verbosity(verbose, quiet)
    found = dq.verify(artifact, progress=terminal.progress(quiet), **shared.asked(options))
    from dsv2quant.evaluation.results import verification_json, verification_text

    terminal.show(found, verification_json, verification_text, as_json)
