"""A verb's command line: the options that verbs share, what of them is given, values that may be left out, and what is
said of words in the wrong place."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from dsv2quant.formats.gguf.file_types import NAMES
from dsv2quant.planning import options as known

F = TypeVar("F", bound=Callable[..., Any])
FP8_GRIDS = tuple(name.removeprefix("fp8-") for name in known.SCHEMES if name.startswith("fp8-"))
INT4_KINDS = tuple(name.removeprefix("int4-") for name in known.SCHEMES if name.startswith("int4-"))
FEW_KINDS = tuple(name.removeprefix("int3-") for name in known.SCHEMES if name.startswith("int3-"))
KINDS = {"--fp8": FP8_GRIDS, "--int4": INT4_KINDS, "--int3": FEW_KINDS, "--int2": FEW_KINDS}
PATH = click.Path(readable=False)  # as text: whether it exists is for those to say who read it


class Command(click.Command):
    """A verb. `--fp8`, `--int4`, `--int3` and `--int2` may stand alone, before or after MODEL: then they mean their
    first kind. --help groups the options by the sections that `stack` gave them.

    An option that takes a value doesn't take another option for it, and one that can't be repeated is not given twice.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = [self._with_kind(args, i) for i in range(len(args))]
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        try:
            if not ctx.resilient_parsing:
                self._check(ctx, options, args)
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

    def _check(self, ctx: click.Context, options: list[click.Option], args: list[str]) -> None:
        valued = [option for option in options if not (option.is_flag or option.count)]
        names, takes_value = ({name for option in some for name in option.opts} for some in (options, valued))
        for name, value in pairwise(args[: args.index("--")] if "--" in args else args):
            if name in takes_value and (found := value.partition("=")[0]) in names:
                raise click.UsageError(f"{name} needs a value: {found} is an option")
        given = self.make_parser(ctx).parse_args(list(args))[2]  # parameters in the order of the command line
        for param in given:
            if param in valued and not param.multiple and given.count(param) > 1:
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


class Kind(click.Choice):
    """A choice that MODEL may follow instead: a shell completes names of files where no choice begins so."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        # Files come first: click's script for bash forgets what came before them.
        return [CompletionItem(incomplete, type="file"), *super().shell_complete(ctx, param, incomplete)]


def _names(*names: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """What a shell completes of a text: these, in either case."""
    return lambda context, param, text: [name for name in names if name.lower().startswith(text.lower())]


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
    click.option("--cache-dir", type=PATH, metavar="DIR", help="Where hub downloads are kept.",
                 shell_complete=lambda context, param, text: [CompletionItem(text, type="dir")]),
    click.option("--offline", is_flag=True, help="Use only what the hub cache already holds."),
    section="Hub",
)  # fmt: skip

device_option = stack(
    click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda|cuda:N", help="Where to compute.",
                 shell_complete=_names("cpu", "cuda")),
    section="Computing",
)  # fmt: skip

text_options = stack(
    click.option("--text", type=PATH, metavar="FILE", help="A UTF-8 text to score."),
    click.option("--dataset", type=click.Choice(known.DATASETS), help="A dataset from the hub to score instead."),
    click.option("--ctx", type=click.IntRange(min=8),
                 help="Window length. Default: 2048, or the trained context if that is shorter."),
    click.option("--limit", type=click.IntRange(min=1), metavar="WINDOWS", help="Score only the first windows."),
    section="Text",
)  # fmt: skip

compute_options = stack(
    device_option,
    click.option("--dtype", type=click.Choice(known.DTYPES), default="auto", show_default=True,
                 help="Compute dtype; auto is float32 on CPU and bfloat16 on CUDA."),
    click.option("--backend", type=click.Choice(known.BACKENDS), default="auto", show_default=True,
                 help="kernels: quantized weights as they are, on a Hopper GPU in bfloat16; torch: decoded ones, the "
                 "reference. auto takes kernels where they can be had."),
    section="Computing",
)  # fmt: skip

kv_cache_option = stack(
    click.option("--kv-cache", type=click.Choice(known.KV_CACHES), default="auto", show_default=True,
                 help="What the KV cache stores, FP8 under the artifact's own scales or 1; auto is the compute dtype."),
    section="Computing",
)  # fmt: skip


def _whole(context: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    return int(value) if value is not None and value.isdigit() else value


scheme_options = stack(
    click.option("--fp8", "fp8", type=Kind(FP8_GRIDS), metavar="[=block|channel|tensor|static]",
                 help="FP8 weights with one scale per 128×128 block (the default), output channel or tensor; static: "
                 "per tensor, and activations with calibrated scales."),
    click.option("--int4", "int4", type=Kind(INT4_KINDS), metavar="[=mixed|pure|experts]",
                 help="INT4 experts and FP8 for the rest (the default), INT4 everywhere, or INT4 experts alone."),
    click.option("--int3", "int3", type=Kind(FEW_KINDS), metavar="[=mixed|experts]",
                 help="INT3 routed experts, and FP8 (the default) or BF16 for the rest."),
    click.option("--int2", "int2", type=Kind(FEW_KINDS), metavar="[=mixed|experts]",
                 help="INT2 routed experts, and FP8 (the default) or BF16 for the rest."),
    click.option("--int8", is_flag=True, help="INT8 weights with one scale per output channel, INT8 activations."),
    click.option("--w4a8", is_flag=True,
                 help="INT4 weights in groups of 128, FP8 activations, for vLLM on Hopper; what can't have it: INT4."),
    click.option("--method", type=click.Choice(known.METHODS),
                 help="How integer codes are chosen; all but rtn calibrate. Default: gptq."),
    click.option("--group-size", type=click.Choice(tuple(map(str, known.GROUP_SIZES))), callback=_whole,
                 help="Columns that share a scale of integers. Default: 128, of --int3 and --int2 64."),
    click.option("--format", "layout", type=click.Choice(tuple(known.LAYOUTS)),
                 help="Layout: gptq and awq of INT4, autofp8 of --fp8=static. Default: compressed-tensors."),
    click.option("--tune", metavar="TOKENS",
                 help="Then train codes, scales, norms and routers on so many tokens of the calibration text, as 8M."),
    click.option("--kv-scales", is_flag=True, help="Add scales for an FP8 KV cache, one per layer."),
    click.option("--language-only", is_flag=True,
                 help="Of a model that sees, the language model alone. Default: the whole, the rest as it is."),
    click.option("--recipe", type=PATH, metavar="FILE", help="A YAML recipe of your own instead."),
    click.option("--base-model", metavar="OWNER/NAME", help="The base model that the card names. Default: MODEL."),
    section="FP8 and integers",
)  # fmt: skip
consumer_options = stack(
    click.option("--target", "targets", multiple=True, type=click.Choice(known.CONSUMERS),
                 help="A consumer that must load the artifact; repeat for several. Default: all that can."),
    click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True,
                 help="Tensor-parallel size that vLLM or SGLang will use."),
    click.option("--ep", type=click.IntRange(min=1), default=1, show_default=True,
                 help="Over how many GPUs they will spread whole routed experts; --tp then splits the rest."),
    click.option("--max-shard-size", default="5GB", show_default=True, help="Largest file, as 5GB or 500MB."),
    section="Consumers of FP8 and integers",
)  # fmt: skip
_gguf_options = stack(
    click.option("--gguf", shell_complete=_names(*NAMES), metavar="TYPE",
                 help="Write a GGUF file for llama.cpp: a file type of llama-quantize's or a preset (DSV2_…), which "
                 f"spends its bytes better. {', '.join(NAMES)}."),
    click.option("--imatrix", type=PATH, metavar="FILE",
                 help="An importance matrix, of `calibrate --imatrix` or llama-imatrix."),
    click.option("--imatrix-shrink", is_flag=True, help="Draw experts with few tokens toward their layer's mean."),
    click.option("--tensor-type", "tensor_types", multiple=True, metavar="PATTERN=TYPE",
                 help="A type for tensors whose name matches, as llama-quantize has it; repeat for several."),
    click.option("--output-type", metavar="TYPE", help="The type of output.weight."),
    click.option("--token-embedding-type", metavar="TYPE", help="The type of token_embd.weight."),
    click.option("--drop-expert-groups", is_flag=True, help="Let llama.cpp route without groups: see the plan's note."),
    click.option("--split-max-size", metavar="SIZE", help="Cut the file into shards of at most this, as 45GB."),
    section="GGUF",
)  # fmt: skip
plan_options = stack(scheme_options, consumer_options, _gguf_options)


budget_options = stack(
    click.option("--bits", type=float, metavar="BITS", help="At most so many for each weight, all files counted."),
    click.option("--size", metavar="SIZE", help="At most so many bytes, as 9GB."),
    click.option("--max-kld", type=float, metavar="NATS", help="The smallest mix that costs at most this divergence."),
    section="Budget",
)  # fmt: skip


def calibration_options(text: str) -> Callable[[F], F]:
    """Those of text to calibrate on; `text` is what the API calls the file."""
    return stack(
        click.option("--calibration", text, type=PATH, metavar="FILE|DATASET",
                     help="Text, or .jsonl or .json with texts or chats; or of the hub, ORG/NAME[:SPLIT][#COLUMN]. "
                     "Default: Python's library."),
        click.option("--num-calibration-samples", "samples", type=click.IntRange(min=1), default=512,
                     show_default=True, help="Windows of calibration text."),
        click.option("--max-seq-length", "length", type=click.IntRange(min=8),
                     help="Tokens of a window. Default: 2048, or the context the model was trained for."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                     help="Order of calibration texts."),
        click.option("--figure", type=PATH, metavar="FILE",
                     help="Draw tokens per expert: .png, .svg or .pdf (viz extra)."),
        section="Calibration",
    )  # fmt: skip


output_options = stack(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    click.option("-v", "--verbose", count=True, help="Say more on stderr; -vv for debugging."),
    click.option("-q", "--quiet", is_flag=True, help="Only errors on stderr, no progress bar."),
    section="Output style",
)


def given(*names: str) -> list[str]:
    """Which of these parameters the command line gives, as it spells them: what does nothing there is a usage error."""
    context = click.get_current_context()
    return [param.opts[-1] for param in context.command.params if param.name in names and _is_given(param.name)]


def asked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that the command line gives, as the API takes them: of the others it has the defaults. Raises a usage
    error for several schemes."""
    found = {name: value for name, value in options.items() if _is_given(name)}
    schemes = [f"{family}-{found.pop(family)}" for family in ("fp8", "int4", "int3", "int2") if family in found]
    schemes += [family for family in ("int8", "w4a8") if found.pop(family, False)]
    if len(schemes) + ("recipe" in found) > 1:
        raise click.UsageError("--fp8, --int4, --int3, --int2, --int8, --w4a8 and --recipe exclude each other")
    return found | ({"scheme": schemes[0]} if schemes else {})


def _is_given(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) == ParameterSource.COMMANDLINE
