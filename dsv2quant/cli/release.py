"""`dsv2quant release`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal


@click.command(cls=shared.Command)
@click.argument("model", type=shared.PATH)
@click.option("-o", "--output", "out", type=shared.PATH, required=True, metavar="OUT", help="The release's folder.")
@shared.stack(
    click.option("--recipe", type=shared.PATH, metavar="FILE", help="What it holds: a YAML file, docs/release.md."),
    click.option("--artifacts", metavar="NAME,…", help="What it holds: schemes, as fp8-block, and GGUF types."),
    click.option("--calibration", type=shared.PATH, metavar="FILE", help="Text to calibrate --artifacts on."),
    click.option("--base-model", metavar="ID", help="MODEL's id on the hub. Default: what its own files say."),
    section="What it holds",
)  # fmt: skip
@shared.device_option
@shared.hub_options
@shared.output_options
def command(
    model: str, out: str, recipe: str | None, artifacts: str | None, calibration: str | None, base_model: str | None,
    device: str, as_json: bool, verbose: int, quiet: bool, **hub: Any,
) -> None:  # fmt: skip
    """Convert MODEL into every artifact of a release, measure each against it, check gates, and write cards, checksums
    and a report.

    MODEL is scored once. What was done is kept: a run that was killed goes on from there. An artifact that fails a gate
    leaves the others done, and exit code 4.

    \b
    Examples:
      dsv2quant release deepseek-ai/DeepSeek-V2-Lite --recipe release.yaml -o LITE --device cuda
      dsv2quant release MODEL --artifacts fp8-block,int4-mixed,Q4_K_M --calibration chats.jsonl -o OUT
    """
    terminal.set_verbosity(verbose, quiet)
    if (recipe is None) == (artifacts is None):
        raise click.UsageError("give --recipe FILE or --artifacts NAME,…, one of them")
    if calibration is not None and artifacts is None:
        raise click.UsageError("--calibration goes with --artifacts: a recipe names its own")
    from dsv2quant.publishing import wanted
    from dsv2quant.publishing.results import released_json, released_text

    opened = dq.open(model, **shared.asked(hub))
    if recipe is not None:
        release = wanted.load(Path(recipe), opened.model)
    else:
        release = wanted.named(str(artifacts), opened.model, calibration)
    made = dq.release(opened, out, release, base_model=base_model, device=device, progress=terminal.progress(quiet))
    terminal.show(made, released_json, released_text, as_json)
    made.check()
