"""`dsv2quant verify`."""

from __future__ import annotations

import click

from dsv2quant.cli import common, types


@click.command(cls=common.Command)
@click.argument("artifact", type=types.Path())
@click.option(
    "--source",
    type=types.Path(),
    metavar="MODEL",
    help="The checkpoint it was made from: measures each role's error too.",
)
@common.hub_options
@common.output_options
def command(
    artifact: str,
    source: str | None,
    revision: str | None,
    cache_dir: str | None,
    offline: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Check ARTIFACT: checksums, shapes and dtypes; with --source also the error of what consumers will decode.

    Of a GGUF file, which has no checksums, every block's scales must be finite.

    Prints per role the signal-to-noise ratio (SQNR) and the largest error, and names the worst tensors.

    \b
    Example:
      dsv2quant verify DeepSeek-V2-Lite-FP8-BLOCK --source deepseek-ai/DeepSeek-V2-Lite
    """
    from dsv2quant import verify
    from dsv2quant.checkpoint import Checkpoint
    from dsv2quant.report.verification import verification_text

    common.set_verbosity(verbose, quiet)
    opened = Checkpoint.open(artifact, revision=revision, cache_dir=cache_dir, offline=offline)
    nbytes = sum(w.nbytes for w in opened.weights)
    manifest = None
    with common.progress_bar(nbytes, "B", "checksums" if opened.metadata is None else "scales", quiet) as progress:
        if opened.metadata is None:
            manifest = verify.check_files(opened, progress)
        else:
            verify.check_blocks(opened, progress)
    errors = None
    if source is not None:
        original = Checkpoint.open(source, cache_dir=cache_dir, offline=offline)
        verify.check_layout(opened, original)
        with common.progress_bar(nbytes, "B", "errors", quiet) as progress:
            errors = verify.compare_tensors(opened, original, progress)
    result = verify.report(manifest, opened, errors)
    if as_json:
        common.print_json(result)
    else:
        print(verification_text(result))
