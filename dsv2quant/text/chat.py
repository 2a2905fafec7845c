"""Chats as text, by the template that a checkpoint brings along.

A program of its own that renders chats: chat.py starts it, and the system ends it where it takes too much.

A chat template is a downloaded program that nobody vouches for. Jinja's sandbox keeps it from the machine but not from
endless loops and strings of gigabytes, most of which are single operations in C that nothing in Python interrupts.

stdin: a line of JSON, {"template", "seconds", "memory", "characters"}, then one for each chat: a list of variables'
sets to try in turn. stdout: a line for each chat, {"text"}; the last may be {"error"}, or {"broken"}, if no template.
"""

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
from dsv2quant.text.tokenizer_file import SETTINGS, read_settings, token_of

if TYPE_CHECKING:
    from dsv2quant.checkpoint.checkpoint import Checkpoint
    from dsv2quant.storage.gguf import Metadata
import resource
from collections.abc import Callable
from datetime import datetime

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

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
    def of(cls, checkpoint: Checkpoint) -> Templates:
        """Those of its folder, or of a GGUF file."""
        if checkpoint.metadata is not None:
            return cls._of_gguf(checkpoint.metadata, checkpoint.model)
        assert checkpoint.folder is not None
        return cls.of_folder(checkpoint.folder)

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
    def _of_gguf(cls, metadata: Metadata, where: object) -> Templates:
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


_LONGEST = 1000  # characters of an error


class _Generation(Extension):
    """{% generation %} marks what the model itself said: for training, and nothing here."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Callable[[], str]) -> str:
        return caller()


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up (utils/chat_template_utils.py)."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML

    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    found.filters["tojson"] = tojson
    found.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return found


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> None:
    """Render what stdin holds."""
    first = json.loads(sys.stdin.readline())
    _limit(resource.RLIMIT_CPU, first["seconds"])
    _limit(resource.RLIMIT_AS, first["memory"])
    _limit(resource.RLIMIT_CORE, 0)
    left = first["characters"]
    try:
        template = environment().from_string(first["template"])
    except MemoryError:
        raise  # the end of this program
    except Exception as error:  # noqa: BLE001 - deep nesting, for one, is no TemplateSyntaxError
        print(json.dumps({"broken": str(error)[:_LONGEST]}))
        return
    for line in sys.stdin:
        answer: dict[str, str] = {}
        for given in json.loads(line):
            try:
                answer = {"text": template.render(**given)}
                break
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - a program of somebody else's fails in any way
                answer = answer or {"error": f"{type(error).__name__}: {error}"[:_LONGEST]}
        left -= len(answer.get("text", ""))
        if left < 0:
            answer = {"error": f"it writes more than {first['characters']:,} characters"}
        print(json.dumps(answer), flush=True)
        if "error" in answer:
            return


if __name__ == "__main__":
    main()
