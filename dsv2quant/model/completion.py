"""A prompt, or a question in a chat, completed by the reference runtime: from text to text."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dsv2quant.arch.config import CAUSAL_LM
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import InputError
from dsv2quant.model.attention import KV_NAMES
from dsv2quant.model.generate import Sampling, check_prompt, finish_reason, generate
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.open import open_model
from dsv2quant.progress import Progress, no_progress
from dsv2quant.text.chat import Chat
from dsv2quant.text.tokenizer import Detokenizer, Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What to complete and how. As a `chat`, the prompt is a user's message in the checkpoint's chat template;
    otherwise it is a text, which begins with BOS where the tokenizer says so. With `special`, control tokens that are
    spelled out in the text are meant as such."""

    prompt: str
    chat: bool
    max_new_tokens: int
    sampling: Sampling
    options: LoadOptions
    special: bool = False


def complete(
    checkpoint: Checkpoint,
    request: Request,
    emit: Callable[[str], object] = lambda text: None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """The object of `generate --json`; `emit` is given the text in pieces as it comes, whole characters only.

    Raises InputError for a model that is no language model or lacks a usable tokenizer, stop token or chat template,
    and UsageError for a prompt that is empty or fills the context.
    """
    started = time.perf_counter()
    if checkpoint.config.architecture != CAUSAL_LM:
        fix = "generating needs a language model"
        raise InputError(f"is a {checkpoint.config.architecture}", where=checkpoint.model, fix=fix)
    tokenizer = checkpoint.tokenizer()
    prompt = prompt_ids(checkpoint, tokenizer, request)
    check_prompt(len(prompt), checkpoint.config.max_position_embeddings)
    if not request.chat:
        for note in checkpoint.bos_note():
            logger.warning("warning: %s", note)
    stop = checkpoint.stop_ids(tokenizer)
    model = open_model(checkpoint, request.options, progress=progress)

    detokenizer = Detokenizer(tokenizer)
    tokens: list[int] = []
    text: list[str] = []
    began = prefilled = time.perf_counter()
    limit, sampling = request.max_new_tokens, request.sampling
    for token in generate(model, prompt, stop=stop, max_new_tokens=limit, sampling=sampling):
        if not tokens:
            prefilled = time.perf_counter()
        tokens.append(token)
        piece = "" if token in stop else detokenizer.add(token)
        text.append(piece)
        emit(piece)
    decoded = time.perf_counter()
    text.append(detokenizer.end())
    emit(text[-1])
    options = request.options
    return {
        "schema": "dsv2quant.generate/1",
        "model": checkpoint.model,
        "prompt_tokens": prompt,
        "tokens": tokens,
        "text": "".join(text),
        "finish_reason": finish_reason(tokens, stop, limit),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "dtype": str(options.dtype).removeprefix("torch."),
        "kv_cache": KV_NAMES[options.kv_cache or options.dtype],
        "device": options.device,
        "backend": options.backend,
        "versions": {"torch": torch.__version__},
        "prefill_tokens_per_s": len(prompt) / (prefilled - began),
        # The first token comes of the prefill.
        "decode_tokens_per_s": (len(tokens) - 1) / (decoded - prefilled) if len(tokens) > 1 else None,
        "seconds": decoded - started,
    }


def prompt_ids(checkpoint: Checkpoint, tokenizer: Tokenizer, request: Request) -> list[int]:
    """The tokens of a prompt. A BOS that it spells out as a special token is not put before it again, and a chat
    template spells out all that it wants."""
    if request.chat:
        chat = Chat([{"role": "user", "content": request.prompt}], checkpoint.model)
        (text,) = checkpoint.templates().render([chat], generation_prompt=True)
    else:
        text = request.prompt
    ids = tokenizer.encode(text, parse_special=request.chat or request.special)
    tokenizer.check_ids(ids, checkpoint.config.vocab_size)
    wanted = tokenizer.add_bos and not request.chat and ids[:1].tolist() != [tokenizer.bos_id]
    return [*[tokenizer.bos_id] * wanted, *ids.tolist()]
