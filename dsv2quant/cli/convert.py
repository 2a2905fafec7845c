"""`dsv2quant convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsv2quant.cli import bars, calibration, common, gguf
from dsv2quant.cli import command as types
from dsv2quant.cli.command import Command


@click.command(cls=Command)
@click.argument("model", type=types.Path())
@common.stack(
    click.option("-o", "--output", "out", type=types.Path(), metavar="OUT",
                 help="The artifact's folder, or its GGUF file."),
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    click.option("--force", is_flag=True, help="Start over: what a conversion wrote there is removed."),
    section="Output",
)  # fmt: skip
@common.plan_options
@gguf.gguf_options
@calibration.calibration_options
@calibration.statistics_option
@common.device_option
@common.hub_options
@common.output_options
def command(
    model: str,
    out: str | None,
    statistics: str | None,
    device: str,
    dry_run: bool,
    force: bool,
    revision: str | None,
    cache_dir: str | None,
    offline: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **options: Any,
) -> None:
    """Quantize MODEL (a folder or hub id) into folder OUT, or into a GGUF file.

    A run that was interrupted or killed continues from its finished layers and shards when the same command is given
    again, and ends with the same bytes.

    \b
    Examples:
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --fp8 -o DeepSeek-V2-Lite-FP8-BLOCK
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --int4 --calibration chats.jsonl --device cuda -o LITE-W4A16
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --gguf Q4_K_M -o DeepSeek-V2-Lite-Q4_K_M.gguf
      dsv2quant convert ./my-finetune --fp8=channel --target vllm --tp 4 -o my-finetune-FP8-Dynamic
    """
    from dsv2quant.checkpoint.open import open_checkpoint
    from dsv2quant.report.plans import plan_text
    from dsv2quant.report.tables import gigabytes

    common.set_verbosity(verbose, quiet)
    if out is None and not dry_run:
        raise click.UsageError("give -o OUT, the folder or file to write, or --dry-run")
    as_gguf = gguf.is_asked_for(options)
    if out is not None:
        gguf.check_out(out, options)
    if not as_gguf:
        common.choose_recipe(options)  # says what contradicts itself before anything is opened or downloaded
    calibration.check_figure(options["figure"])
    calibration.check_text(options["text"])
    common.check_device(device)
    checkpoint = open_checkpoint(model, revision=revision, cache_dir=cache_dir, offline=offline, headers_only=dry_run)
    if dry_run or out is None:
        gguf.print_plan(checkpoint, options, as_json, every_tensor=verbose > 0)
        return
    if as_gguf:
        gguf.convert(
            checkpoint, out, options, device=device, force=force, as_json=as_json, verbose=verbose, quiet=quiet
        )
        return
    if options["figure"]:
        calibration.check_outputs([out, options["figure"]], checkpoint, options)
    plan = common.plan_for(checkpoint, options)

    with bars.starting(quiet):
        from dsv2quant.calib.calibration import needs_calibration, needs_statistics
        from dsv2quant.conversion.convert import convert
        from dsv2quant.report.calibration import calibration_json, calibration_text, draw
        from dsv2quant.report.plans import warnings

    warned = warnings(plan)
    if verbose:
        click.echo(plan_text(plan, every_tensor=verbose > 1), err=True)
    elif not quiet:
        for warning in warned:
            click.echo(f"warning: {warning}", err=True)
    words = ["dsv2quant convert", checkpoint.model, *common.words(options)]
    if statistics is not None and not needs_statistics(plan):
        raise click.UsageError("--statistics: no method of this recipe uses them; gptq calibrates by itself")
    measures = needs_statistics(plan) and statistics is None
    text = None
    if needs_calibration(plan) or measures:
        text = calibration.load(checkpoint, options, quiet)
        words += calibration.words(options, text)
    else:
        calibration.check_useless()
    measured = calibration.open_statistics(statistics)
    if measured is not None:
        words.append(f"--statistics {measured.path.name}")
    result = convert(
        plan, out, command=" ".join(words), calibration=text, statistics=measured, device=device, force=force,
        inputs=[Path(path) for path in (options["text"], options["recipe_file"]) if path],
        progress=bars.progress(quiet),
    )  # fmt: skip
    if options["figure"] and result.expert_tokens:
        draw(result.expert_tokens, checkpoint.config.hidden_size, options["figure"])
    if as_json:
        common.print_json(
            {
                "schema": "dsv2quant.convert/2",
                "out": str(result.out),
                "digest": plan.digest,
                "bytes_in": result.bytes_in,
                "bytes_out": result.bytes_out,
                "bits_per_weight": 8 * result.bytes_out / plan.parameters,
                "files": result.files,
                "warnings": warned,
                "calibration": calibration_json(plan, result.outcomes, result.expert_tokens),
                "resumed_shards": result.resumed,
                "already_complete": result.already_complete,
                "seconds": result.seconds,
            }
        )
    elif not quiet:
        done = "was already complete" if result.already_complete else f"in {result.seconds:.1f} s"
        bits = 8 * result.bytes_out / plan.parameters
        sizes = f"{gigabytes(result.bytes_in)} → {gigabytes(result.bytes_out)}"
        if result.expert_tokens or result.outcomes:
            print(calibration_text(plan, result.outcomes, result.expert_tokens))
        print(f"{result.out}: {sizes}, {bits:.2f} bits/weight, {done}")
