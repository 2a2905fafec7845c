"""`dsv2quant convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

import dsv2quant as dq
from dsv2quant.api import check_conversion
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal
from dsv2quant.cli.plan import show
from dsv2quant.cli.ranks import place, together
from dsv2quant.errors import UsageError

if TYPE_CHECKING:
    from dsv2quant.report.calibration import Conversion


@click.command(cls=shared.Command)
@click.argument("model", type=shared.PATH)
@shared.stack(
    click.option("-o", "--output", "out", type=shared.PATH, metavar="OUT",
                 help="The artifact's folder, or its GGUF file."),
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    click.option("--force", is_flag=True, help="Start over: what a conversion wrote there is removed."),
    section="Output",
)  # fmt: skip
@shared.plan_options
@shared.budget_options
@shared.calibration_options("calibration")
@shared.stack(
    click.option("--statistics", type=shared.PATH, metavar="STATS",
                 help="What `calibrate` measured, instead of measuring again."),
    section="Calibration",
)  # fmt: skip
@shared.device_option
@shared.hub_options
@shared.stack(
    click.option("--stream-hub", is_flag=True,
                 help="Download shard by shard and drop each when it is converted: the disk holds OUT and a few."),
    section="Hub",
)  # fmt: skip
@shared.output_options
def command(
    model: str, out: str | None, device: str, dry_run: bool, force: bool, stream_hub: bool, as_json: bool, verbose: int,
    quiet: bool, bits: float | None, size: str | None, max_kld: float | None, **options: Any,
) -> None:  # fmt: skip
    """Quantize MODEL (a folder or hub id) into folder OUT, or into a GGUF file.

    With a budget, the mix that costs least within it is searched for: see `search`. Its recipe stays as OUT.yaml.

    A run that was interrupted or killed continues from its finished layers and shards when the same command is given
    again, and ends with the same bytes.

    \b
    Examples:
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --fp8 -o DeepSeek-V2-Lite-FP8-BLOCK
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --int4 --calibration chats.jsonl --device cuda -o LITE-W4A16
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --gguf Q4_K_M -o DeepSeek-V2-Lite-Q4_K_M.gguf
      dsv2quant convert MODEL --bits 3.5 --imatrix m.imatrix.gguf -o MODEL-3.5.gguf
      dsv2quant convert ./my-finetune --fp8=channel --target vllm --tp 4 -o my-finetune-FP8-Dynamic
    """
    from dsv2quant.report.calibration import conversion_json, conversion_text

    terminal.set_verbosity(verbose, quiet)
    if out is None and not dry_run:
        raise click.UsageError("give -o OUT, the folder or file to write, or --dry-run")
    asked = shared.asked(options)
    is_searched = any(value is not None for value in (bits, size, max_kld))
    if is_searched and (dry_run or stream_hub):
        raise click.UsageError(
            f"{'--dry-run' if dry_run else '--stream-hub'} does not go with a budget: a search reads all of MODEL"
        )
    for name, is_asked in (("--dry-run", dry_run), ("--stream-hub", stream_hub)):
        if is_asked and place() is not None:
            raise UsageError(f"{name} is for one process", fix="run it without torchrun")
    if dry_run or out is None:
        check_conversion(out, device, **asked)
        show(model, asked, as_json, every_tensor=verbose > 0)
        return
    progress = terminal.progress(quiet)
    made: Conversion | None = None
    with together(device) as ranks:
        running: dict[str, Any] = {"device": ranks.device, "force": force, "progress": progress, "ranks": ranks}
        if is_searched:
            from dsv2quant.allocation.search import convert_within

            made = convert_within(model, out, bits=bits, size=size, max_kld=max_kld, **running, **asked)
        elif ranks.is_first:
            made = dq.convert(model, out, stream_hub=stream_hub, **running, **asked)
        else:
            from dsv2quant.following import follow_conversion

            follow_conversion(model, ranks, **asked)
    if made is not None and (as_json or not quiet):
        terminal.show(made, conversion_json, conversion_text, as_json)
