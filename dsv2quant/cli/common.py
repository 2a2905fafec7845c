"""Options and output that several verbs share."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from dsv2quant.checkpoint import Checkpoint
    from dsv2quant.plan import Plan
    from dsv2quant.progress import Progress
    from dsv2quant.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])
FP8_GRIDS = ("block", "channel", "tensor", "static")
INT4_KINDS = ("mixed", "pure", "experts")
GROUP_SIZES = {"128": 128, "64": 64, "32": 32, "channel": 0}
FORMATS = {"compressed-tensors": ("int4", "fp8"), "gptq": ("int4",), "awq": ("int4",), "autofp8": ("fp8",)}


class Command(click.Command):
    """A verb. `--fp8` and `--int4` may stand alone, before or after MODEL: then they mean their first kind.

    An option that takes a value doesn't take another option for it, and one that can't be repeated is not given twice.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = [self._with_kind(args, i) for i in range(len(args))]
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        if not ctx.resilient_parsing:
            self._check_values(options, args)
            self._check_once(self.make_parser(ctx).parse_args(list(args))[2])
        return super().parse_args(ctx, args)

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
        kinds = {"--fp8": FP8_GRIDS, "--int4": INT4_KINDS}.get(args[i])
        stands_alone = kinds is not None and args[i + 1 : i + 2] not in ([kind] for kind in kinds)
        return f"{args[i]}={kinds[0]}" if kinds and stands_alone else args[i]


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

compute_options = stack(
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1."),
    click.option("--dtype", type=click.Choice(("auto", "float32", "bfloat16")), default="auto", show_default=True,
                 help="Compute dtype; auto is float32 on CPU and bfloat16 on CUDA."),
)  # fmt: skip

backend_option = click.option(
    "--backend",
    type=click.Choice(("auto", "torch", "kernels")),
    default="auto",
    show_default=True,
    help="kernels: quantized weights as they are, on a Hopper GPU in bfloat16; torch: decoded ones, the reference. "
    "auto takes kernels where they can be had.",
)

kv_cache_option = click.option(
    "--kv-cache",
    type=click.Choice(("auto", "float32", "bf16", "fp8_e4m3", "fp8_e5m2")),
    default="auto",
    show_default=True,
    help="What the KV cache stores, FP8 under the artifact's own scales or 1; auto is the compute dtype.",
)

plan_options = stack(
    click.option("--fp8", "fp8", type=click.Choice(FP8_GRIDS), metavar="[=block|channel|tensor|static]",
                 help="FP8 weights with one scale per 128×128 block (the default), output channel or tensor; static: "
                 "per tensor, and activations with calibrated scales."),
    click.option("--int4", "int4", type=click.Choice(INT4_KINDS), metavar="[=mixed|pure|experts]",
                 help="INT4 experts and FP8 for the rest (the default), INT4 everywhere, or INT4 experts alone."),
    click.option("--method", type=click.Choice(("rtn", "mse", "awq", "gptq")),
                 help="How INT4 codes are chosen; all but rtn calibrate. Default: gptq."),
    click.option("--group-size", type=click.Choice(tuple(GROUP_SIZES)),
                 help="Columns that share an INT4 scale. Default: 128."),
    click.option("--format", type=click.Choice(tuple(FORMATS)),
                 help="Layout: gptq and awq of INT4, autofp8 of --fp8=static. Default: compressed-tensors."),
    click.option("--kv-scales", is_flag=True, help="Add scales for an FP8 KV cache, one per layer."),
    click.option("--recipe", "recipe_file", metavar="FILE", help="A YAML recipe of your own instead."),
    click.option("--target", "targets", multiple=True, type=click.Choice(("vllm", "sglang", "transformers")),
                 help="A consumer that must load the artifact; repeat for several. Default: all that can."),
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


def choose_recipe(options: Mapping[str, Any]) -> Recipe:
    """The recipe of --fp8, --int4 or --recipe; block FP8 when none is given."""
    from dsv2quant import recipe

    fp8, int4, file = options["fp8"], options["int4"], options["recipe_file"]
    method, group, layout = options["method"], options["group_size"], options["format"]
    if sum(map(bool, (fp8, int4, file))) > 1:
        raise click.UsageError("--fp8, --int4 and --recipe exclude each other")
    if (method or group) and not int4:
        raise click.UsageError("--method and --group-size go with --int4; a recipe names them itself")
    if layout and not (int4 and "int4" in FORMATS[layout]) and not (fp8 == "static" and "fp8" in FORMATS[layout]):
        raise click.UsageError(f"--format {layout}: gptq and awq go with --int4, autofp8 with --fp8=static")
    if (layout, group) == ("awq", "channel"):
        raise click.UsageError("--format awq has scales per group alone: --group-size 128, 64 or 32")
    if file:
        return recipe.load(file)
    if int4:
        size = GROUP_SIZES[group] if group else None
        return recipe.builtin(f"int4-{int4}", method=method, group_size=size, layout=layout)
    return recipe.builtin(f"fp8-{fp8 or 'block'}", layout=layout)


def plan_for(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
    """The plan that `plan_options` ask for."""
    from dsv2quant.plan import make_plan
    from dsv2quant.shards import parse_size

    return make_plan(
        checkpoint,
        choose_recipe(options),
        for_targets=options["targets"] or None,
        tp=options["tp"],
        max_shard_size=parse_size(options["max_shard_size"]),
        kv_scales=options["kv_scales"],
    )


def words(options: Mapping[str, Any]) -> list[str]:
    """`plan_options` as the model card shows them: everything that shapes the artifact, and no path of this machine."""
    if options["recipe_file"]:
        found = [f"--recipe {options['recipe_file'].rpartition('/')[2]}"]
    elif options["int4"]:
        found = [f"--int4={options['int4']}"]
    else:
        found = [f"--fp8={options['fp8'] or 'block'}"]
    keys = ("method", "group_size", "format")
    found += [f"--{key.replace('_', '-')} {options[key]}" for key in keys if options[key]]
    found += ["--kv-scales"] * options["kv_scales"]
    found += [f"--target {target}" for target in options["targets"]]
    found += [f"--tp {options['tp']}"] * (options["tp"] > 1)
    size = options["max_shard_size"]
    return found + [f"--max-shard-size {size}"] * (size != "5GB")


def progress(quiet: bool) -> Progress:
    """Bars on stderr for the library's long work."""
    return lambda total, unit, label: progress_bar(total, unit, label, quiet)


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
