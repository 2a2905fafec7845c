"""`dsv2quant memory`."""

from __future__ import annotations

from typing import Any

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal
from dsv2quant.planning import options as known


class Numbers(click.ParamType):
    """Whole numbers with commas between them."""

    name = "N,N,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        words = str(value).split(",")
        if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
            self.fail(f"{value!r} is no list of numbers, as 1,2,4.", param, ctx)
        return tuple(map(int, words))


_workload_options = shared.stack(
    click.option("--batch", type=Numbers(), default="1", show_default=True, help="Numbers of texts."),
    click.option("--context", type=Numbers(), default="2048", show_default=True, help="Tokens of each."),
    click.option("--prefill", type=click.Choice(known.PREFILLS), default="flash", show_default=True,
                 help="flash: attention without scores, the last token's logits, as this tool's runtime and engines; "
                 "eager: transformers of 2023, scores of every pair of tokens, all tokens' logits."),
    click.option("--kv-cache", type=click.Choice(known.KV_CACHES[1:]), default="bf16", show_default=True,
                 help="What the KV cache stores."),
    section="Workload",
)  # fmt: skip
_gpu_options = shared.stack(
    click.option("--gpu", metavar="CARD", help="Say what fits: A100-40GB, H100, H200, or a card's size, as 24GB."),
    click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs that split each matrix."),
    click.option("--pp", type=click.IntRange(min=1), default=1, show_default=True,
                 help="GPUs, or groups of --tp, that split the layers."),
    section="GPUs",
)  # fmt: skip


@click.command(cls=shared.Command)
@click.argument("model", type=shared.PATH)
@_workload_options
@_gpu_options
@shared.scheme_options
@shared.hub_options
@shared.output_options
def command(model: str, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Show what MODEL (a checkpoint, artifact, GGUF file or hub id) takes of a GPU's memory, from headers alone.

    A line for each batch and context has weights, cache, logits, activations and what torch's allocator holds, of the
    fullest GPU. With a scheme, weights are those of the artifact that it would make.

    \b
    Example:
      dsv2quant memory deepseek-ai/deepseek-llm-7b-base --batch 1,8 --context 1024,4096 --gpu A100-40GB
      dsv2quant memory deepseek-ai/DeepSeek-V2-Lite --fp8 --context 32768 --gpu H100
    """
    from dsv2quant.report.memory import memory_json, memory_text

    terminal.set_verbosity(verbose, quiet)
    asked = shared.asked(options)
    workload = {name: asked.pop(name) for name in known.WORKLOAD if name in asked}
    hub = {name: asked[name] for name in known.HubOptions.__annotations__ if name in asked}
    subject: Any = model
    if asked.keys() - hub.keys():
        subject = dq.plan(model, **asked, tp=workload.get("tp", 1))
    terminal.show(dq.memory(subject, **workload, **hub), memory_json, memory_text, as_json)
