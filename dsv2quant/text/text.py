"""Texts: a file, wikitext-2, or Python's own help topics, which are on every machine; and files of records, .jsonl and
.json, which hold texts, and chats as OpenAI's and ShareGPT's files have them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dsv2quant.errors import InputError
from dsv2quant.storage.files import check_pointer
from dsv2quant.text.chat import Chat

DATASETS = ("wikitext2",)
StrPath = str | os.PathLike[str]
_UTF8 = "give a UTF-8 text file: iconv -f UTF-16 -t UTF-8 makes one of Windows' Unicode"
SUFFIXES = (".jsonl", ".json")
_FORMS = "a record has one of 'text' (a string), 'messages' or 'conversations' (lists), or 'prompt' and 'completion'"
# Roles by the names that files give them. A template knows 'system', 'user', 'assistant' and perhaps 'tool', and may
# leave out in silence what it doesn't know.
_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "developer": "system",
    "function": "tool", "observation": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A text, where it comes from, and the hash that says whether two measurements scored the same one."""

    source: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def from_file(path: StrPath, lines: int | None = None) -> Text:
    """A UTF-8 text file, or its first `lines`. Raises InputError for one that can't be read or is none: NUL is in
    UTF-16 and binary files."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            content = file.read() if lines is None else "".join(islice(file, lines))
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", where=path, fix="give a UTF-8 text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"can't be read: {error}", where=path, fix=_UTF8) from None
    check_pointer(content[:64].encode(), Path(path))
    if "\0" in content:
        raise InputError("holds NUL characters, which no text has", where=path, fix=_UTF8)
    return Text(Path(path).name, content)


def python_topics() -> Text:
    """`pydoc_data.topics` of the running Python: every topic in order of its key, joined by blank lines."""
    from pydoc_data.topics import topics

    return Text("pydoc_data.topics", "\n\n".join(topics[key] for key in sorted(topics)))


def from_dataset(name: str, cache_dir: StrPath | None = None, offline: bool = False) -> Text:
    """A dataset from the hub. wikitext2 is the raw test split, its lines joined as every published figure has them."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError("needs pyarrow", where=f"--dataset {name}", fix="pip install 'dsv2quant[datasets]'") from None
    from huggingface_hub import errors, hf_hub_download

    try:
        path = hf_hub_download(
            "Salesforce/wikitext",
            "wikitext-2-raw-v1/test-00000-of-00001.parquet",
            repo_type="dataset",
            cache_dir=cache_dir,
            local_files_only=offline,
        )
    except (errors.HTTPError, errors.EntryNotFoundError, OSError) as error:
        fix = "download it once with a connection, or give --text FILE"
        raise InputError(f"can't be downloaded: {error}", where=f"--dataset {name}", fix=fix) from None
    lines = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    return Text(name, "\n\n".join(lines))


def records(path: str, content: str) -> Iterator[str | Chat]:
    """The text or chat of each record. Raises InputError naming the file and the line or record, and the message, that
    is wrong."""
    for value, where in objects(path, content):
        yield record(value, where)


def objects(path: str, content: str) -> Iterator[tuple[Any, str]]:
    """(record as it stands there, which one it is): a line of its own, or a member of one JSON list; blank lines are
    none. Raises InputError for what is no JSON."""
    if path.lower().endswith(".json") and content.lstrip()[:1] == "[":
        for number, value in enumerate(_parsed(content, path), 1):
            yield value, f"{path}, record {number}"
        return
    # Not splitlines(): it breaks at U+2028 too, which JSON strings may hold.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _parsed(line, where), where


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what = str(error) if "\n" in text.strip() else str(error).replace("line 1 ", "")  # of this line, not the file
        raise InputError(f"not valid JSON: {what}", where=where, fix="one object a line, or one list") from None


def record(value: Any, where: str) -> str | Chat:
    """The text or chat of one record. Raises InputError naming `where` it is, and the message that is wrong."""
    if not isinstance(value, dict):
        raise InputError("not an object", where=where, fix=_FORMS)
    held = [key for key in ("text", "messages", "conversations", "prompt") if value.get(key) is not None]
    if len(held) != 1:
        raise InputError(f"has {' and '.join(held) or 'no text'}", where=where, fix=_FORMS)
    match value:
        case {"text": str(text)}:
            return _unicode(text, where)
        case {"prompt": str(prompt), "completion": str(completion)}:
            return _unicode(prompt + completion, where)
        case {"messages": [_, *_] as found} | {"conversations": [_, *_] as found}:
            return _chat(found, value, where)
        case {"prompt": [_, *_] as prompt, "completion": [*completion]}:
            return _chat([*prompt, *completion], value, where)
    raise InputError(f"its {held[0]!r} is not what it must be", where=where, fix=_FORMS)


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"not valid Unicode: {error.reason}", where=where, fix="surrogates are pairs") from None
    return text


def _chat(found: list[Any], record: dict[str, Any], where: str) -> Chat:
    system = record.get("system")  # ShareGPT's own place for it
    if isinstance(system, str) and system:
        found = [{"role": "system", "content": system}, *found]
    messages = [_message(message, f"{where}, message {number}") for number, message in enumerate(found, 1)]
    _unicode(json.dumps(messages, ensure_ascii=False), where)
    return Chat(messages, where, _tools(record.get("tools"), where), tuple(_variants(messages)))


def _message(message: Any, where: str) -> dict[str, Any]:
    match message:
        case {"role": str(role)}:
            rest = {key: value for key, value in message.items() if key not in ("role", "content")}
            content = message.get("content")
        case {"from": str(role), "value": content}:
            rest = {}
        case _:
            raise InputError("has no role", where=where, fix="a message has a 'role' and a 'content'")
    if isinstance(content, list):
        content = "\n".join(_part(part, where) for part in content)  # as vLLM joins them
    calls = rest.get("tool_calls")
    if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise InputError("its 'tool_calls' are not a list of objects", where=where, fix="as in OpenAI's files")
    if not isinstance(content, str) and not (content is None and calls):
        what = "has no content" if content is None else f"its content is {content!r:.40}"
        raise InputError(what, where=where, fix="text, or a list of parts of text; none only beside tool_calls")
    return {"role": _ROLES.get(role, role), "content": content, **rest}


def _part(part: Any, where: str) -> str:
    match part:
        case str(text) | {"type": "text", "text": str(text)}:
            return text
    kind = part.get("type") if isinstance(part, dict) else part
    raise InputError(f"a part of its content is {kind!r:.40}", where=where, fix="the model takes text only")


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """What the model may call; some files hold it as JSON in a string. An empty list is none."""
    if isinstance(tools, str):
        tools = _parsed(tools, f"{where}, tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError("its 'tools' are not a list of objects", where=where, fix="as in OpenAI's files")
    return tools


def _variants(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The same messages for templates that add up strings: without content as "", a call's arguments as JSON in a
    string (as OpenAI has them) where they are objects (as transformers wants them), and the other way round."""
    if not any(message.get("tool_calls") for message in messages):
        return
    filled = [message | {"content": message["content"] or ""} for message in messages]
    yield filled
    for given in (messages, filled):
        yield [
            message | {"tool_calls": [_other_arguments(call) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in given
        ]


def _other_arguments(call: Any) -> Any:
    match call:
        case {"function": {"arguments": str(arguments)}}:
            try:
                other: Any = json.loads(arguments)
            except (ValueError, RecursionError):
                return call
        case {"function": {"arguments": dict(arguments)}}:
            other = json.dumps(arguments, ensure_ascii=False)
        case _:
            return call
    return call | {"function": call["function"] | {"arguments": other}}
