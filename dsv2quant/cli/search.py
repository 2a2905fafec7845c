"""`dsv2quant search`."""

from __future__ import annotations

from typing import Any

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal
from dsv2quant.cli.ranks import together


@click.command(cls=shared.Command)
@click.argument("model", type=shared.PATH)
@click.option("-o", "--output", "out", type=shared.PATH, required=True, metavar="RECIPE", help="The recipe, *.yaml.")
@shared.budget_options
@shared.stack(
    click.option("--gguf", is_flag=True, help="Mix block types for llama.cpp. Default: schemes of a folder."),
    click.option("--imatrix", type=shared.PATH, metavar="FILE",
                 help="An importance matrix, which types below 3 bits need."),
    click.option("--imatrix-shrink", is_flag=True, help="Draw experts with few tokens toward their layer's mean."),
    section="GGUF",
)  # fmt: skip
@shared.consumer_options
@shared.calibration_options("calibration")
@shared.device_option
@shared.hub_options
@shared.output_options
def command(
    model: str, out: str, bits: float | None, size: str | None, max_kld: float | None, gguf: bool, device: str,
    as_json: bool, verbose: int, quiet: bool, **options: Any,
) -> None:  # fmt: skip
    """Find the mix of schemes, or of block types, that leaves MODEL (a folder or hub id) most like it within a budget,
    and write it as a recipe for `convert`.

    Each part of the model is swapped for each of its candidates, with all else as it is, and the divergence measured on
    calibration text; the best choice is measured as a whole and refined once. A run that was killed goes on from there.

    \b
    Examples:
      dsv2quant search deepseek-ai/DeepSeek-V2-Lite --gguf --bits 3.5 --imatrix lite.imatrix.gguf -o lite.yaml
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --gguf lite.yaml --imatrix lite.imatrix.gguf -o LITE.gguf
      dsv2quant search deepseek-ai/DeepSeek-V2-Lite --size 9GB --calibration chats.jsonl --device cuda -o lite.yaml
    """
    from dsv2quant.allocation.results import searched_json, searched_text

    terminal.set_verbosity(verbose, quiet)
    with together(device) as ranks:
        made = dq.search(
            model, out, bits=bits, size=size, max_kld=max_kld, into_gguf=gguf, device=ranks.device,
            progress=terminal.progress(quiet), ranks=ranks, **shared.asked(options),
        )  # fmt: skip
    if as_json or not quiet:
        terminal.show(made, searched_json, searched_text, as_json)
