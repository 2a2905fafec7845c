"""`dsv2quant calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv2quant.cli import bars, calibration, common
from dsv2quant.cli import command as types
from dsv2quant.cli.command import Command

if TYPE_CHECKING:
    from dsv2quant.text.tokenizer import Protocol


@click.command(cls=Command)
@click.argument("model", type=types.Path())
@click.option(
    "-o",
    "--output",
    "out",
    type=types.Path(),
    metavar="STATS",
    required=True,
    help="The statistics file, *.safetensors.",
)
@calibration.calibration_options
@click.option(
    "--protocol",
    type=click.Choice(["default", "llama.cpp"]),
    default="default",
    show_default=True,
    help="default shuffles texts; llama.cpp cuts windows from a text file in order, as llama-imatrix does.",
)
@click.option(
    "--imatrix", type=types.Path(), metavar="OUT", help="Also write an importance matrix for llama-quantize, *.gguf."
)
@common.device_option
@click.option("--force", is_flag=True, help="Replace STATS and OUT, or start over.")
@common.hub_options
@common.output_options
def command(
    model: str,
    out: str,
    protocol: Protocol,
    imatrix: str | None,
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
    Examples:
      dsv2quant calibrate deepseek-ai/DeepSeek-V2-Lite --calibration chats.jsonl --device cuda -o lite.safetensors
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --fp8=static --statistics lite.safetensors -o LITE-FP8
      dsv2quant calibrate MODEL --protocol llama.cpp --calibration text.txt -o m.safetensors --imatrix m.imatrix.gguf
    """
    from dsv2quant.checkpoint.open import open_checkpoint
    from dsv2quant.report.calibration import coverage_json, coverage_text, draw, tokens_by_layer

    common.set_verbosity(verbose, quiet)
    calibration.check_figure(options["figure"])
    calibration.check_protocol(protocol, options["text"])
    calibration.check_text(options["text"])
    common.check_device(device)
    if imatrix is not None:
        from dsv2quant.calib.imatrix import check_free, write_imatrix

        check_free(Path(imatrix), Path(out), force)
    checkpoint = open_checkpoint(model, revision=revision, cache_dir=cache_dir, offline=offline)
    calibration.check_outputs([path for path in (out, imatrix, options["figure"]) if path], checkpoint, options)
    windows = calibration.load(checkpoint, options, quiet, protocol)

    from dsv2quant.calib.calibrate import calibrate

    found = calibrate(
        checkpoint, Path(out), windows, device=device, halves=imatrix is not None, force=force,
        inputs=calibration.inputs(checkpoint, options), progress=bars.progress(quiet),
    )  # fmt: skip
    if imatrix is not None:
        write_imatrix(Path(imatrix), found, checkpoint.config, force)
    tokens = tokens_by_layer(found.counts)
    if options["figure"]:
        draw(tokens, checkpoint.config.hidden_size, options["figure"])
    if as_json:
        coverage = coverage_json(tokens, checkpoint.config.hidden_size)
        about = found.describe()
        measured = about.pop("model")
        common.print_json(
            {
                "schema": "dsv2quant.calibrate/2",
                "model": measured["name"],
                "revision": measured["revision"],
                "identity": measured["identity"],
                "out": out,
                "imatrix": imatrix,
                **about,
                "experts": coverage,
            }
        )
    elif not quiet:
        if tokens:
            print(coverage_text(tokens, checkpoint.config.hidden_size))
        print(f"{out}: {len(found.counts)} inputs of {checkpoint.model}, {found.tokens:,} tokens")
        if imatrix is not None:
            print(f"{imatrix}: for llama-quantize --imatrix, {found.windows} chunks of {found.ctx} tokens")
