"""`dsv2quant calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsv2quant.cli import calibration, common


@click.command(cls=common.Command)
@click.argument("model")
@click.option("-o", "--output", "out", metavar="STATS", required=True, help="The statistics file, *.safetensors.")
@calibration.calibration_options
@click.option("--device", default="cpu", show_default=True, help="Where to run the model: cpu, cuda, cuda:1.")
@click.option("--force", is_flag=True, help="Replace STATS, or start over.")
@common.hub_options
@common.output_options
def command(
    model: str,
    out: str,
    device: str,
    force: bool,
    revision: str | None,
    cache_dir: str | None,
    offline: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **options: Any,
) -> None:
    """Run calibration text through MODEL (a folder or hub id) and measure every linear's inputs into STATS.

    One file serves many conversions: the scales of `--method mse` and `awq`, static FP8 activation scales and KV-cache
    scales. A run that was killed continues with the layer it was at. GPTQ calibrates in `convert` instead: it needs
    what the layers before, quantized, make of the text.

    \b
    Example:
      dsv2quant calibrate deepseek-ai/DeepSeek-V2-Lite --calibration chats.jsonl --device cuda -o lite.safetensors
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --fp8=static --statistics lite.safetensors -o LITE-FP8
    """
    from dsv2quant.calib.calibrate import calibrate
    from dsv2quant.checkpoint import Checkpoint
    from dsv2quant.report.coverage import coverage_json, coverage_text, draw, tokens_by_layer

    common.set_verbosity(verbose, quiet)
    calibration.check_figure(options["figure"])
    common.check_device(device)
    checkpoint = Checkpoint.open(model, revision=revision, cache_dir=cache_dir, offline=offline)
    found = calibrate(
        checkpoint, Path(out), calibration.load(checkpoint, options, quiet), device=device, force=force,
        progress=common.progress(quiet),
    )  # fmt: skip
    tokens = tokens_by_layer(found.counts)
    if options["figure"]:
        draw(tokens, checkpoint.config.hidden_size, options["figure"])
    if as_json:
        coverage = coverage_json(tokens, checkpoint.config.hidden_size)
        about = found.describe()
        common.print_json({"schema": "dsv2quant.calibrate/1", "out": out, **about, "experts": coverage})
    elif not quiet:
        if tokens:
            print(coverage_text(tokens, checkpoint.config.hidden_size))
        print(f"{out}: {len(found.counts)} inputs of {checkpoint.model}, {found.tokens:,} tokens")
