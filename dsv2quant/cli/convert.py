"""`dsv2quant convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dsv2quant.cli import common

if TYPE_CHECKING:
    from dsv2quant.calib.calibration import Calibration
    from dsv2quant.plan import Plan


@click.command(cls=common.Command)
@click.argument("model")
@click.option("-o", "--output", "out", metavar="OUT", help="The artifact's folder.")
@common.plan_options
@click.option("--calibration", metavar="FILE", help="Text, or .jsonl with text or messages. Default: Python's library.")
@click.option(
    "--num-calibration-samples",
    "samples",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Windows of calibration text.",
)
@click.option(
    "--max-seq-length",
    "length",
    type=click.IntRange(min=8),
    help="Tokens of a window. Default: 2048, or the context the model was trained for.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Order of calibration texts.")
@click.option("--device", default="cpu", show_default=True, help="Where to encode and calibrate: cpu, cuda, cuda:1.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--force", is_flag=True, help="Start over in a folder that is not empty.")
@common.hub_options
@common.output_options
def command(
    model: str,
    out: str | None,
    calibration: str | None,
    samples: int,
    length: int | None,
    seed: int,
    device: str,
    dry_run: bool,
    force: bool,
    revision: str | None,
    cache_dir: str | None,
    offline: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **plan_options: Any,
) -> None:
    """Quantize MODEL (a folder or hub id) into folder OUT.

    A run that was interrupted or killed continues from its finished layers and shards when the same command is given
    again, and ends with the same bytes.

    \b
    Examples:
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --fp8 -o DeepSeek-V2-Lite-FP8-BLOCK
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --int4 --calibration chats.jsonl --device cuda -o LITE-W4A16
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
    plan = common.plan_for(checkpoint, plan_options)
    if dry_run or out is None:
        if as_json:
            common.print_json(plan_json(plan))
        else:
            print(plan_text(plan, every_tensor=verbose > 0))
        return

    from dsv2quant.calib.calibration import needs_calibration
    from dsv2quant.convert import convert
    from dsv2quant.report.calibration import calibration_json, calibration_text

    if verbose:
        click.echo(plan_text(plan, every_tensor=verbose > 1), err=True)
    words = ["dsv2quant convert", checkpoint.model, *common.words(plan_options)]
    calibrated = None
    if needs_calibration(plan):
        calibrated = _calibration(plan, calibration, samples, length, seed, quiet)
        words += [f"--calibration {calibrated.source}"] * (calibration is not None)
        words.append(f"--num-calibration-samples {samples} --max-seq-length {calibrated.ids.shape[1]} --seed {seed}")
    elif calibration:
        raise click.UsageError("--calibration: no method of this recipe calibrates")
    result = convert(
        plan, out, command=" ".join(words), calibration=calibrated, device=device, force=force,
        progress=common.progress(quiet),
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
                "calibration": calibration_json(plan, result.outcomes),
                "resumed_shards": result.resumed,
                "already_complete": result.already_complete,
                "seconds": result.seconds,
            }
        )
    elif not quiet:
        done = "was already complete" if result.already_complete else f"in {result.seconds:.1f} s"
        bits = 8 * result.bytes_out / plan.parameters
        sizes = f"{gigabytes(result.bytes_in)} → {gigabytes(result.bytes_out)}"
        if result.outcomes:
            print(calibration_text(plan, result.outcomes))
        print(f"{result.out}: {sizes}, {bits:.2f} bits/weight, {done}")


def _calibration(plan: Plan, spec: str | None, samples: int, length: int | None, seed: int, quiet: bool) -> Calibration:
    """The calibration windows, with a word on stderr where the user should know about them."""
    from dsv2quant.calib.calibration import Calibration
    from dsv2quant.calib.text import MAX_OVERLAP, fingerprint, load, overlap, windows
    from dsv2quant.calib.tokens import Tokenizer
    from dsv2quant.evaluate.text import python_topics

    checkpoint = plan.checkpoint
    assert checkpoint.folder is not None
    text = load(spec, checkpoint.folder)
    length = length or min(2048, checkpoint.config.trained_context)
    tokenizer = Tokenizer(checkpoint.folder)
    ids = windows(text, tokenizer, samples, length, seed)
    tokenizer.check_ids(ids, checkpoint.config.vocab_size)
    sketch = fingerprint("\n".join(document.text for document in text.documents))
    if not quiet:
        if spec is None:
            click.echo(f"no --calibration: using {text.source}; text like what the model will see is better", err=True)
        if len(ids) < samples:
            click.echo(f"warning: {text.source} fills {len(ids)} of {samples} windows of {length} tokens", err=True)
        shared = overlap(fingerprint(python_topics().content), sketch)
        if shared > MAX_OVERLAP:
            click.echo(f"warning: {shared:.1%} of the text that eval-ppl scores by default is in it", err=True)
    return Calibration(ids, text.source, text.sha256, seed, sketch)
