"""`dsv2quant verify`."""

from __future__ import annotations

import click

from dsv2quant.cli import bars, common
from dsv2quant.cli import command as types
from dsv2quant.cli.command import Command


@click.command(cls=Command)
@click.argument("artifact", type=types.Path())
@click.option(
    "--source",
    type=types.Path(),
    metavar="MODEL",
    help="The checkpoint it was made from: measures each role's error too.",
)
@click.option("--device", default="cpu", show_default=True, help="Where --source is compared: cpu, cuda, cuda:1.")
@common.hub_options
@common.output_options
def command(
    artifact: str,
    source: str | None,
    device: str,
    revision: str | None,
    cache_dir: str | None,
    offline: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Check ARTIFACT: checksums, shapes and dtypes; with --source also the error of what consumers will decode.

    Of a GGUF file without a manifest beside it (NAME.gguf.json), every block's scales must be finite.

    Prints per role the signal-to-noise ratio (SQNR) and the largest error, and names the worst tensors.

    \b
    Example:
      dsv2quant verify DeepSeek-V2-Lite-FP8-BLOCK --source deepseek-ai/DeepSeek-V2-Lite
    """
    from dsv2quant.checkpoint.open import open_checkpoint

    common.set_verbosity(verbose, quiet)
    common.check_device(device)
    opened = open_checkpoint(artifact, revision=revision, cache_dir=cache_dir, offline=offline)
    original = None
    if source is not None:
        original = open_checkpoint(source, cache_dir=cache_dir, offline=offline)
    with bars.starting(quiet):
        from dsv2quant.evaluation import verify
        from dsv2quant.report.results import verification_text
    if original is not None:
        verify.check_layout(opened, original)
    checked = verify.check(opened, bars.progress(quiet), has_source=original is not None)
    errors = None
    if original is not None:
        with bars.progress_bar(verify.bytes_compared(opened, original), "B", "errors", quiet) as progress:
            errors = verify.compare_tensors(opened, original, progress, device)
    result = verify.report(checked, opened, errors)
    if as_json:
        common.print_json(result)
    else:
        print(verification_text(result))
