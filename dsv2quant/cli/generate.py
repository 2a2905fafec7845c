"""`dsv2quant generate`."""

from __future__ import annotations

import sys
from typing import Any

import click

from dsv2quant.cli import bars, common
from dsv2quant.cli import command as types
from dsv2quant.cli.command import Command


@click.command(cls=Command)
@click.argument("model", type=types.Path())
@click.option("--prompt", required=True, metavar="TEXT", help="What to continue; @FILE reads a file, - stdin.")
@click.option("--chat", is_flag=True, help="Put the prompt as a question, in the model's chat template.")
@click.option("--special", is_flag=True, help="Take special tokens spelled out in the prompt as such (<｜fim▁hole｜>).")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Where to stop.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from the likeliest that sum to this.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the sampling.")
@common.compute_options
@common.backend_option
@common.kv_cache_option
@common.hub_options
@common.output_options
def command(
    model: str,
    prompt: str,
    chat: bool,
    special: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    device: str,
    dtype: str,
    backend: str,
    kv_cache: str,
    revision: str | None,
    cache_dir: str | None,
    offline: bool,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Continue a text with MODEL: a checkpoint, an artifact or a GGUF file.

    The text is printed as it comes, and nothing else is on stdout. It ends with the model's end-of-sequence token,
    after --max-new-tokens or at the context's end. Temperature and top-p of generation_config.json are not used.
    Special tokens in the prompt are text like any other, unless --chat or --special asks for them.

    \b
    Examples:
      dsv2quant generate DeepSeek-V2-Lite-FP8-BLOCK --prompt "The quick brown fox" --device cuda
      dsv2quant generate DeepSeek-V2-Lite-Chat-Q4_K_M.gguf --chat --prompt "Why is the sky blue?" --temperature 0.3
    """
    common.set_verbosity(verbose, quiet)
    if chat and special:
        raise click.UsageError(
            "--special goes with a plain prompt: the chat template spells out its own special tokens"
        )
    if temperature == 0 and (useless := common.given("top_p", "seed")):
        raise click.UsageError(f"{useless[0]} goes with --temperature above 0: without sampling it does nothing")
    text = _text(prompt)
    common.check_device(device)

    from dsv2quant.checkpoint.open import open_checkpoint

    checkpoint = open_checkpoint(model, revision=revision, cache_dir=cache_dir, offline=offline)
    with bars.starting(quiet):
        import torch

        from dsv2quant.model.attention import KV_DTYPES
        from dsv2quant.model.completion import Request, Sampling, complete
        from dsv2quant.model.load import LoadOptions, choose_backend, default_dtype

    computed = default_dtype(device) if dtype == "auto" else getattr(torch, dtype)
    request = Request(
        text,
        chat,
        max_new_tokens,
        Sampling(temperature, top_p, seed),
        LoadOptions(
            computed, device, kv_cache=KV_DTYPES.get(kv_cache), backend=choose_backend(backend, device, computed)
        ),
        special,
    )
    if as_json:
        result = complete(checkpoint, request, progress=bars.progress(quiet))
        common.print_json(result)
    else:
        result = complete(checkpoint, request, lambda text: print(text, end="", flush=True), bars.progress(quiet))
        print()
    if not quiet:
        print(_speed(result), file=sys.stderr)
        if result["finish_reason"] == "context":
            context = checkpoint.config.max_position_embeddings
            print(f"warning: the model's context of {context} tokens is full", file=sys.stderr)


def _text(prompt: str) -> str:
    """The prompt itself, that of a file, or stdin's."""
    from dsv2quant.errors import InputError, UsageError
    from dsv2quant.text import text

    if prompt.startswith("@"):
        return text.from_file(prompt[1:]).content
    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode()
        prompt.encode()
    except UnicodeDecodeError as error:
        raise InputError(f"can't be read: {error}", where="stdin", fix="give a UTF-8 text") from None
    except UnicodeEncodeError:
        raise UsageError("--prompt is not UTF-8", fix="give a UTF-8 text") from None
    return prompt


def _speed(result: dict[str, Any]) -> str:
    decode = result["decode_tokens_per_s"]
    rate = f" ({decode:.1f} per second)" if decode is not None else ""
    return (
        f"{len(result['prompt_tokens'])} prompt tokens ({result['prefill_tokens_per_s']:.1f} per second), "
        f"{len(result['tokens'])} tokens{rate}, ended by {result['finish_reason']}, {result['seconds']:.1f} s in all"
    )
