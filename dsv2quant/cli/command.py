"""A verb's command line: values that may be left out, and what is said of words in the wrong place.

Types of parameters: what a shell completes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import pairwise

import click
from click.shell_completion import CompletionItem

from dsv2quant.planning.options import SCHEMES

FP8_GRIDS = tuple(name.removeprefix("fp8-") for name in SCHEMES if name.startswith("fp8-"))
INT4_KINDS = tuple(name.removeprefix("int4-") for name in SCHEMES if name.startswith("int4-"))
KINDS = {"--fp8": FP8_GRIDS, "--int4": INT4_KINDS}


class Command(click.Command):
    """A verb. `--fp8` and `--int4` may stand alone, before or after MODEL: then they mean their first kind. --help
    groups the options by the sections that `common.stack` gave them.

    An option that takes a value doesn't take another option for it, and one that can't be repeated is not given twice.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = [self._with_kind(args, i) for i in range(len(args))]
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        try:
            if not ctx.resilient_parsing:
                self._check_values(options, args)
                self._check_once(self.make_parser(ctx).parse_args(list(args))[2])
            return super().parse_args(ctx, list(args))
        except click.UsageError:
            # A kind that is none was taken for MODEL, and MODEL for one argument too many.
            for name, word in pairwise(arg.partition("=")[0] for arg in args):
                if (
                    name in KINDS
                    and word not in KINDS[name]
                    and re.fullmatch(r"\w+", word)
                    and not os.path.exists(word)
                ):
                    what = f"{name} {word}: it takes {', '.join(KINDS[name])}, or nothing, for {KINDS[name][0]}"
                    raise click.UsageError(what, ctx) from None
            raise

    @staticmethod
    def _check_values(options: list[click.Option], args: list[str]) -> None:
        names = {name for option in options for name in option.opts}
        takes_value = {name for option in options if not (option.is_flag or option.count) for name in option.opts}
        for name, value in pairwise(args[: args.index("--")] if "--" in args else args):
            if name in takes_value and (option := value.partition("=")[0]) in names:
                raise click.UsageError(f"{name} needs a value: {option} is an option")

    @staticmethod
    def _check_once(given: list[click.Parameter]) -> None:
        """`given` are the parameters in the order of the command line. Flags may be repeated."""
        for param in given:
            is_single = isinstance(param, click.Option) and not (param.multiple or param.is_flag or param.count)
            if is_single and given.count(param) > 1:
                raise click.UsageError(f"{' / '.join(param.opts)} is given twice")

    @staticmethod
    def _with_kind(args: list[str], i: int) -> str:
        kinds = KINDS.get(args[i])
        stands_alone = kinds is not None and args[i + 1 : i + 2] not in ([kind] for kind in kinds)
        return f"{args[i]}={kinds[0]}" if kinds and stands_alone else args[i]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                title = "Output style" if "--help" in param.opts else getattr(param, "section", "Options")
                sections.setdefault(title, []).append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Path(click.ParamType):
    """A path, as text. The shell completes it; whether it exists is for those to say who read it."""

    name = "path"

    def __init__(self, *, folder: bool = False) -> None:
        self.folder = folder

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir" if self.folder else "file")]


class Kind(click.Choice):
    """A choice that MODEL may follow instead: a shell completes names of files where no choice begins so."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        # Files come first: click's script for bash forgets what came before them.
        return [CompletionItem(incomplete, type="file"), *super().shell_complete(ctx, param, incomplete)]


class Names(click.ParamType):
    """Text of which a shell completes what `names` lists."""

    name = "text"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self.names if name.startswith(incomplete.upper())]


class Device(click.ParamType):
    """The name of a device, as text."""

    name = "device"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in ("cpu", "cuda") if name.startswith(incomplete)]
