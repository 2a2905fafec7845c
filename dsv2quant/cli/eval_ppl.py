"""`dsv2quant eval-ppl`."""

from __future__ import annotations

from typing import Any

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal
from dsv2quant.cli.ranks import together
from dsv2quant.planning.options import ENGINES, PROTOCOLS


@click.command(cls=shared.Command)
@click.argument("model", type=shared.PATH)
@click.option(
    "--reference",
    type=shared.PATH,
    metavar="MODEL|FILE",
    help="What to compare with, normally the BF16 model it was made from, or the file that was kept of one.",
)
@click.option(
    "--save-reference",
    type=shared.PATH,
    metavar="FILE",
    help="Keep MODEL as a reference: a file for --reference, so that it is scored once.",
)
@shared.text_options
@shared.stack(
    click.option("--protocol", type=click.Choice(PROTOCOLS), default="default", show_default=True,
                 help="default scores every text token; llama.cpp the second half of each window."),
    section="Text",
)  # fmt: skip
@shared.stack(
    click.option("--batch", type=click.IntRange(min=1), help="Windows that go through a layer together."),
    click.option("--stream", is_flag=True, help="Hold one layer's weights at a time: for models larger than memory."),
    section="Computing",
)
@shared.compute_options
@shared.stack(
    click.option("--weight-only", is_flag=True, help="Leave activations unquantized, whatever the scheme."),
    click.option("--as", "serving", type=click.Choice(ENGINES),
                 help="Compute as this consumer does, where it departs from what the artifact says."),
    click.option("--decode-path", is_flag=True,
                 help="Score as decoding computes: token by token. Slow: for small models."),
    section="Computing",
)  # fmt: skip
@shared.kv_cache_option
@shared.stack(
    click.option("--max-ppl-increase", type=float, metavar="P",
                 help="Fail (exit 4) if perplexity grows by more than P %."),
    click.option("--max-kld", type=float, metavar="K", help="Fail (exit 4) if mean KLD exceeds K nats."),
    section="Gates",
)  # fmt: skip
@shared.hub_options
@shared.output_options
def command(model: str, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Measure MODEL's perplexity and, with --reference, how far it is from the model it was made from.

    Schemes that quantize activations when served are evaluated with them quantized in the same way; of a GGUF file the
    decoded weights are. Without a text it scores Python's own help topics, which are on every machine.

    \b
    Examples:
      dsv2quant eval-ppl DeepSeek-V2-Lite-FP8-BLOCK --reference deepseek-ai/DeepSeek-V2-Lite --dataset wikitext2
      dsv2quant eval-ppl OUT --reference BF16 --max-kld 0.05 --json
      dsv2quant eval-ppl BF16 --save-reference bf16.safetensors
      dsv2quant eval-ppl OUT --reference bf16.safetensors
    """
    terminal.set_verbosity(verbose, quiet)
    asked = shared.asked(options)
    with together(asked.pop("device", "cpu")) as ranks:
        found = dq.evaluate(model, device=ranks.device, progress=terminal.progress(quiet), ranks=ranks, **asked)
        from dsv2quant.evaluation.results import evaluation_json, evaluation_text

        terminal.show(found, evaluation_json, evaluation_text, as_json)
        found.check_gates()
