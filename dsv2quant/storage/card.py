"""A model card as a file, README.md: whose it is, and what repository its commands name.

A card that is made here ends in the sha256 of all before it: one that a person edited has another, and is not written
over. Until it is pushed its commands name the repository OWNER/NAME.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

from dsv2quant.storage.durable import disk_errors, is_regular, write_whole
from dsv2quant.storage.files import read_bytes

MAX_CARD_BYTES = 16 << 20
REPO = "OWNER/NAME"
_SEAL = "<!-- dsv2quant, sha256 of the above: {} -->\n"
_SEALED = re.compile(rb"(.*)<!-- dsv2quant, sha256 of the above: ([0-9a-f]{64}) -->\n", re.DOTALL)


def sealed(content: bytes) -> bytes:
    """A card, with the line that says that it is as it was made."""
    return content + _SEAL.format(hashlib.sha256(content).hexdigest()).encode()


def is_persons(path: Path) -> bool:
    """Whether a card lies there that is not as it was written here: a person's, or edited by one."""
    return is_regular(path) and _made(read_bytes(path, MAX_CARD_BYTES)) is None


def write_card(path: Path, card: bytes) -> bool:
    """Write a card, unless a person's lies there; whether it did. Raises InputError where the disk fails."""
    if is_persons(path):
        return False
    with disk_errors(path):
        write_whole(path, [card])
    return True


def addressed(card: bytes, repo: str) -> bytes:
    """A card whose commands name `repo`."""
    return changed(card, lambda content: content.replace(REPO.encode(), repo.encode()))


def changed(card: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A card whose content is another. A person's stays a person's."""
    content = _made(card)
    return change(card) if content is None else sealed(change(content))


def _made(card: bytes) -> bytes | None:
    """What is before the seal of a card that is as it was made; None of every other."""
    found = _SEALED.fullmatch(card)
    return None if found is None or hashlib.sha256(found[1]).hexdigest() != found[2].decode() else found[1]
