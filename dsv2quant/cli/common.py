"""Options and output that several verbs share."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from dsv2quant.checkpoint import Checkpoint
    from dsv2quant.plan import Plan
    from dsv2quant.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])
FP8_GRIDS = ("block", "channel", "tensor")


class Command(click.Command):
    """A verb. `--fp8` may stand alone, before or after MODEL: then it means `--fp8=block`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["--fp8=block" if self._bare_fp8(args, i) else a for i, a in enumerate(args)])

    @staticmethod
    def _bare_fp8(args: list[str], i: int) -> bool:
        return args[i] == "--fp8" and args[i + 1 : i + 2] not in ([grid] for grid in FP8_GRIDS)


def stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, in the order they are to appear in --help."""

    def apply(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


hub_options = stack(
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id."),
    click.option("--cache-dir", metavar="DIR", help="Where hub downloads are kept."),
    click.option("--offline", is_flag=True, help="Use only what the hub cache already holds."),
)

plan_options = stack(
    click.option("--fp8", "fp8", type=click.Choice(FP8_GRIDS), metavar="[=block|channel|tensor]",
                 help="FP8 weights with one scale per 128×128 block (the default), output channel or tensor."),
    click.option("--recipe", "recipe_file", metavar="FILE", help="A YAML recipe of your own instead."),
    click.option("--target", "targets", multiple=True, type=click.Choice(("vllm", "sglang", "transformers")),
                 help="A consumer that must load the artifact; repeat for several. Default: all of them."),
    click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True,
                 help="Tensor-parallel size that vLLM or SGLang will use."),
    click.option("--max-shard-size", default="5GB", show_default=True, help="Largest file, as 5GB or 500MB."),
)  # fmt: skip

output_options = stack(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    click.option("-v", "--verbose", count=True, help="Say more on stderr; -vv for debugging."),
    click.option("-q", "--quiet", is_flag=True, help="Only errors on stderr, no progress bar."),
)


def set_verbosity(verbose: int, quiet: bool) -> None:
    levels = [logging.WARNING, logging.INFO, logging.DEBUG]
    logging.getLogger("dsv2quant").setLevel(logging.ERROR if quiet else levels[min(verbose, 2)])


def check_device(device: str) -> None:
    """Raise a usage error for a device that is not there; 'cpu' needs no look."""
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"--device {device} can't be used: {str(error).splitlines()[0]}") from None


def choose_recipe(fp8: str | None, recipe_file: str | None) -> Recipe:
    """The recipe of --fp8 or --recipe; block FP8 when neither is given."""
    from dsv2quant import recipe

    if fp8 and recipe_file:
        raise click.UsageError("--fp8 and --recipe exclude each other")
    return recipe.load(recipe_file) if recipe_file else recipe.builtin(f"fp8-{fp8 or 'block'}")


def plan_for(
    checkpoint: Checkpoint,
    fp8: str | None,
    recipe_file: str | None,
    targets: tuple[str, ...],
    tp: int,
    max_shard_size: str,
) -> Plan:
    """The plan that the shared options ask for."""
    from dsv2quant.plan import make_plan, parse_size
    from dsv2quant.targets import TARGETS

    return make_plan(
        checkpoint,
        choose_recipe(fp8, recipe_file),
        for_targets=targets or TARGETS,
        tp=tp,
        max_shard_size=parse_size(max_shard_size),
    )


def print_json(value: Mapping[str, Any]) -> None:
    """One object on one line. JSON has no NaN or infinity: a number that is none prints as null."""
    print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress_bar(total: int, unit: str, label: str, quiet: bool) -> Iterator[Callable[[int], object]]:
    """A bar on stderr with rate and ETA; yields the function that advances it. Off a terminal it prints sparsely."""
    from tqdm import tqdm

    disabled = quiet or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    with tqdm(
        total=total,
        unit=unit,
        unit_scale=True,
        desc=label,
        disable=disabled,
        delay=0.3,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
        file=sys.stderr,
    ) as bar:
        yield lambda amount: bar.update(amount)
