"""A prompt, or a question in a chat, completed by the reference runtime: from text to text."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsv2quant.arch.config import CAUSAL_LM
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import InputError
from dsv2quant.model.attention import KV_NAMES
from dsv2quant.model.generate import FinishReason, Sampling, check_prompt, finish_reason, generate
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.open import open_model
from dsv2quant.progress import Progress, no_progress
from dsv2quant.storage.safetensors import read_json
from dsv2quant.text.chat import Chat, Templates
from dsv2quant.text.tokenizer import Detokenizer, Tokenizer
from dsv2quant.text.tokenizer_file import bos_note

logger = logging.getLogger(__name__)


Message = Mapping[str, Any]  # as chat templates take it: {"role", "content", …}


@dataclass(frozen=True)
class Request:
    """What to complete and how. A prompt is a text, which begins with BOS where the tokenizer says so, or the messages
    of a chat, which the checkpoint's chat template spells. With `special`, control tokens that are spelled out in the
    text are meant as such."""

    prompt: str | Sequence[Message]
    max_new_tokens: int
    sampling: Sampling
    options: LoadOptions
    special: bool = False


@dataclass(frozen=True)
class Completion:
    """What a model made of a request. Tokens are ids; `text` is that of `tokens` without what ended it, and `context`
    how many tokens the model can hold. Speeds are in tokens per second, of decoding None after a single one."""

    model: str
    request: Request
    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    finish_reason: FinishReason
    context: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    seconds: float


def complete(
    checkpoint: Checkpoint,
    request: Request,
    emit: Callable[[str], object] = lambda text: None,
    progress: Progress = no_progress,
) -> Completion:
    """Complete a prompt; `emit` is given the text in pieces as it comes, whole characters only.

    Raises InputError for a model that is no language model or lacks a usable tokenizer, stop token or chat template,
    and UsageError for a prompt that is empty or fills the context.
    """
    started = time.perf_counter()
    if checkpoint.config.architecture != CAUSAL_LM:
        fix = "generating needs a language model"
        raise InputError(f"is a {checkpoint.config.architecture}", where=checkpoint.model, fix=fix)
    tokenizer = Tokenizer.of(checkpoint)
    prompt = prompt_ids(checkpoint, tokenizer, request)
    check_prompt(len(prompt), checkpoint.config.max_position_embeddings)
    if isinstance(request.prompt, str) and checkpoint.folder is not None:
        for note in bos_note(checkpoint.folder):
            logger.warning("warning: %s", note)
    stop = stop_ids(checkpoint, tokenizer)
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
    return Completion(
        model=checkpoint.model,
        request=request,
        prompt_tokens=prompt,
        tokens=tokens,
        text="".join(text),
        finish_reason=finish_reason(tokens, stop, limit),
        context=checkpoint.config.max_position_embeddings,
        prefill_tokens_per_s=len(prompt) / (prefilled - began),
        # The first token comes of the prefill.
        decode_tokens_per_s=(len(tokens) - 1) / (decoded - prefilled) if len(tokens) > 1 else None,
        seconds=decoded - started,
    )


def completion_json(c: Completion) -> dict[str, Any]:
    """The object of `dsv2quant generate --json`."""
    sampling, options = c.request.sampling, c.request.options
    return {
        "schema": "dsv2quant.generate/1",
        "model": c.model,
        "prompt_tokens": c.prompt_tokens,
        "tokens": c.tokens,
        "text": c.text,
        "finish_reason": c.finish_reason,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "dtype": str(options.dtype).removeprefix("torch."),
        "kv_cache": KV_NAMES[options.kv_cache or options.dtype],
        "device": options.device,
        "backend": options.backend,
        "versions": {"torch": torch.__version__},
        "prefill_tokens_per_s": c.prefill_tokens_per_s,
        "decode_tokens_per_s": c.decode_tokens_per_s,
        "seconds": c.seconds,
    }


def prompt_ids(checkpoint: Checkpoint, tokenizer: Tokenizer, request: Request) -> list[int]:
    """The tokens of a prompt. A BOS that it spells out as a special token is not put before it again, and a chat
    template spells out all that it wants."""
    if is_chat := not isinstance(request.prompt, str):
        chat = Chat([dict(message) for message in request.prompt], checkpoint.model)
        (text,) = Templates.of(checkpoint).render([chat], generation_prompt=True)
    else:
        text = request.prompt
    ids = tokenizer.encode(text, parse_special=is_chat or request.special)
    tokenizer.check_ids(ids, checkpoint.config.vocab_size)
    wanted = tokenizer.add_bos and not is_chat and ids[:1].tolist() != [tokenizer.bos_id]
    return [*[tokenizer.bos_id] * wanted, *ids.tolist()]


def stop_ids(checkpoint: Checkpoint, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: `eos_token_id` of generation_config.json, which may list several, else the token
    that tokenizer_config.json names, else config.json's; of a GGUF file its EOS and end of turn. None may be named."""
    if checkpoint.metadata is not None:
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        found: Any = [checkpoint.metadata[key].value for key in keys if key in checkpoint.metadata]
        where: object = checkpoint.model
    else:
        assert checkpoint.folder is not None
        where = path = checkpoint.folder / "generation_config.json"
        found = read_json(path).get("eos_token_id") if path.exists() else None
        if found is None:
            where = path = checkpoint.folder / "tokenizer_config.json"
            token = read_json(path).get("eos_token") if path.exists() else None
            token = token.get("content") if isinstance(token, dict) else token
            found = tokenizer.id_of(token) if isinstance(token, str) else None
        if found is None:
            where, found = checkpoint.folder / "config.json", checkpoint.raw_config.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(number) is int for number in ids):
        raise InputError(f"eos_token_id is {found!r:.60}", where=where, fix="it must be a token's id, or a list of ids")
    return frozenset(ids)
