"""Using a model: opened on a backend, continued token by token, and completed from text to text.

A prompt goes through expanded attention, then one token at a time over the latent cache.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import InputError, UsageError
from dsv2quant.model.cache import KV_NAMES
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.progress import Progress, no_progress
from dsv2quant.text.chat import Chat
from dsv2quant.text.tokenizer import Detokenizer, Tokenizer

if TYPE_CHECKING:
    from dsv2quant.model.fused_model import FusedModel

logger = logging.getLogger(__name__)
FinishReason = Literal["stop", "length", "context"]


def open_model(
    checkpoint: Checkpoint, options: LoadOptions, *, stream: bool = False, progress: Progress = no_progress
) -> Model | FusedModel:
    """The model on the backend that the options name."""
    layers = 0 if stream else checkpoint.config.num_hidden_layers
    with progress(layers, "layers", f"load {checkpoint.model}") as loaded:
        if options.backend == "torch":
            return Model(checkpoint, options, stream=stream, loaded=loaded)
        from dsv2quant.model.fused_model import FusedModel  # with Triton, which is not on every machine
        from dsv2quant.model.quantized import CheckpointSource

        source = CheckpointSource(checkpoint, options.device, options.dtype)
        return FusedModel(source, options, stream=stream, loaded=loaded)


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits: see `sample`. Raises UsageError for values out of range."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature {self.temperature:g} is out of range", fix="it must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p:g} is out of range", fix="it must be above 0, and at most 1")


def generate(
    model: Model | FusedModel, prompt: Sequence[int], *, stop: Collection[int], max_new_tokens: int, sampling: Sampling
) -> Iterator[int]:
    """The tokens that continue `prompt`, as they come: up to and with one of `stop`, at most `max_new_tokens`, and
    none beyond the model's context.

    A seed gives the same tokens whenever the logits are the same, as they are on one CPU.
    Raises InputError where logits are not finite, and UsageError for a prompt that leaves no room for a token.
    """
    room = check_prompt(len(prompt), model.config.max_position_embeddings)
    count = min(max_new_tokens, room)
    caches = model.caches(1, len(prompt) + count - 1)
    generator = torch.Generator().manual_seed(sampling.seed)
    logits = model.next_logits(torch.tensor([prompt]), caches)
    decode = model.decoder(caches)
    for done in range(1, count + 1):
        token = sample(logits[0], sampling, generator)
        yield token
        if token in stop or done == count:
            return
        logits = decode(torch.tensor([token]))


def check_prompt(tokens: int, context: int) -> int:
    """The tokens that may follow a prompt of `tokens`. Raises UsageError where there are none, or no prompt."""
    if not tokens:
        raise UsageError("the prompt is empty, and this model begins no text with BOS", fix="give some text")
    if tokens >= context:
        raise UsageError(f"the prompt has {tokens} tokens, the context {context}", fix="give a shorter prompt")
    return context - tokens


def finish_reason(tokens: Sequence[int], stop: Collection[int], max_new_tokens: int) -> FinishReason:
    """Why `generate` ended with these tokens: 'context' is the end of the model's."""
    if tokens[-1] in stop:
        return "stop"
    return "length" if len(tokens) == max_new_tokens else "context"


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token of logits [vocab]. At temperature 0 the largest; otherwise, in float64 on the CPU and in this order:

    1. p = softmax(logits / temperature), sorted from the likeliest, equal ones by id
    2. the shortest head of that list is kept whose sum reaches top_p
    3. the first kept token whose cumulative p exceeds u · (sum of the kept), u uniform in [0, 1) from `generator`
    """
    if not logits.isfinite().all():
        raise InputError("the model's logits are not finite", fix="it is damaged, or overflows in this dtype")
    if sampling.temperature == 0:
        return int(logits.argmax())
    wide = logits.double().cpu()
    # Less their maximum first: no temperature is too small.
    p, tokens = ((wide - wide.max()) / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    cumulative = p.cumsum(-1)
    kept = cumulative[: 1 + int((cumulative[:-1] < sampling.top_p).sum())]
    u = torch.rand(1, generator=generator, dtype=torch.float64)
    chosen = int(torch.searchsorted(kept, u * kept[-1], right=True))
    return int(tokens[min(chosen, len(kept) - 1)])


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
    if checkpoint.config.is_classifier:
        fix = "generating needs a language model"
        raise InputError(f"is a {checkpoint.config.architecture}", where=checkpoint.model, fix=fix)
    tokenizer = checkpoint.tokenizer()
    prompt = prompt_ids(checkpoint, tokenizer, request.prompt, request.special)
    check_prompt(len(prompt), checkpoint.config.max_position_embeddings)
    if isinstance(request.prompt, str):
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
    options = c.request.options
    return {
        "schema": "dsv2quant.generate/1",
        "model": c.model,
        "prompt_tokens": c.prompt_tokens,
        "tokens": c.tokens,
        "text": c.text,
        "finish_reason": c.finish_reason,
        **asdict(c.request.sampling),
        "dtype": str(options.dtype).removeprefix("torch."),
        "kv_cache": KV_NAMES[options.kv_cache or options.dtype],
        "device": options.device,
        "backend": options.backend,
        "versions": {"torch": torch.__version__},
        "prefill_tokens_per_s": c.prefill_tokens_per_s,
        "decode_tokens_per_s": c.decode_tokens_per_s,
        "seconds": c.seconds,
    }


def prompt_ids(
    checkpoint: Checkpoint, tokenizer: Tokenizer, prompt: str | Sequence[Message], special: bool = False
) -> list[int]:
    """The tokens of a prompt, as `Request` has it. A BOS that it spells out as a special token is not put before it
    again, and a chat template spells out all that it wants."""
    if is_chat := not isinstance(prompt, str):
        chat = Chat([dict(message) for message in prompt], checkpoint.model)
        (text,) = checkpoint.templates().render([chat], generation_prompt=True)
    else:
        text = prompt
    ids = tokenizer.encode(text, parse_special=is_chat or special)
    tokenizer.check_ids(ids, checkpoint.config.vocab_size)
    wanted = tokenizer.add_bos and not is_chat and ids[:1].tolist() != [tokenizer.bos_id]
    return [*[tokenizer.bos_id] * wanted, *ids.tolist()]
