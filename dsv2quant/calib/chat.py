"""Chats as text, by the template that a checkpoint brings along."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2quant.errors import InputError
from dsv2quant.files import MAX_CARRIED_BYTES, read_text
from dsv2quant.headers import read_json

if TYPE_CHECKING:
    from dsv2quant.checkpoint import Checkpoint
    from dsv2quant.formats.gguf.container import Metadata

_WITHOUT = "give plain text, or use a checkpoint that has one"
Render = Callable[[list[dict[str, Any]], object], str]


def renderer(folder: Path, *, generation_prompt: bool = False) -> Render:
    """render(messages, where) → text: what transformers' apply_chat_template(messages, tokenize=False) gives, with
    add_generation_prompt as `generation_prompt` says.

    The template is a downloaded program that nobody vouches for: it runs in Jinja's sandbox. Raises InputError where
    the folder has no template or a broken one; so does render, naming `where`, when the template fails or refuses.
    """
    return _renderer(*_template(folder), generation_prompt)


def renderer_of(checkpoint: Checkpoint, *, generation_prompt: bool = False) -> Render:
    """`renderer` of a checkpoint: its folder's, or that of a GGUF file."""
    if checkpoint.metadata is not None:
        return _renderer(*_gguf_template(checkpoint.metadata, checkpoint.model), generation_prompt)
    assert checkpoint.folder is not None
    return renderer(checkpoint.folder, generation_prompt=generation_prompt)


def _renderer(source: str, path: object, tokens: dict[str, str], generation_prompt: bool) -> Render:
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes HTML
    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(source)
    except Exception as error:  # noqa: BLE001 - deep nesting, for one, is no TemplateSyntaxError
        raise InputError(f"broken chat template: {error}", where=path, fix="download it again") from None

    def render(messages: list[dict[str, Any]], where: object) -> str:
        try:
            # None, as transformers gives them: templates ask `tools is not none`.
            given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": generation_prompt}
            return template.render(**given, **tokens)
        except Exception as error:  # noqa: BLE001 - a program of somebody else's fails in any way
            what = f"the chat template fails: {type(error).__name__}: {error}"
            raise InputError(what, where=where, fix="it may want other roles or another order") from None

    return render


def _template(folder: Path) -> tuple[str, Path, dict[str, str]]:
    """The default template, the file it is in, and the BOS and EOS tokens that it may name."""
    path, config_path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.exists() else {}
    source: Any
    if path.exists():  # it wins in transformers too
        source = read_text(path, MAX_CARRIED_BYTES)
    else:
        path, source = config_path, config.get("chat_template")
    if isinstance(source, list):
        entries = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = entries[0].get("template") if entries else None
    if not isinstance(source, str):
        raise InputError("no chat template", where=path, fix=_WITHOUT)
    tokens = {}
    for key in ("bos_token", "eos_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):  # a missing one is undefined and prints nothing, None would print "None"
            tokens[key] = token
    return source, path, tokens


def _gguf_template(metadata: Metadata, where: object) -> tuple[str, object, dict[str, str]]:
    """The same of a GGUF file."""
    keys = ("chat_template", "ggml.tokens", "ggml.bos_token_id", "ggml.eos_token_id")
    source, vocabulary, *ids = (
        metadata[f"tokenizer.{key}"].value if f"tokenizer.{key}" in metadata else None for key in keys
    )
    if not isinstance(source, str):
        raise InputError("no chat template", where=where, fix=_WITHOUT)
    tokens = {}
    for name, number in zip(("bos_token", "eos_token"), ids, strict=True):
        if isinstance(vocabulary, list) and isinstance(number, int) and 0 <= number < len(vocabulary):
            tokens[name] = str(vocabulary[number])
    return source, where, tokens
