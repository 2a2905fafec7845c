"""How a model is asked, for its card: the prompt that its chat template makes, and how tokens are drawn."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from functools import cache
from pathlib import Path

from dsv2quant.errors import InputError, printable
from dsv2quant.storage.safetensors import read_json
from dsv2quant.text.chat import Chat, Templates

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_LONGEST = 2000  # characters of a prompt that a card shows
_SYSTEM, _USER = "{system prompt}", "{prompt}"


def has_template(carried: Mapping[str, bytes]) -> bool:
    """Whether a model chats, as far as names of its files and its tokenizer's configuration tell."""
    in_config = b'"chat_template"' in carried.get("tokenizer_config.json", b"")
    return in_config or any(name.startswith("chat_template") for name in carried)


def prompt_format(folder: Path | None) -> str | None:
    """The prompt that a folder's chat template makes of a system prompt, where it takes one, and a question; None where
    there is no template, or one that fails, names the day, or writes a long text."""
    if folder is None:
        return None
    try:
        templates = Templates.of_folder(folder)
        return _rendered(templates.choose(False), tuple(templates.tokens.items()))
    except InputError:
        return None  # a card doesn't decide over a conversion; whoever chats is told


@cache  # a program is run for it, and a release has many cards of one model
def _rendered(template: str, tokens: tuple[tuple[str, str], ...]) -> str | None:
    if "strftime_now" in template:
        return None
    question = {"role": "user", "content": _USER}
    chat = Chat([{"role": "system", "content": _SYSTEM}, question], "the model card", variants=([question],))
    (text,) = Templates({"default": template}, "the model card", dict(tokens)).render([chat], generation_prompt=True)
    return printable(text) if _USER in text and len(text) <= _LONGEST else None


def sampling(folder: Path | None, carried: Container[str]) -> dict[str, float]:
    """What generation_config.json, if a model's files have one, says of how tokens are drawn. Engines heed it, and a
    GGUF file has it as metadata."""
    if folder is None or "generation_config.json" not in carried:
        return {}
    try:
        found = read_json(folder / "generation_config.json")
    except InputError:
        return {}
    values = {name: found[name] for name in SAMPLING if type(found.get(name)) in (int, float)}
    return {name: value for name, value in values.items() if math.isfinite(value)}
