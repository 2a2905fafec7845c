"""GGUF on the command line: the options of `convert --gguf` and `plan --gguf`, and the conversion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv2quant.cli import bars, common
from dsv2quant.cli import command as types
from dsv2quant.formats.gguf.file_types import NAMES

if TYPE_CHECKING:
    from dsv2quant.checkpoint.checkpoint import Checkpoint
    from dsv2quant.planning.gguf_plan import GgufPlan


def file_type_names() -> tuple[str, ...]:
    """What --gguf takes: file types, then presets."""
    return NAMES


gguf_options = common.stack(
    click.option("--gguf", type=types.Names(file_type_names), metavar="TYPE",
                 help="Write a GGUF file for llama.cpp: a file type of llama-quantize's or a preset (DSV2_…), which "
                 f"spends its bytes better. {', '.join(file_type_names())}."),
    click.option("--imatrix", type=types.Path(), metavar="FILE",
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
_NEEDS_GGUF = (
    "imatrix", "imatrix_shrink", "tensor_types", "output_type", "token_embedding_type", "drop_expert_groups",
    "split_max_size",
)  # fmt: skip
_EXCLUDED = (
    "fp8", "int4", "int8", "w4a8", "recipe_file", "method", "group_size", "format", "kv_scales", "targets", "tp", "ep",
    "max_shard_size", "text", "samples", "length", "seed", "figure", "statistics",
)  # fmt: skip


def is_asked_for(options: Mapping[str, Any]) -> bool:
    """Whether --gguf is given; options that go with the other formats, or with it alone, are a usage error."""
    if wrong := common.given(*(_EXCLUDED if options["gguf"] else _NEEDS_GGUF)):
        raise click.UsageError(f"{wrong[0]} {'does not go' if options['gguf'] else 'goes'} with --gguf")
    return bool(options["gguf"])


def words(checkpoint: Checkpoint, options: Mapping[str, Any]) -> list[str]:
    """The command as the manifest shows it: everything that shapes the file, and no path of this machine."""
    found = ["dsv2quant convert", checkpoint.model, f"--gguf {options['gguf']}"]
    found += [f"--imatrix {Path(options['imatrix']).name}"] if options["imatrix"] else []
    found += ["--imatrix-shrink"] * options["imatrix_shrink"]
    found += [f"--tensor-type {spec}" for spec in options["tensor_types"]]
    keys = ("output_type", "token_embedding_type", "split_max_size")
    found += [f"--{key.replace('_', '-')} {options[key]}" for key in keys if options[key]]
    return found + ["--drop-expert-groups"] * options["drop_expert_groups"]


def check_out(out: str, options: Mapping[str, Any]) -> None:
    """Raise a usage error where `out` is named as the other kind of artifact: a file with --gguf, else a folder."""
    if options["gguf"] and not out.endswith(".gguf"):
        raise click.UsageError(f"-o {out}: --gguf writes a file, whose name must end in .gguf")
    if not options["gguf"] and out.lower().endswith(".gguf"):
        asked = (common.given("int4", "int8", "w4a8", "recipe_file") or ["--fp8"])[0]
        raise click.UsageError(f"-o {out}: a GGUF file is written by --gguf TYPE; {asked} writes a folder")


def print_plan(checkpoint: Checkpoint, options: Mapping[str, Any], as_json: bool, *, every_tensor: bool) -> None:
    """Show what a conversion would do, into GGUF or another format."""
    if is_asked_for(options):
        from dsv2quant.report import gguf as gguf_plan

        into_gguf = plan_for(checkpoint, options)
        text, found = gguf_plan.plan_text(into_gguf, every_tensor=every_tensor), gguf_plan.plan_json(into_gguf)
    else:
        from dsv2quant.report import plans

        checkpoint.as_source().check_tokenizer()
        plan = common.plan_for(checkpoint, options)
        text, found = plans.plan_text(plan, every_tensor=every_tensor), plans.plan_json(plan)
    if as_json:
        common.print_json(found)
    else:
        print(text)


def plan_for(checkpoint: Checkpoint, options: Mapping[str, Any]) -> GgufPlan:
    """The plan that `gguf_options` ask for."""
    from dsv2quant.formats.gguf import imatrix
    from dsv2quant.planning import gguf_plan as gguf
    from dsv2quant.planning.gguf_types import Overrides

    if options["imatrix_shrink"] and not options["imatrix"]:
        raise click.UsageError("--imatrix-shrink goes with --imatrix")
    asked = gguf.Options(
        gguf.parse_file_type(options["gguf"]),
        Overrides(
            tuple(gguf.parse_tensor_type(text) for text in options["tensor_types"]),
            gguf.parse_type(options["output_type"]) if options["output_type"] else None,
            gguf.parse_type(options["token_embedding_type"]) if options["token_embedding_type"] else None,
        ),
        options["drop_expert_groups"],
        imatrix.read(Path(options["imatrix"])) if options["imatrix"] else None,
        options["imatrix_shrink"],
    )
    return gguf.make_gguf_plan(checkpoint, asked)


def convert(
    checkpoint: Checkpoint, out: str, options: Mapping[str, Any], *, device: str, force: bool, as_json: bool,
    verbose: int, quiet: bool,
) -> None:  # fmt: skip
    """Write the GGUF file and say what was done."""
    with bars.starting(quiet):
        from dsv2quant.conversion.gguf import convert_gguf
    from dsv2quant.report.gguf import plan_text
    from dsv2quant.report.tables import gigabytes
    from dsv2quant.storage.safetensors import parse_size

    plan = plan_for(checkpoint, options)
    if verbose:
        click.echo(plan_text(plan, every_tensor=verbose > 1), err=True)
    elif not quiet:
        for note in plan.notes:
            click.echo(f"note: {note}", err=True)
    size = parse_size(options["split_max_size"]) if options["split_max_size"] else None
    result = convert_gguf(
        plan, Path(out), command=" ".join(words(checkpoint, options)), split_max_size=size, device=device, force=force,
        progress=bars.progress(quiet),
    )  # fmt: skip
    nbytes = sum(entry["size"] for entry in result.files.values())
    if as_json:
        common.print_json(
            {
                "schema": "dsv2quant.convert-gguf/2",
                "out": out,
                "files": result.files,
                "bytes_in": plan.bytes_in,
                "bytes_out": nbytes,
                "bits_per_weight": 8 * nbytes / plan.parameters,
                "resumed_tensors": result.resumed,
                "already_complete": result.already_complete,
                "seconds": result.seconds,
            }
        )
    elif not quiet:
        names = next(iter(result.files)) + (f" and {len(result.files) - 1} more" if len(result.files) > 1 else "")
        sizes = f"{gigabytes(plan.bytes_in)} → {gigabytes(nbytes)}, {8 * nbytes / plan.parameters:.2f} bits/weight"
        done = "was already complete" if result.already_complete else f"in {result.seconds:.1f} s"
        print(f"{Path(out).with_name(names)}: {sizes}, {done}")
