"""`dsv2quant calibrate`."""

from __future__ import annotations

from typing import Any

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal
from dsv2quant.cli.ranks import together
from dsv2quant.planning.options import PROTOCOLS


@click.command(cls=shared.Command)
@click.argument("model", type=shared.PATH)
@click.option("-o", "--output", "out", type=shared.PATH, metavar="STATS", required=True,
              help="The statistics file, *.safetensors.")  # fmt: skip
@shared.calibration_options("text")
@click.option("--protocol", type=click.Choice(PROTOCOLS), default="default", show_default=True,
              help="default shuffles texts; llama.cpp cuts windows from a text file in order, as llama-imatrix "
              "does.")  # fmt: skip
@click.option("--imatrix", type=shared.PATH, metavar="OUT",
              help="Also write an importance matrix for llama-quantize, *.gguf.")  # fmt: skip
@shared.device_option
@click.option("--force", is_flag=True, help="Replace STATS and OUT, or start over.")
@shared.hub_options
@shared.output_options
def command(model: str, out: str, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Run calibration text through MODEL (a folder or hub id) and measure every linear's inputs into STATS.

    One file serves many conversions: the scales of `--method mse` and `awq`, static FP8 activation scales and KV-cache
    scales. A run that was killed continues with the layer it was at. GPTQ calibrates in `convert` instead: it needs
    what the layers before, quantized, make of the text.

    \b
    Examples:
      dsv2quant calibrate deepseek-ai/DeepSeek-V2-Lite --calibration chats.jsonl --device cuda -o lite.safetensors
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --fp8=static --statistics lite.safetensors -o LITE-FP8
      dsv2quant calibrate MODEL --protocol llama.cpp --calibration text.txt -o m.safetensors --imatrix m.imatrix.gguf
    """
    terminal.set_verbosity(verbose, quiet)
    asked = shared.asked(options)
    with together(asked.pop("device", "cpu")) as ranks:
        if not ranks.is_first:
            from dsv2quant.following import follow_calibration

            used = {name: value for name, value in asked.items() if name not in ("figure", "force")}
            follow_calibration(model, ranks, **used)
            return
        made = dq.calibrate(
            model, out, device=ranks.device, progress=terminal.progress(quiet), ranks=ranks, **asked
        )  # fmt: skip
    from dsv2quant.report.calibration import calibrated_json, calibrated_text

    if as_json or not quiet:
        terminal.show(made, calibrated_json, calibrated_text, as_json)
