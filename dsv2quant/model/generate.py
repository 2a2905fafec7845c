"""Generating tokens: the prompt through expanded attention, then one token at a time over the latent cache."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from dsv2quant.errors import InputError, UsageError
from dsv2quant.model.runtime import Model

if TYPE_CHECKING:
    from dsv2quant.model.fused_model import FusedModel

FinishReason = Literal["stop", "length", "context"]


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
