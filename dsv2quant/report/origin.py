"""Which model an artifact was made of, for its card: its id on the hub, and what its own card says of licence and
language."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from dsv2quant.checkpoint.checkpoint import Checkpoint, HfCheckpoint
from dsv2quant.storage.card import MAX_CARD_BYTES
from dsv2quant.storage.files import read_bytes

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{4,64})")  # how the hub's cache keeps a model
_CARRIED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Origin:
    """A base model: its `id` on the hub, None where nothing says it; what people call it; the hub's commit; the keys of
    its own card that hold for the artifact too; and the text of that card."""

    id: str | None
    name: str
    revision: str | None
    carried: dict[str, Any]
    pipeline_tag: str | None
    text: str


def origin(checkpoint: Checkpoint, base_model: str | None = None) -> Origin:
    """Of a checkpoint. Its id is `base_model` where that is given, else what it was downloaded by, the repository that
    its folder is a snapshot of, or the base model that its own card names. Raises InputError by the rules of
    `read_bytes`."""
    front, text = _read(source_card(checkpoint))
    repo, revision = _downloaded(checkpoint)
    named = front.get("base_model")
    found = base_model or repo or next((x for x in _texts(named) if ID.fullmatch(x)), None)
    tag = front.get("pipeline_tag")
    return Origin(
        id=found,
        name=found or checkpoint.model,
        revision=revision if found == repo else None,
        carried={key: front[key] for key in _CARRIED if _texts(front.get(key))},
        pipeline_tag=tag if isinstance(tag, str) else None,
        text=text.strip(),
    )


def source_card(checkpoint: Checkpoint) -> bytes | None:
    """The source's own model card, if it has one. Raises InputError by the rules of `read_bytes`."""
    card = checkpoint.file("README.md")
    return None if card is None else read_bytes(card, MAX_CARD_BYTES)


def _downloaded(checkpoint: Checkpoint) -> tuple[str | None, str | None]:
    """(id, commit) of a model of the hub."""
    if checkpoint.revision is not None:
        return checkpoint.model, checkpoint.revision
    folder = checkpoint.folder if isinstance(checkpoint, HfCheckpoint) else None
    snapshot = None if folder is None else _SNAPSHOT.fullmatch("/".join(folder.resolve().parts[-3:]))
    return (None, None) if snapshot is None else (f"{snapshot[1]}/{snapshot[2]}", snapshot[3])


def _read(card: bytes | None) -> tuple[dict[str, Any], str]:
    """A card's metadata, every scalar a text, nothing where it has none that can be read; and what is behind it."""
    # With a byte order mark and line ends of any kind, as the hub takes it.
    text = (card or b"").decode("utf-8-sig", "replace").replace("\r\n", "\n")
    parts = re.split("^---[ \t]*\n", text, maxsplit=2, flags=re.M)
    if len(parts) < 3 or parts[0].strip():
        return {}, text
    try:
        front = yaml.load(parts[1], yaml.BaseLoader)  # a language is "no"
    except (yaml.YAMLError, RecursionError):
        return {}, parts[2]
    return front if isinstance(front, dict) else {}, parts[2]


def _texts(value: object) -> list[str]:
    """A text, or a list of them, as a list; of all else nothing."""
    found = value if isinstance(value, list) else [value]
    return [item for item in found if isinstance(item, str)] if all(isinstance(x, str) for x in found) else []
