"""The `dsv2quant` command: finds the verb, and turns failures into one line and an exit code.

0 done · 1 a bug · 2 wrong usage · 3 bad input · 4 a gate failed · 130 interrupted · 129, 143 hung up, terminated
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from difflib import get_close_matches
from typing import NoReturn

import click

from dsv2quant.cli.endings import EARLY, ending
from dsv2quant.cli.ranks import hushed, place
from dsv2quant.cli.signals import stopping
from dsv2quant.cli.terminal import logging_shown, take_any_text
from dsv2quant.errors import UsageError
from dsv2quant.version import __version__

# Verb → (module, one line). Listing them needs no import, which keeps --help instant.
VERBS = {
    "plan": ("dsv2quant.cli.plan", "Show what a conversion would do, from headers alone."),
    "bench": ("dsv2quant.cli.bench", "Measure kernels, or a model, on this GPU."),
    "calibrate": ("dsv2quant.cli.calibrate", "Measure activations, for many conversions."),
    "compare": ("dsv2quant.cli.compare", "Show artifacts beside each other, whoever made them."),
    "convert": ("dsv2quant.cli.convert", "Quantize a checkpoint."),
    "eval-ppl": ("dsv2quant.cli.eval_ppl", "Measure perplexity, and divergence from a reference."),
    "generate": ("dsv2quant.cli.generate", "Continue a text, or answer a question."),
    "inspect": ("dsv2quant.cli.inspect", "Show what a checkpoint or artifact holds."),
    "memory": ("dsv2quant.cli.memory", "Show what fits on a GPU, from headers alone."),
    "push": ("dsv2quant.cli.push", "Upload a verified artifact to the hub."),
    "release": ("dsv2quant.cli.release", "Make, measure and describe artifacts: everything that is published."),
    "search": ("dsv2quant.cli.search", "Find the mix of types that costs least within a budget."),
    "verify": ("dsv2quant.cli.verify", "Check an artifact's files, and its error against the source."),
}

SHARED = ("calibrate", "convert", "eval-ppl", "search")  # what several ranks of torchrun can do together


class _Verbs(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = importlib.import_module(VERBS[name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS and args[0][:1].isalnum() and not ctx.resilient_parsing:
            near = get_close_matches(args[0].replace("_", "-"), VERBS, 1)
            raise click.UsageError(f"No such verb {args[0]!r}." + (f" Did you mean {near[0]!r}?" if near else ""), ctx)
        if args[0] in VERBS and args[0] not in SHARED and place() is not None:
            raise UsageError(f"{args[0]} runs in one process", fix=f"torchrun is for {', '.join(SHARED)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dsv2quant")
def cli() -> None:
    """Quantize DeepSeek-V2 checkpoints for vLLM, SGLang and transformers, and measure what it cost.

    \b
    Example:
      dsv2quant convert deepseek-ai/DeepSeek-V2-Lite --fp8 -o DeepSeek-V2-Lite-FP8-BLOCK
      dsv2quant eval-ppl DeepSeek-V2-Lite-FP8-BLOCK --reference deepseek-ai/DeepSeek-V2-Lite
    """


def main() -> NoReturn:
    """Entry point of the console script."""
    take_any_text()
    with hushed():
        code = _run()
    sys.exit(code)


def _run() -> int:
    """Run the command; its exit code."""
    try:
        with logging_shown(), stopping():
            return cli.main(standalone_mode=False) or 0
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output left: `dsv2quant inspect … | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EARLY as error:
        code, line = ending(error)
        with suppress(OSError):  # the terminal may be gone
            print(line, file=sys.stderr)
        return code
