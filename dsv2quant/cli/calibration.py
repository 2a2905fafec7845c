"""Calibration text on the command line: the options that `convert` and `calibrate` share, and what is said about it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv2quant.cli import bars, common
from dsv2quant.cli import command as types

if TYPE_CHECKING:
    from dsv2quant.calib.calibration import Calibration
    from dsv2quant.calib.statistics import Statistics
    from dsv2quant.checkpoint.checkpoint import Checkpoint
    from dsv2quant.text.tokenizer import Protocol

calibration_options = common.stack(
    click.option("--calibration", "text", type=types.Path(), metavar="FILE",
                 help="Text, or .jsonl or .json with texts or chats. Default: Python's library."),
    click.option("--num-calibration-samples", "samples", type=click.IntRange(min=1), default=512, show_default=True,
                 help="Windows of calibration text."),
    click.option("--max-seq-length", "length", type=click.IntRange(min=8),
                 help="Tokens of a window. Default: 2048, or the context the model was trained for."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                 help="Order of calibration texts."),
    click.option("--figure", type=types.Path(), metavar="FILE",
                 help="Draw tokens per expert: .png, .svg or .pdf (viz extra)."),
    section="Calibration",
)  # fmt: skip

statistics_option = common.stack(
    click.option("--statistics", type=types.Path(), metavar="STATS",
                 help="What `calibrate` measured, instead of measuring again."),
    section="Calibration",
)  # fmt: skip


def words(options: Mapping[str, Any], calibration: Calibration) -> list[str]:
    """The options as the model card shows them."""
    found = [f"--calibration {calibration.source}"] * (options["text"] is not None)
    windows = f"--num-calibration-samples {options['samples']} --max-seq-length {calibration.ids.shape[1]}"
    return [*found, f"{windows} --seed {options['seed']}"]


def check_useless() -> None:
    """Raise a usage error where calibration options are given to what doesn't calibrate."""
    if useless := common.given("text", "samples", "length", "seed", "figure"):
        what = f"{useless[0]}: nothing of this recipe calibrates here"
        raise click.UsageError(what)


def check_text(path: str | None) -> None:
    """Raise InputError for a text that can't be read, before anything is downloaded for it."""
    if path is not None and not os.access(path, os.R_OK):
        from dsv2quant.text.calibration import load

        load(path, Path())  # says what is wrong


def inputs(checkpoint: Checkpoint, options: Mapping[str, Any]) -> list[Path]:
    """The files and folders that a calibration reads."""
    return [*checkpoint.inputs, *([Path(options["text"])] if options["text"] is not None else [])]


def check_outputs(outputs: Sequence[str], checkpoint: Checkpoint, options: Mapping[str, Any]) -> None:
    """Raise InputError, before the work begins, where a file to write is also read, or named twice."""
    from dsv2quant.errors import InputError
    from dsv2quant.storage.durable import refuse_inputs

    refuse_inputs(map(Path, outputs), inputs(checkpoint, options))
    for i, path in enumerate(outputs):
        if any(os.path.realpath(path) == os.path.realpath(other) for other in outputs[:i]):
            raise InputError("is named for two outputs", where=path, fix="give each a name of its own")


def open_statistics(path: str | None) -> Statistics | None:
    """The statistics at `path`, opened. Raises InputError as Statistics does."""
    if path is None:
        return None
    from dsv2quant.calib.statistics import Statistics

    return Statistics(Path(path))


def check_protocol(protocol: Protocol, text: str | None) -> None:
    """Raise a usage error where there is no text that llama.cpp could read."""
    if protocol == "llama.cpp" and (text is None or text.lower().endswith((".jsonl", ".json"))):
        raise click.UsageError("--protocol llama.cpp needs --calibration FILE, a plain text file")
    if protocol == "llama.cpp" and common.given("seed"):
        raise click.UsageError("--seed goes with the default protocol: llama.cpp's takes the text in order")


def load(
    checkpoint: Checkpoint, options: Mapping[str, Any], quiet: bool, protocol: Protocol = "default"
) -> Calibration:
    """The calibration windows, with a word on stderr where the user should know about them."""
    from dsv2quant.calib.calibration import Calibration
    from dsv2quant.text.calibration import MAX_OVERLAP, fingerprint, overlap, windows, windows_in_order
    from dsv2quant.text.calibration import load as load_text
    from dsv2quant.text.text import python_topics

    folder = checkpoint.as_source().downloaded
    spec, samples = options["text"], options["samples"]
    longest = 512 if protocol == "llama.cpp" else 2048
    length = options["length"] or min(longest, checkpoint.config.trained_context)
    with bars.progress_bar(0, "", "tokenize", quiet):
        text = load_text(spec, folder)
        tokenizer = checkpoint.tokenizer()
        if protocol == "llama.cpp":
            ids = windows_in_order(text, tokenizer, samples, length)
        else:
            ids = windows(text, tokenizer, samples, length, options["seed"])
        tokenizer.check_ids(ids, checkpoint.config.vocab_size)
        sketch = fingerprint("\n".join(document.text for document in text.documents))
        shared = overlap(fingerprint(python_topics().content), sketch)
    if not quiet:
        if spec is None:
            click.echo(f"no --calibration: using {text.source}; text like what the model will see is better", err=True)
        if len(ids) < samples:
            click.echo(f"warning: {text.source} fills {len(ids)} of {samples} windows of {length} tokens", err=True)
        if shared > MAX_OVERLAP:
            click.echo(f"warning: {shared:.1%} of the text that eval-ppl scores by default is in it", err=True)
    return Calibration(ids, text.source, text.sha256, options["seed"], sketch)


def check_figure(path: str | None) -> None:
    """Raise a usage error where a figure is wanted that can't be drawn, before the work begins."""
    if path is None:
        return
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise click.UsageError("--figure needs matplotlib: pip install 'dsv2quant[viz]'")
    if not path.lower().endswith((".png", ".svg", ".pdf")):
        raise click.UsageError(f"--figure {path}: the name must end in .png, .svg or .pdf")
