"""Options and output that several verbs share."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from dsv2quant.cli import command as types
from dsv2quant.cli.command import FP8_GRIDS, INT4_KINDS

if TYPE_CHECKING:
    from dsv2quant.checkpoint.checkpoint import Checkpoint
    from dsv2quant.planning.plan import Plan
    from dsv2quant.planning.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])
GROUP_SIZES = {"128": 128, "64": 64, "32": 32, "channel": 0}
FORMATS = {"compressed-tensors": ("int4", "fp8"), "gptq": ("int4",), "awq": ("int4",), "autofp8": ("fp8",)}


def stack(*options: Callable[[F], F], section: str | None = None) -> Callable[[F], F]:
    """Several click options as one decorator, in the order they are to appear in --help, there under a title."""

    def apply(function: F) -> F:
        before = len(getattr(function, "__click_params__", ()))
        for option in reversed(options):
            function = option(function)
        for param in getattr(function, "__click_params__", ())[before:] if section else ():
            param.section = section
        return function

    return apply


hub_options = stack(
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub id; owner/name@REV says it too."),
    click.option("--cache-dir", type=types.Path(folder=True), metavar="DIR", help="Where hub downloads are kept."),
    click.option("--offline", is_flag=True, help="Use only what the hub cache already holds."),
    section="Hub",
)

device_option = stack(
    click.option("--device", type=types.Device(), default="cpu", show_default=True, metavar="cpu|cuda|cuda:N",
                 help="Where to compute."),
    section="Computing",
)  # fmt: skip

compute_options = stack(
    device_option,
    click.option("--dtype", type=click.Choice(("auto", "float32", "bfloat16")), default="auto", show_default=True,
                 help="Compute dtype; auto is float32 on CPU and bfloat16 on CUDA."),
    section="Computing",
)  # fmt: skip

backend_option = stack(
    click.option("--backend", type=click.Choice(("auto", "torch", "kernels")), default="auto", show_default=True,
                 help="kernels: quantized weights as they are, on a Hopper GPU in bfloat16; torch: decoded ones, the "
                 "reference. auto takes kernels where they can be had."),
    section="Computing",
)  # fmt: skip

kv_cache_option = stack(
    click.option("--kv-cache", type=click.Choice(("auto", "float32", "bf16", "fp8_e4m3", "fp8_e5m2")), default="auto",
                 show_default=True,
                 help="What the KV cache stores, FP8 under the artifact's own scales or 1; auto is the compute dtype."),
    section="Computing",
)  # fmt: skip

_scheme_options = stack(
    click.option("--fp8", "fp8", type=types.Kind(FP8_GRIDS), metavar="[=block|channel|tensor|static]",
                 help="FP8 weights with one scale per 128×128 block (the default), output channel or tensor; static: "
                 "per tensor, and activations with calibrated scales."),
    click.option("--int4", "int4", type=types.Kind(INT4_KINDS), metavar="[=mixed|pure|experts]",
                 help="INT4 experts and FP8 for the rest (the default), INT4 everywhere, or INT4 experts alone."),
    click.option("--int8", is_flag=True, help="INT8 weights with one scale per output channel, INT8 activations."),
    click.option("--w4a8", is_flag=True,
                 help="INT4 weights in groups of 128, FP8 activations, for vLLM on Hopper; what can't have it: INT4."),
    click.option("--method", type=click.Choice(("rtn", "mse", "awq", "gptq")),
                 help="How INT4 codes are chosen; all but rtn calibrate. Default: gptq."),
    click.option("--group-size", type=click.Choice(tuple(GROUP_SIZES)),
                 help="Columns that share an INT4 scale. Default: 128."),
    click.option("--format", type=click.Choice(tuple(FORMATS)),
                 help="Layout: gptq and awq of INT4, autofp8 of --fp8=static. Default: compressed-tensors."),
    click.option("--kv-scales", is_flag=True, help="Add scales for an FP8 KV cache, one per layer."),
    click.option("--recipe", "recipe_file", type=types.Path(), metavar="FILE",
                 help="A YAML recipe of your own instead."),
    section="FP8, INT8 and INT4",
)  # fmt: skip
_consumer_options = stack(
    click.option("--target", "targets", multiple=True, type=click.Choice(("vllm", "sglang", "transformers")),
                 help="A consumer that must load the artifact; repeat for several. Default: all that can."),
    click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True,
                 help="Tensor-parallel size that vLLM or SGLang will use."),
    click.option("--ep", type=click.IntRange(min=1), default=1, show_default=True,
                 help="Over how many GPUs they will spread whole routed experts; --tp then splits the rest."),
    click.option("--max-shard-size", default="5GB", show_default=True, help="Largest file, as 5GB or 500MB."),
    section="Consumers of FP8, INT8 and INT4",
)  # fmt: skip
plan_options = stack(_scheme_options, _consumer_options)

output_options = stack(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    click.option("-v", "--verbose", count=True, help="Say more on stderr; -vv for debugging."),
    click.option("-q", "--quiet", is_flag=True, help="Only errors on stderr, no progress bar."),
    section="Output style",
)


def set_verbosity(verbose: int, quiet: bool) -> None:
    if verbose and quiet:
        raise click.UsageError("--verbose and --quiet exclude each other")
    levels = [logging.WARNING, logging.INFO, logging.DEBUG]
    logging.getLogger("dsv2quant").setLevel(logging.ERROR if quiet else levels[min(verbose, 2)])


def check_device(device: str) -> None:
    """Raise a usage error for a device that is not there; 'cpu' needs no look, and a machine without any driver not
    the seconds that importing torch takes."""
    if device == "cpu":
        return
    if sys.platform == "linux" and not _has_driver():
        raise click.UsageError(f"--device {device} can't be used: there is no GPU driver on this machine")
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"--device {device} can't be used: {str(error).splitlines()[0]}") from None


def _has_driver() -> bool:
    if os.path.exists("/dev/kfd"):  # AMD's, which torch also calls cuda
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def given(*names: str) -> list[str]:
    """Which of these parameters the command line gives, as it spells them: what does nothing there is a usage error."""
    context = click.get_current_context()
    return [
        param.opts[-1]
        for param in context.command.params
        if param.name in names and context.get_parameter_source(param.name) == ParameterSource.COMMANDLINE
    ]


def choose_recipe(options: Mapping[str, Any]) -> Recipe:
    """The recipe of --fp8, --int4, --int8, --w4a8 or --recipe; block FP8 when none is given."""
    from dsv2quant.planning import recipe

    fp8, int4, file, w4a8 = options["fp8"], options["int4"], options["recipe_file"], options["w4a8"]
    if options["tp"] > 1 and set(options["targets"]) == {"transformers"}:
        raise click.UsageError("--tp goes with vLLM and SGLang: transformers loads the whole model")
    method, group, layout = options["method"], options["group_size"], options["format"]
    if sum(map(bool, (fp8, int4, file, options["int8"], w4a8))) > 1:
        raise click.UsageError("--fp8, --int4, --int8, --w4a8 and --recipe exclude each other")
    if w4a8 and group:
        raise click.UsageError("--w4a8 has groups of 128 columns: --group-size goes with --int4")
    if (method or group) and not (int4 or w4a8):
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
    if w4a8 or options["int8"]:
        return recipe.builtin("w4a8" if w4a8 else "int8", method=method)
    return recipe.builtin(f"fp8-{fp8 or 'block'}", layout=layout)


def plan_for(checkpoint: Checkpoint, options: Mapping[str, Any]) -> Plan:
    """The plan that `plan_options` ask for."""
    from dsv2quant.planning.plan import make_plan
    from dsv2quant.storage.safetensors import parse_size

    return make_plan(
        checkpoint,
        choose_recipe(options),
        for_targets=options["targets"] or None,
        tp=options["tp"],
        ep=options["ep"],
        max_shard_size=parse_size(options["max_shard_size"]),
        kv_scales=options["kv_scales"],
    )


def words(options: Mapping[str, Any]) -> list[str]:
    """`plan_options` as the model card shows them: everything that shapes the artifact, and no path of this machine."""
    if options["recipe_file"]:
        found = [f"--recipe {options['recipe_file'].rpartition('/')[2]}"]
    elif options["int4"]:
        found = [f"--int4={options['int4']}"]
    elif options["int8"] or options["w4a8"]:
        found = ["--int8" if options["int8"] else "--w4a8"]
    else:
        found = [f"--fp8={options['fp8'] or 'block'}"]
    keys = ("method", "group_size", "format")
    found += [f"--{key.replace('_', '-')} {options[key]}" for key in keys if options[key]]
    found += ["--kv-scales"] * options["kv_scales"]
    found += [f"--target {target}" for target in options["targets"]]
    found += [f"--{key} {options[key]}" for key in ("tp", "ep") if options[key] > 1]
    size = options["max_shard_size"]
    return found + [f"--max-shard-size {size}"] * (size != "5GB")


def print_json(value: Mapping[str, Any]) -> None:
    """One object on one line. JSON has no NaN or infinity: a number that is none prints as null."""
    line = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal of few letters, or a path that is not UTF-8: JSON can spell both
        line = json.dumps(_finite(value), allow_nan=False)
    print(line)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
