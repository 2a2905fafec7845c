"""`dsv2quant bench`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal
from dsv2quant.planning.options import SERVERS

SECTIONS = ("fp8", "int4", "gguf", "experts", "mla", "gqa", "fused")
TUNED = ("fp8", "int4")
RANDOM = ("v2", "v2-lite")  # models of random weights
SCHEMES = ("int4-mixed", "fp8-block", "bf16")
results_option = click.option(
    "--results", type=click.Path(dir_okay=False, path_type=Path), metavar="CSV", help="Append the results."
)


@click.group()
def command() -> None:
    """Measure the kernels, or a model, on the GPU at hand.

    \b
    Examples:
      dsv2quant bench kernels --only fp8,mla
      dsv2quant bench model v2-lite --scheme int4-mixed
    """


@command.command(cls=shared.Command)
@click.option("--only", metavar="NAMES", help=f"Some of {','.join(SECTIONS)}. Default: all.")
@click.option("--tune", is_flag=True, help=f"Find the fastest block shapes instead, of {','.join(TUNED)}, and write "
              "the table that kernels then take them from.")  # fmt: skip
@click.option("--tables", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Where --tune writes it. Default: the package's own folder.")  # fmt: skip
@results_option
@shared.output_options
def kernels(
    only: str | None, tune: bool, tables: Path | None, results: Path | None, as_json: bool, verbose: int, quiet: bool
) -> None:
    """Time kernels in DeepSeek-V2's and V2-Lite's shapes, beside torch's and the floor that memory and units set.

    Each call is checked against float64 first; one that is wrong makes the exit code 4.

    \b
    Examples:
      dsv2quant bench kernels --only fp8,int4 --results kernels.csv
      dsv2quant bench kernels --tune
    """
    terminal.set_verbosity(verbose, quiet)
    possible = TUNED if tune else SECTIONS
    names = only.split(",") if only else list(possible)
    if other := [name for name in names if name not in possible]:
        raise click.UsageError(f"--only {other[0]}: it takes {', '.join(possible)}")
    if (tables is not None and not tune) or (results is not None and tune):
        raise click.UsageError("--tables goes with --tune, --results with measuring")

    def say(line: str) -> None:
        if not as_json and not quiet:
            print(line, flush=True)

    if tune:
        from dsv2quant.bench.kernels import tune as write_table
        from dsv2quant.kernels.launch import FOLDER

        path = write_table(names, tables or FOLDER, say)
        said = {"schema": "dsv2quant.bench-tune/1", "table": str(path)}
        terminal.show(said, dict, lambda _: f"wrote {path}", as_json)
        return

    from dsv2quant.bench import kernels as measure
    from dsv2quant.errors import GateError, listing

    found = measure.run(names, results, say)
    if as_json:
        terminal.print_json({"schema": "dsv2quant.bench-kernels/1", **found})
    else:
        print(*map(measure.summary_line, found["rows"]), sep="\n")
    if found["wrong"]:
        raise GateError(f"{len(found['wrong'])} results are wrong: {listing(found['wrong'])}")


@command.command(cls=shared.Command)
@click.argument("model", type=shared.PATH, default="v2-lite")
@click.option("--scheme", type=click.Choice(SCHEMES), help=f"Of {' and '.join(RANDOM)}. Default: {SCHEMES[0]}.")
@click.option("--batch", default="1,8,64", show_default=True, metavar="N,…", help="Sequences that decode together.")
@click.option("--context", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens before decoding.")
@click.option("--engine", type=click.Choice(SERVERS), help="Time this engine beside it, on one text.")
@click.option("--engine-python", type=shared.PATH, metavar="PYTHON", help="The Python that has the engine.")
@results_option
@shared.hub_options
@shared.output_options
def model(
    model: str,
    scheme: str | None,
    batch: str,
    context: int,
    engine: str | None,
    engine_python: str | None,
    results: Path | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
    **hub: Any,
) -> None:
    """Time prefill and decoding of MODEL, and set decoding against the bytes that it must read.

    MODEL is a checkpoint or artifact, or `v2` or `v2-lite`: the published model's shape with random weights, quantized
    on the device as they are made.

    \b
    Examples:
      dsv2quant bench model v2-lite --results model.csv
      dsv2quant bench model v2 --batch 1,16
      dsv2quant bench model DeepSeek-V2-Lite-FP8-BLOCK --context 1024
      dsv2quant bench model DeepSeek-V2-Lite-INT4 --engine vllm --engine-python ~/vllm/bin/python
    """
    terminal.set_verbosity(verbose, quiet)
    try:
        batches = [int(n) for n in batch.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise click.UsageError(f"--batch {batch}: it takes numbers from 1, as 1,8,64")
    if scheme and model not in RANDOM:
        raise click.UsageError(f"--scheme goes with {' and '.join(RANDOM)}; a checkpoint has its own")
    if model in RANDOM and (useless := shared.given(*hub)):
        raise click.UsageError(f"{useless[0]} goes with a hub id: {model}'s weights are random")
    if model in RANDOM and engine:
        raise click.UsageError(f"--engine takes a checkpoint: {model}'s are random, and don't route as text does")
    if engine_python and not engine:
        raise click.UsageError("--engine-python goes with --engine")

    from dsv2quant.bench import model as measure
    from dsv2quant.bench.device import check_device

    check_device()
    say = partial(print, flush=True) if not (as_json or quiet) else lambda line: None
    if engine:
        from dsv2quant.bench import beside

        checkpoint = dq.open(model, **hub)
        rows = beside.run(checkpoint, engine, engine_python, batches, context, results, say, terminal.progress(quiet))
        if as_json:
            terminal.print_json({"schema": "dsv2quant.bench-beside/1", "rows": rows})
        return
    subject = measure.random(model, scheme or SCHEMES[0]) if model in RANDOM else measure.stored(model, **hub)
    found = measure.run(subject, batches, context, results, say)
    if as_json:
        terminal.print_json({"schema": "dsv2quant.bench-model/1", **found})
