"""`dsv2quant eval-ppl`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from dsv2quant.cli import bars, common
from dsv2quant.cli import command as types
from dsv2quant.cli.command import Command

if TYPE_CHECKING:
    from dsv2quant.checkpoint.checkpoint import Checkpoint
    from dsv2quant.text.text import Text


@click.command(cls=Command)
@click.argument("model", type=types.Path())
@click.option(
    "--reference",
    type=types.Path(),
    metavar="MODEL",
    help="What to compare with, normally the BF16 model it was made from.",
)
@common.stack(
    click.option("--text", "text_file", type=types.Path(), metavar="FILE", help="A UTF-8 text to score."),
    click.option("--dataset", type=click.Choice(["wikitext2"]), help="A dataset from the hub to score instead."),
    click.option("--ctx", type=click.IntRange(min=8),
                 help="Window length. Default: 2048, or the trained context if that is shorter."),
    click.option("--limit", type=click.IntRange(min=1), metavar="WINDOWS", help="Score only the first windows."),
    click.option("--protocol", type=click.Choice(["default", "llama.cpp"]), default="default", show_default=True,
                 help="default scores every text token; llama.cpp the second half of each window."),
    section="Text",
)  # fmt: skip
@common.stack(
    click.option("--batch", type=click.IntRange(min=1), help="Windows that go through a layer together."),
    click.option("--stream", is_flag=True, help="Hold one layer's weights at a time: for models larger than memory."),
    section="Computing",
)
@common.compute_options
@common.backend_option
@common.stack(
    click.option("--weight-only", is_flag=True, help="Leave activations unquantized, whatever the scheme."),
    click.option("--decode-path", is_flag=True,
                 help="Score as decoding computes: token by token. Slow: for small models."),
    section="Computing",
)  # fmt: skip
@common.kv_cache_option
@common.stack(
    click.option("--max-ppl-increase", type=float, metavar="P",
                 help="Fail (exit 4) if perplexity grows by more than P %."),
    click.option("--max-kld", type=float, metavar="K", help="Fail (exit 4) if mean KLD exceeds K nats."),
    section="Gates",
)  # fmt: skip
@common.hub_options
@common.output_options
def command(
    model: str,
    reference: str | None,
    text_file: str | None,
    dataset: str | None,
    ctx: int | None,
    limit: int | None,
    batch: int | None,
    protocol: Any,
    stream: bool,
    device: str,
    dtype: str,
    backend: str,
    weight_only: bool,
    decode_path: bool,
    kv_cache: str,
    max_ppl_increase: float | None,
    max_kld: float | None,
    revision: str | None,
    cache_dir: str | None,
    offline: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Measure MODEL's perplexity and, with --reference, how far it is from the model it was made from.

    Schemes that quantize activations when served are evaluated with them quantized in the same way; of a GGUF file the
    decoded weights are. Without a text it scores Python's own help topics, which are on every machine.

    \b
    Examples:
      dsv2quant eval-ppl DeepSeek-V2-Lite-FP8-BLOCK --reference deepseek-ai/DeepSeek-V2-Lite --dataset wikitext2
      dsv2quant eval-ppl OUT --reference BF16 --max-kld 0.05 --json
    """
    common.set_verbosity(verbose, quiet)
    if reference is None and (max_ppl_increase is not None or max_kld is not None):
        raise click.UsageError("--max-ppl-increase and --max-kld need --reference")
    if text_file and dataset:
        raise click.UsageError("--text and --dataset exclude each other")
    if kv_cache != "auto" and not decode_path:
        raise click.UsageError("--kv-cache needs --decode-path: prefill reads no cache")
    text = _text(text_file, dataset, cache_dir, offline)
    common.check_device(device)

    from dsv2quant.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(model, revision=revision, cache_dir=cache_dir, offline=offline)
    against = None
    if reference is not None:
        against = open_checkpoint(reference, cache_dir=cache_dir, offline=offline)
    with bars.starting(quiet):
        import torch

        from dsv2quant.evaluation.measure import Settings, check_gates, evaluate, gates, identify
        from dsv2quant.model.attention import KV_DTYPES
        from dsv2quant.report.results import evaluation_text
    trained = checkpoint.config.trained_context
    if ctx is not None and ctx > trained and not quiet:
        print(f"warning: --ctx {ctx} is beyond the trained context, {trained}: perplexity may explode", file=sys.stderr)
    settings = Settings(
        ctx=ctx,
        limit=limit,
        batch=batch,
        protocol=protocol,
        stream=stream,
        device=device,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        backend=backend,
        weight_only=weight_only,
        decode_path=decode_path,
        kv_cache=KV_DTYPES.get(kv_cache),
    )
    if (shared := _shared_with_calibration(checkpoint, text)) and not quiet:
        print(f"warning: {shared:.1%} of the text's lines were calibrated on: it flatters the model", file=sys.stderr)
    result = evaluate(checkpoint, against, text, settings, bars.progress(quiet))
    verdicts = gates(result, max_ppl_increase, max_kld)
    if as_json:
        if against is not None:
            result["reference"] |= identify(against)
        common.print_json(result | identify(checkpoint) | {"gates": verdicts})
    else:
        print(evaluation_text(result))
    check_gates(verdicts)


def _shared_with_calibration(checkpoint: Checkpoint, text: Text) -> float:
    """The share of the text's lines that an artifact was calibrated on, where that is more than chance."""
    from dsv2quant.storage.durable import MANIFEST_FILE
    from dsv2quant.storage.safetensors import read_json
    from dsv2quant.text.calibration import MAX_OVERLAP, fingerprint, overlap

    manifest = checkpoint.file(MANIFEST_FILE)
    if manifest is None:
        return 0.0
    calibrated = read_json(manifest).get("calibration_fingerprint")
    shared = overlap(fingerprint(text.content), calibrated) if isinstance(calibrated, list) else 0.0
    return shared if shared > MAX_OVERLAP else 0.0


def _text(text_file: str | None, dataset: str | None, cache_dir: str | None, offline: bool) -> Text:
    from dsv2quant.text import text

    if text_file:
        return text.from_file(text_file)
    return text.from_dataset(dataset, cache_dir, offline) if dataset else text.python_topics()
