"""Chats as text, by the template that a checkpoint brings along."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2quant.errors import InputError
from dsv2quant.storage.files import MAX_CARRIED_BYTES, TEMPLATES, read_text
from dsv2quant.storage.safetensors import read_json
from dsv2quant.text.tokenizer import SETTINGS, read_settings, token_of

if TYPE_CHECKING:
    from dsv2quant.storage.gguf import Metadata

FILE = "chat_template.jinja"
# What a template may take: seconds of a processor, and 10 ms more for each chat; bytes; characters of a text, which 64
# for each that it is given come on top of.
CPU_SECONDS, MEMORY, CHARACTERS = 10, 1 << 30, 1 << 24
_PROGRAM = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
_WITHOUT = "give plain text, or use a checkpoint that has one"
_ORDER = "it may want other roles or another order"


@dataclass(frozen=True)
class Chat:
    """Messages as templates take them, {"role", "content", ...} each, and what the model may call; `where` names it.

    `variants` are other spellings of the messages, for templates that fail on these."""

    messages: list[dict[str, Any]]
    where: object
    tools: list[dict[str, Any]] | None = None
    variants: tuple[list[dict[str, Any]], ...] = ()


@dataclass(frozen=True)
class Templates:
    """A checkpoint's chat templates by name, where they are from, and the BOS and EOS tokens that they may name."""

    named: Mapping[str, str]
    where: object
    tokens: Mapping[str, str]

    @classmethod
    def of_folder(cls, folder: Path) -> Templates:
        """A folder's. Raises InputError for a damaged file."""
        settings = read_settings(folder)
        # A missing token is undefined and prints nothing, None would print "None".
        tokens = {name: found for name in ("bos_token", "eos_token") if (found := token_of(settings, name)) is not None}
        source = template_source(folder, settings)
        where = folder / (FILE if (folder / FILE).exists() else SETTINGS)
        if source is None or isinstance(source, str):
            return cls({} if source is None else {"default": source}, where, tokens)
        named = {}
        for entry in source if isinstance(source, list) else [source]:
            match entry:
                case {"name": str(name), "template": str(text)}:
                    named[name] = text
                case _:
                    what = f"a chat template is {entry!r:.60}"
                    raise InputError(what, where=where, fix="it must be text, or a list of names and templates")
        return cls(named, where, tokens)

    @classmethod
    def of_gguf(cls, metadata: Metadata, where: object) -> Templates:
        """A GGUF file's."""

        def value(key: str) -> Any:
            return metadata[f"tokenizer.{key}"].value if f"tokenizer.{key}" in metadata else None

        keys = {"default": "chat_template", "tool_use": "chat_template.tool_use"}
        named = {name: text for name, key in keys.items() if isinstance(text := value(key), str)}
        vocabulary, tokens = value("ggml.tokens"), {}
        for name in ("bos", "eos"):
            number = value(f"ggml.{name}_token_id")
            if isinstance(vocabulary, list) and isinstance(number, int) and 0 <= number < len(vocabulary):
                tokens[f"{name}_token"] = str(vocabulary[number])
        return cls(named, where, tokens)

    def choose(self, tools: bool) -> str:
        """The template for a chat with or without tools, as transformers chooses. Raises InputError without one."""
        names = ("tool_use", "default") if tools else ("default",)
        found = next((self.named[name] for name in names if name in self.named), None)
        if found is None:
            raise InputError("no chat template", where=self.where, fix=_WITHOUT)
        return found

    def render(self, chats: Sequence[Chat], *, generation_prompt: bool = False) -> list[str]:
        """What transformers' apply_chat_template(messages, tools, tokenize=False) gives for each chat, with
        add_generation_prompt as `generation_prompt` says. strftime_now is today's date, as there.

        Raises InputError where there is no template or a broken one, and, naming the chat, where it fails, refuses, or
        takes more time or memory than a template can need."""
        texts: dict[int, str] = {}
        for with_tools in (False, True):
            numbers = [i for i, chat in enumerate(chats) if (chat.tools is not None) is with_tools]
            if numbers:
                group = [chats[i] for i in numbers]
                texts |= zip(numbers, self._run(self.choose(with_tools), group, generation_prompt), strict=True)
        return [texts[i] for i in range(len(chats))]

    def _run(self, template: str, chats: list[Chat], generation_prompt: bool) -> list[str]:
        # None, as transformers gives them: templates ask `tools is not none`.
        common = {"documents": None, "add_generation_prompt": generation_prompt, **self.tokens}
        lines = [
            json.dumps([{"messages": m, "tools": chat.tools, **common} for m in (chat.messages, *chat.variants)])
            for chat in chats
        ]
        head = {
            "template": template, "seconds": CPU_SECONDS + len(chats) // 100, "memory": MEMORY,
            "characters": CHARACTERS + 64 * sum(map(len, lines)),
        }  # fmt: skip
        command = [sys.executable, "-c", _PROGRAM, str(Path(__file__).with_name("rendering.py")), *sys.path]
        given = "\n".join([json.dumps(head), *lines])
        ran = subprocess.run(command, input=given, capture_output=True, encoding="utf-8", check=False)
        texts = []
        for chat, line in zip(chats, ran.stdout.splitlines(), strict=False):
            match json.loads(line):
                case {"text": str(text)}:
                    texts.append(text)
                case {"broken": why}:
                    raise InputError(f"broken chat template: {why}", where=self.where, fix="download it again")
                case {"error": why}:
                    raise InputError(f"the chat template fails: {why}", where=chat.where, fix=_ORDER)
        if len(texts) < len(chats):
            if ran.returncode >= 0 and "MemoryError" not in ran.stderr:
                raise RuntimeError(f"rendering failed: {ran.stderr}")
            timed = ran.returncode == -signal.SIGXCPU
            what = f"the chat template takes {f'over {CPU_SECONDS} s' if timed else 'too much memory'}"
            raise InputError(what, where=chats[len(texts)].where, fix="no template of a model needs so much")
        return texts


def template_source(folder: Path, settings: Mapping[str, Any]) -> Any:
    """A folder's chat template as transformers finds it: that of chat_template.jinja and additional_chat_templates, or
    else of tokenizer_config.json; or of chat_template.json, where llama.cpp's converter looks. Text, a list of
    {"name", "template"}, None; unchecked where a JSON file holds it."""
    files = {"default": folder / FILE} if (folder / FILE).exists() else {}
    files |= {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    found = [{"name": name, "template": read_text(path, MAX_CARRIED_BYTES)} for name, path in files.items()]
    if not found:
        legacy = folder / "chat_template.json"
        return settings.get("chat_template", read_json(legacy).get("chat_template") if legacy.exists() else None)
    return found[0]["template"] if list(files) == ["default"] else found
