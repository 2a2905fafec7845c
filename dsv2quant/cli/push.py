"""`dsv2quant push`."""

from __future__ import annotations

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal


@click.command(cls=shared.Command)
@click.argument("artifact", type=shared.PATH)
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository a private one; a public one is refused.")
@click.option("--revision", default="main", show_default=True, metavar="BRANCH", help="The branch, made if need be.")
@click.option("--split", metavar="SIZE", help="Cut a larger GGUF file into several of at most this, as 45GB.")
@click.option("--force", is_flag=True, help="Push what was not verified, too.")
@shared.output_options
def command(
    artifact: str, repo: str, private: bool, revision: str, split: str | None, force: bool, as_json: bool, verbose: int,
    quiet: bool,
) -> None:  # fmt: skip
    """Upload ARTIFACT, a folder or .gguf file that `convert` wrote, into a repository of the hub.

    It must have been verified: `verify` with --source or --engine notes beside the manifest that it was. Each file of
    the manifest is hashed again before anything is sent, and the model card appears last. A run that was cut is given
    again, and sends what is not there yet. The token is huggingface_hub's: HF_TOKEN, or `hf auth login`.

    \b
    Examples:
      dsv2quant push DeepSeek-V2-Lite-FP8-BLOCK me/DeepSeek-V2-Lite-FP8-BLOCK --private
      dsv2quant push DeepSeek-V2-Lite-Q4_K_M.gguf me/DeepSeek-V2-Lite-GGUF
      dsv2quant push DeepSeek-V2-Q4_K_M.gguf me/DeepSeek-V2-GGUF --split 45GB
    """
    from dsv2quant.report.pushed import pushed_json, pushed_text

    terminal.set_verbosity(verbose, quiet)
    progress = terminal.progress(quiet)
    made = dq.push(artifact, repo, private=private, revision=revision, split=split, force=force, progress=progress)
    if as_json or not quiet:
        terminal.show(made, pushed_json, pushed_text, as_json)
