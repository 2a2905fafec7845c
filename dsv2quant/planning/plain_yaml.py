"""YAML as people write it by hand: lists, mappings and words. Files come from anywhere, so what could make small text
large (anchors, aliases, nesting) is refused before it is built, and every scalar is text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from dsv2quant.errors import InputError
from dsv2quant.storage.files import check_pointer

MAX_BYTES = 64 << 10
_MAX_DEPTH = 6  # a list of patterns in a rule in the list of rules in a recipe is 4 deep


def read(path: str | Path) -> str:
    """The text of a YAML file. Raises InputError where it is none."""
    fix = "give a YAML file"
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text: {error.reason} at byte {error.start}"
        raise InputError(what, where=path, fix=fix) from None
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", where=path, fix=fix) from None
    check_pointer(content, Path(path))
    if len(content) > MAX_BYTES:
        raise InputError(f"larger than {MAX_BYTES:,} bytes", where=path, fix="give a YAML recipe")
    return text


def parse(text: str, where: object, advice: str) -> Any:
    """Lists, dicts and text (None for null) of plain YAML; `where` names it in errors, `advice` says what helps. Raises
    InputError for what is none, and for a key that is there twice."""
    try:
        _check_plain(text, where, advice)
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: PyYAML reading numbers and escapes
        raise InputError(f"not valid YAML: {error}", where=where, fix=advice) from None
    return _content(node, where, advice)


def _check_plain(text: str, where: object, advice: str) -> None:
    """Refuse what a recipe needs not and could make small text large: anchors, aliases, tags, and lists in lists in
    lists. Looks at one event at a time, so that nothing is built before it is refused."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        if isinstance(event, yaml.NodeEvent) and (event.anchor or getattr(event, "tag", None)):
            found = "an anchor or alias" if event.anchor else "a tag"
            raise InputError(f"{found}, and recipes are plain YAML", where=_at(event, where), fix="write it out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise InputError("nested too deeply", where=where, fix=advice)


def _content(node: yaml.Node | None, where: object, advice: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_content(item, where, advice) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        content: dict[str, Any] = {}
        for key_node, value in node.value:
            key, at = key_node.value, _at(key_node, where)
            if not isinstance(key, str):
                raise InputError("a key that is no word", where=at, fix=advice)
            if key in content:
                raise InputError(f"the key {short(key)} is there twice", where=at, fix="remove one")
            content[key] = _content(value, where, advice)
        return content
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if node is None or (plain and node.value in ("", "~", "null", "Null", "NULL")):
        return None
    return node.value


def _at(found: yaml.Event | yaml.Node, where: object) -> str:
    mark = found.start_mark
    return f"{where}, line {mark.line + 1}" if mark else str(where)


def known_keys(raw: Any, keys: Collection[str], where: object) -> None:
    """Raise InputError for what is no mapping, or has another key."""
    if not isinstance(raw, Mapping):
        raise InputError("not a mapping", where=where, fix=f"keys: {', '.join(sorted(keys))}")
    unknown = sorted(str(key) for key in raw if key not in keys)
    if unknown:
        raise InputError(f"unknown key {short(unknown[0])}", where=where, fix=f"keys: {', '.join(sorted(keys))}")


def short(value: object) -> str:
    """A value as messages quote it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
