"""`dsv2quant convert`."""

from __future__ import annotations

import click

from dsv2quant.cli import common


@click.command(cls=common.Command)
@click.argument("model")
@click.option("-o", "--output", "out", metavar="OUT", help="The artifact's folder.")
@common.plan_options
@click.option("--device", default="cpu", show_default=True, help="Where to encode: cpu, cuda, cuda:1.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--force", is_flag=True, help="Start over in a folder that is not empty.")
@common.hub_options
@common.output_options
def command(
    model: str,
    out: str | None,
    fp8: str | None,
    recipe_file: str | None,
    targets: tuple[str, ...],
    tp: int,
    max_shard_size: str,
    device: str,
    dry_run: bool,
    force: bool,
    revision: str | None,
    cache_dir: str | None,
    offline: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Quantize MODEL (a folder or hub id) into folder OUT.

    A run that was interrupted or killed continues from its finished shards when the same command is given again, and
    ends with the same bytes.

    \b
    Examples:
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --fp8 -o DeepSeek-V2-Lite-FP8-BLOCK
      dsv2quant convert ./my-finetune --fp8=channel --target vllm --tp 4 -o my-finetune-FP8-Dynamic
    """
    from dsv2quant.checkpoint import Checkpoint
    from dsv2quant.report.plans import plan_json, plan_text
    from dsv2quant.report.tables import gigabytes

    common.set_verbosity(verbose, quiet)
    if out is None and not dry_run:
        raise click.UsageError("give -o OUT, the folder to write, or --dry-run")
    common.check_device(device)
    checkpoint = Checkpoint.open(model, revision=revision, cache_dir=cache_dir, offline=offline, headers_only=dry_run)
    plan = common.plan_for(checkpoint, fp8, recipe_file, targets, tp, max_shard_size)
    if dry_run or out is None:
        if as_json:
            common.print_json(plan_json(plan))
        else:
            print(plan_text(plan, every_tensor=verbose > 0))
        return

    from dsv2quant.convert import convert

    if verbose:
        click.echo(plan_text(plan, every_tensor=verbose > 1), err=True)
    with common.progress_bar(plan.bytes_in, "B", "convert", quiet) as progress:
        result = convert(
            plan, out, command=_command(plan.checkpoint.model, fp8, recipe_file, targets, tp, max_shard_size),
            device=device, force=force, progress=progress,
        )  # fmt: skip
    if as_json:
        common.print_json(
            {
                "schema": "dsv2quant.convert/1",
                "out": str(result.out),
                "plan": plan.digest,
                "bytes_in": result.bytes_in,
                "bytes_out": result.bytes_out,
                "bits_per_weight": 8 * result.bytes_out / plan.parameters,
                "files": result.files,
                "resumed_shards": result.resumed,
                "already_complete": result.already_complete,
                "seconds": result.seconds,
            }
        )
    elif not quiet:
        done = "was already complete" if result.already_complete else f"in {result.seconds:.1f} s"
        bits = 8 * result.bytes_out / plan.parameters
        sizes = f"{gigabytes(result.bytes_in)} → {gigabytes(result.bytes_out)}"
        print(f"{result.out}: {sizes}, {bits:.2f} bits/weight, {done}")


def _command(
    model: str, fp8: str | None, recipe_file: str | None, targets: tuple[str, ...], tp: int, max_shard_size: str
) -> str:
    """The command as the model card shows it: everything that shapes the artifact, and no path of this machine."""
    words = ["dsv2quant convert", model]
    words.append(f"--recipe {recipe_file.rpartition('/')[2]}" if recipe_file else f"--fp8={fp8 or 'block'}")
    words += [f"--target {target}" for target in targets]
    words += [f"--tp {tp}"] * (tp > 1) + [f"--max-shard-size {max_shard_size}"] * (max_shard_size != "5GB")
    return " ".join(words)
