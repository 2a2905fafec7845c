"""`dsv2quant bench`."""

from __future__ import annotations

from pathlib import Path

import click

from dsv2quant.cli import common

SECTIONS = ("fp8", "int4", "mla")
TUNED = ("fp8", "int4")


@click.group()
def command() -> None:
    """Measure the kernels, or a model, on the GPU at hand.

    \b
    Examples:
      dsv2quant bench kernels --only fp8,mla
    """


@command.command(cls=common.Command)
@click.option("--only", metavar="NAMES", help=f"Some of {','.join(SECTIONS)}. Default: all.")
@click.option("--tune", is_flag=True, help=f"Find the fastest block shapes instead, of {','.join(TUNED)}, and write "
              "the table that kernels then take them from.")  # fmt: skip
@click.option("--tables", type=click.Path(file_okay=False, exists=True, path_type=Path), metavar="DIR",
              help="Where --tune writes it. Default: the package's own folder.")  # fmt: skip
@click.option("--results", type=click.Path(dir_okay=False, path_type=Path), metavar="CSV", help="Append the results.")
@common.output_options
def kernels(
    only: str | None,
    tune: bool,
    tables: Path | None,
    results: Path | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Time kernels in DeepSeek-V2's and V2-Lite's shapes, beside torch's and the floor that memory and units set.

    Each call is checked against float64 first; one that is wrong makes the exit code 4.

    \b
    Examples:
      dsv2quant bench kernels --only fp8,int4 --results kernels.csv
      dsv2quant bench kernels --tune
    """
    common.set_verbosity(verbose, quiet)
    names = _names(only, TUNED if tune else SECTIONS)
    if (tables is not None and not tune) or (results is not None and tune):
        raise click.UsageError("--tables goes with --tune, --results with measuring")

    def say(line: str) -> None:
        if not as_json and not quiet:
            print(line, flush=True)

    if tune:
        from dsv2quant.bench import tune as tuner
        from dsv2quant.kernels.tables import FOLDER

        path = tuner.run(names, tables or FOLDER, say)
        common.print_json({"table": str(path)}) if as_json else print(f"wrote {path}")
        return

    from dsv2quant.bench import kernels as measure
    from dsv2quant.errors import GateError, listing

    found = measure.run(names, results, say)
    if as_json:
        common.print_json(found)
    else:
        print(*map(measure.summary_line, found["rows"]), sep="\n")
    if found["wrong"]:
        raise GateError(f"{len(found['wrong'])} results are wrong: {listing(found['wrong'])}")


def _names(only: str | None, possible: tuple[str, ...]) -> list[str]:
    names = only.split(",") if only else list(possible)
    for name in names:
        if name not in possible:
            raise click.UsageError(f"--only {name}: it takes {', '.join(possible)}")
    return names
