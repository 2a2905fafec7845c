"""What an engine is asked for and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsv2quant.text.tokenizer import Windows

Prompt = Mapping[str, Any]  # {"text": …}, or {"messages": […]} for the chat template


@dataclass(frozen=True)
class Request:
    """Windows to score and prompts to continue greedily. `dtype` ("bfloat16") and `kv_cache` ("auto", "fp8_e4m3") are
    as engines name them; `tp` is the number of GPUs. With `decode`, that many tokens are decoded behind each window,
    never ending, and these are scored instead: an engine's prefill need not read its KV cache."""

    windows: Windows
    vocabulary: int
    prompts: Sequence[Prompt] = ()
    max_new_tokens: int = 32
    dtype: str = "bfloat16"
    kv_cache: str = "auto"
    tp: int = 1
    decode: int = 0

    @property
    def scored(self) -> int:
        """Scored tokens of each window."""
        return self.decode or self.windows.scored


@dataclass(frozen=True)
class Generated:
    """What an engine made of a prompt: the tokens it took it for, those it gave, end included, and why it ended:
    "stop", or "length"."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Report:
    """What an engine says of itself: its version and those of what it runs on, by name; how often it chose which
    implementation; its attention backend and KV cache; and what was set that changes what it chooses, by name."""

    versions: Mapping[str, str]
    kernels: Mapping[str, int]
    attention: str | None
    kv_cache: str | None
    device: str
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Natural log-probabilities that an engine gave at the scored positions. Of the whole vocabulary: `logprobs`
    [windows, scored, vocabulary]; else of the likeliest k: `ids` and `logprobs` [windows, scored, k], and of the true
    tokens `targets` [windows, scored]. `error` bounds what their storage changed, in nats."""

    logprobs: np.ndarray
    ids: np.ndarray | None = None
    targets: np.ndarray | None = None
    error: float = 0.0

    @property
    def likeliest(self) -> int | None:
        """k; None of whole distributions."""
        return None if self.ids is None else int(self.ids.shape[-1])


@dataclass(frozen=True)
class Answer:
    """An engine's answer. `ids` [windows, ctx] are the windows that it scored, with the tokens it decoded where it was
    asked to, scored from position `first`."""

    windows: Windows
    scores: Scores
    report: Report
    generated: list[Generated] = field(default_factory=list)


def asked_of(model: Path, request: Request) -> dict[str, Any]:
    """request.json, as drivers/exchange.py describes it."""
    return {
        "model": str(model), "dtype": request.dtype, "tp": request.tp, "kv_cache": request.kv_cache,
        "first": request.windows.first, "decode": request.decode, "vocab_size": request.vocabulary,
        "prompts": list(request.prompts), "max_new_tokens": request.max_new_tokens,
    }  # fmt: skip
