"""Whether an engine continued prompts as the runtime does: the same tokens of each prompt, greedy choices that the
runtime also finds best, and the same end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.engines.answers import Generated, Prompt
from dsv2quant.errors import InputError
from dsv2quant.evaluation.divergence import log_probabilities, run
from dsv2quant.model.completion import prompt_ids
from dsv2quant.model.fused_model import FusedModel
from dsv2quant.model.runtime import Model

# A sentence, code, letters of several bytes, and space that tokenizers treat apart.
TEXTS = (
    "The quick brown fox jumps over the lazy dog. The",
    "def fibonacci(n):\n    ",
    "深度求索是一家",
    "  1.\tOne\n\n  2.",
)
QUESTION = [{"role": "user", "content": "Why is the sky blue?"}]


def prompts_of(checkpoint: Checkpoint) -> list[Prompt]:
    """Texts, and a question where the checkpoint has a chat template."""
    found: list[Prompt] = [{"text": text} for text in TEXTS]
    return [*found, {"messages": QUESTION}] if "default" in checkpoint.templates().named else found


@dataclass(frozen=True)
class Continued:
    """What became of a prompt. `regret` is by how many nats of log-probability the engine's tokens fall short of the
    runtime's likeliest at most; `faults` say what differs."""

    prompt: Prompt
    text: str
    tokens: int
    finish_reason: str
    regret: float
    faults: list[str]


def check(
    model: Model | FusedModel,
    rounded: Callable[[], Model | FusedModel],
    tokens_from: Checkpoint,
    prompts: Sequence[Prompt],
    found: Sequence[Generated],
    apart: float,
) -> list[Continued]:
    """Compare what an engine made of prompts: with the tokens that `tokens_from` gives them, and with the logits of
    `model`, the runtime's, behind them. Of two tokens ln p may be off by as much as it is on a text, by `apart` nats,
    or here of `rounded`, which opens `model` in the dtype of its own noise: what an engine makes of a short prompt
    soon is unlike any text, where rounding weighs more. A choice that falls short by more is a fault."""
    tokenizer = tokens_from.tokenizer()
    stop = tokens_from.stop_ids(tokenizer)
    exact = _behind(model, found)
    regrets = [_regret(logp, made) for logp, made in zip(exact, found, strict=True)]
    noises = [0.0] * len(found)
    if max(regrets, default=0.0) > 2 * apart:  # seldom: a model of many layers is read once more for it
        noises = [_noise(*three) for three in zip(exact, _behind(rounded(), found), found, strict=True)]
    checked = []
    for prompt, made, regret, noise in zip(prompts, found, regrets, noises, strict=True):
        most = 2 * max(apart, noise)
        asked = prompt["text"] if "text" in prompt else prompt["messages"]
        wanted = prompt_ids(tokens_from, tokenizer, asked)
        faults = []
        if made.prompt_ids != wanted:
            faults.append(f"takes the prompt for {_first_apart(made.prompt_ids, wanted)}")
        if regret > most:
            faults.append(f"chooses a token that falls {regret:.3f} nats short of the likeliest, beyond {most:.3f}")
        ends = [place for place, token in enumerate(made.ids) if token in stop]
        if (made.finish_reason == "stop") != bool(ends) or ends[:1] not in ([], [len(made.ids) - 1]):
            faults.append(_end(made, sorted(stop), ends))
        checked.append(Continued(prompt, made.text, len(made.ids), made.finish_reason, regret, faults))
    return checked


def _first_apart(got: Sequence[int], wanted: Sequence[int]) -> str:
    place = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    return f"tokens {[*got[place : place + 4]]} at {place}, not {[*wanted[place : place + 4]]}"


def _end(made: Generated, stop: list[int], ends: list[int]) -> str:
    if ends:
        return f"goes on behind {made.ids[ends[0]]}, which ends a text (one of {stop})"
    return f"ends with {made.ids[-1:]}, which ends no text (but {stop} do)"


@torch.inference_mode()
def _behind(model: Model | FusedModel, found: Sequence[Generated]) -> list[torch.Tensor]:
    """ln p of each continuation's tokens, [count, vocabulary]. All go through the model together, padded behind: no
    token sees what comes after it."""
    rows = [[*made.prompt_ids, *made.ids] for made in found]
    if any(not made.prompt_ids or not made.ids for made in found):
        raise InputError("the engine gave no token for a prompt", fix="see what it says with -vv")
    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    passed = run(model, padded, [slice(0, len(rows))])
    return [
        torch.cat(list(log_probabilities(passed, window, len(made.prompt_ids) - 1)))[: len(made.ids)]
        for window, made in enumerate(found)
    ]


def _two(logp: torch.Tensor, made: Generated) -> torch.Tensor:
    """The likeliest tokens and those that were chosen, [count, 2]."""
    return torch.stack([logp.argmax(1), torch.tensor(made.ids, device=logp.device)], 1)


def _regret(logp: torch.Tensor, made: Generated) -> float:
    """By how many nats the worst choice falls short."""
    likeliest, chosen = logp.gather(1, _two(logp, made)).unbind(1)
    return float((likeliest - chosen).max())


def _noise(exact: torch.Tensor, rounded: torch.Tensor, made: Generated) -> float:
    """How far ln p of these tokens are from each other at most, in nats."""
    both = _two(exact, made)
    return float((rounded.gather(1, both) - exact.gather(1, both)).abs().max())
