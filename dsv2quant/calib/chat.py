"""Chats as text, by the template that a checkpoint brings along."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dsv2quant.errors import InputError
from dsv2quant.evaluate.text import from_file
from dsv2quant.headers import read_json


def renderer(folder: Path, *, generation_prompt: bool = False) -> Callable[[list[dict[str, Any]], object], str]:
    """render(messages, where) → text: what transformers' apply_chat_template(messages, tokenize=False) gives, with
    add_generation_prompt as `generation_prompt` says.

    The template is a downloaded program that nobody vouches for: it runs in Jinja's sandbox. Raises InputError where
    the folder has no template or a broken one; so does render, naming `where`, when the template fails or refuses.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    source, path, tokens = _template(folder)
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
        source = from_file(str(path)).content
    else:
        path, source = config_path, config.get("chat_template")
    if isinstance(source, list):
        entries = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = entries[0].get("template") if entries else None
    if not isinstance(source, str):
        fix = "give 'text', or use a checkpoint that has a chat template"
        raise InputError("no chat template, which 'messages' need", where=path, fix=fix)
    tokens = {}
    for key in ("bos_token", "eos_token"):
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):  # a missing one is undefined and prints nothing, None would print "None"
            tokens[key] = token
    return source, path, tokens
