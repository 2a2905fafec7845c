"""`dsv2quant verify`."""

from __future__ import annotations

from typing import Any

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal
from dsv2quant.planning.options import ENGINE_DTYPES, ENGINES, KV_CACHES, check_engine

_engine_options = shared.stack(
    click.option("--engine", type=click.Choice(ENGINES), help="Run it there and compare with the runtime."),
    click.option("--engine-python", type=shared.PATH, metavar="PYTHON", help="The Python that has the engine."),
    click.option("--engine-url", metavar="URL", help="A server that runs it, instead of a process of its own."),
    click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs that it is split over."),
    click.option("--dtype", "engine_dtype", type=click.Choice(ENGINE_DTYPES), default="bfloat16", show_default=True,
                 help="What the engine computes in."),
    click.option("--kv-cache", type=click.Choice(KV_CACHES[:1] + KV_CACHES[-2:]), default="auto", show_default=True,
                 help="What its KV cache stores. Over FP8, decoded tokens are compared."),
    click.option("--text", type=shared.PATH, metavar="FILE", help="A UTF-8 text to score. Default: Python's topics."),
    click.option("--windows", type=click.IntRange(min=1), default=8, show_default=True, help="Windows to score."),
    click.option("--ctx", type=click.IntRange(min=8), help="Their length. Default: 512, or the trained context."),
    click.option("--generate", is_flag=True, help="Also continue prompts: tokenizer, chat template, end of text."),
    click.option("--max-kld", type=float, metavar="K",
                 help="Fail (exit 4) if mean KLD from the runtime exceeds K nats, not twice the noise floor."),
    section="In an engine",
)  # fmt: skip


@click.command(cls=shared.Command)
@click.argument("artifact", type=shared.PATH)
@click.option(
    "--source",
    type=shared.PATH,
    metavar="MODEL",
    help="The checkpoint it was made from: measures each role's error too, and in an engine the noise floor.",
)
@click.option("--device", default="cpu", show_default=True, help="Where the runtime computes: cpu, cuda, cuda:1.")
@_engine_options
@shared.hub_options
@shared.output_options
def command(artifact: str, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Check ARTIFACT: checksums, shapes and dtypes; with --source also the error of what consumers will decode.

    Of a GGUF file without a manifest beside it (NAME.gguf.json), every block's scales must be finite.

    Prints per role the signal-to-noise ratio (SQNR) and the largest error, and names the worst tensors.

    With --engine the engine is run on it: what it computes must be what this tool's runtime computes of the same
    artifact, up to twice the noise that both have anyway.

    \b
    Examples:
      dsv2quant verify DeepSeek-V2-Lite-FP8-BLOCK --source deepseek-ai/DeepSeek-V2-Lite
      dsv2quant verify OUT --engine vllm --engine-python ~/vllm/bin/python --source BF16 --generate --device cuda
      dsv2quant verify OUT-Q4_K_M.gguf --engine llama.cpp --source OUT-BF16.gguf
    """
    terminal.set_verbosity(verbose, quiet)
    given, progress = shared.asked(options), terminal.progress(quiet)
    in_engine = {param.name for param in command.params if getattr(param, "section", "") == "In an engine"}
    if "engine" not in given and (useless := shared.given(*in_engine)):
        raise click.UsageError(f"{useless[0]} goes with --engine")
    of_engine = {name: given.pop(name) for name in in_engine & given.keys()}
    if of_engine:
        names = ("engine", "engine_python", "engine_url", "tp", "kv_cache", "engine_dtype")
        check_engine(*(options[name] for name in names))
    hub = {name: given[name] for name in given if name not in ("source", "device")}
    opened = dq.open(artifact, **hub)
    # Of a checkpoint that isn't ours there is nothing to check but what an engine makes of it.
    bare = bool(of_engine) and "source" not in given and opened.inputs[0].is_dir() and not opened.manifest.exists()
    found = None if bare else dq.verify(opened, progress=progress, **given)
    runs = of_engine and not (found and found.wrong)  # what is wrong already needs no engine
    verdict = dq.verify_engine(opened, progress=progress, **given, **of_engine) if runs else None

    from dsv2quant.engines.results import report_json, report_text

    terminal.show((found, verdict), report_json, report_text, as_json)
    for each in (found, verdict):
        if each is not None:
            each.check()
