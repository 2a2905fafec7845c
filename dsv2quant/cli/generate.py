"""`dsv2quant generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

import dsv2quant as dq
from dsv2quant.cli import options as shared
from dsv2quant.cli import terminal

if TYPE_CHECKING:
    from dsv2quant.model.completion import Completion


@click.command(cls=shared.Command)
@click.argument("model", type=shared.PATH)
@click.option("--prompt", required=True, metavar="TEXT", help="What to continue; @FILE reads a file, - stdin.")
@click.option("--chat", is_flag=True, help="Put the prompt as a question, in the model's chat template.")
@click.option("--special", is_flag=True, help="Take special tokens spelled out in the prompt as such (<｜fim▁hole｜>).")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Where to stop.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from the likeliest that sum to this.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the sampling.")
@shared.compute_options
@shared.kv_cache_option
@shared.hub_options
@shared.output_options
def command(model: str, prompt: str, chat: bool, as_json: bool, verbose: int, quiet: bool, **options: Any) -> None:
    """Continue a text with MODEL: a checkpoint, an artifact or a GGUF file.

    The text is printed as it comes, and nothing else is on stdout. It ends with the model's end-of-sequence token,
    after --max-new-tokens or at the context's end. Temperature and top-p of generation_config.json are not used.
    Special tokens in the prompt are text like any other, unless --chat or --special asks for them.

    \b
    Examples:
      dsv2quant generate DeepSeek-V2-Lite-FP8-BLOCK --prompt "The quick brown fox" --device cuda
      dsv2quant generate DeepSeek-V2-Lite-Chat-Q4_K_M.gguf --chat --prompt "Why is the sky blue?" --temperature 0.3
    """
    terminal.set_verbosity(verbose, quiet)
    text = _text(prompt)
    asked = [{"role": "user", "content": text}] if chat else text
    emit: Callable[[str], object] = (lambda piece: None) if as_json else partial(print, end="", flush=True)
    found = dq.generate(model, asked, emit=emit, progress=terminal.progress(quiet), **shared.asked(options))
    if as_json:
        from dsv2quant.model.completion import completion_json

        terminal.print_json(completion_json(found))
    else:
        print()
    if not quiet:
        print(_speed(found), file=sys.stderr)
        if found.finish_reason == "context":
            print(f"warning: the model's context of {found.context} tokens is full", file=sys.stderr)


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


def _speed(found: Completion) -> str:
    decode = found.decode_tokens_per_s
    rate = f" ({decode:.1f} per second)" if decode is not None else ""
    return (
        f"{len(found.prompt_tokens)} prompt tokens ({found.prefill_tokens_per_s:.1f} per second), "
        f"{len(found.tokens)} tokens{rate}, ended by {found.finish_reason}, {found.seconds:.1f} s in all"
    )
