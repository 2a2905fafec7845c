"""What was verified of an artifact, recorded beside its manifest: `dsv2quant-verify.json` in its folder, or
`NAME.gguf.verify.json` beside a GGUF file.

The record names the manifest's own sha256. The manifest has the hash of every file, so the record speaks of exactly
these bytes: of an artifact that was converted again, or replaced, it says nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv2quant.errors import InputError
from dsv2quant.storage.durable import MANIFEST_FILE, dump_json, hash_file, is_regular, write_whole
from dsv2quant.storage.safetensors import read_json
from dsv2quant.version import __version__

logger = logging.getLogger(__name__)
VERIFIED_FILE = "dsv2quant-verify.json"
SCHEMA = "dsv2quant.verified/1"


def record_path(manifest: Path) -> Path:
    """Where the record of a manifest's artifact lies."""
    if manifest.name == MANIFEST_FILE:
        return manifest.with_name(VERIFIED_FILE)
    return manifest.with_name(f"{manifest.name.removesuffix('.json')}.verify.json")


def recorded(manifest: Path) -> dict[str, dict[str, Any]]:
    """What an artifact was held against, {"source" or an engine: what came of it}; empty where there is no record, or
    one of another manifest."""
    path = record_path(manifest)
    if not is_regular(path) or not is_regular(manifest):
        return {}
    try:
        record = read_json(path)
    except InputError:
        return {}
    against = record.get("against")
    covers = record.get("schema") == SCHEMA and record.get("manifest") == hash_file(manifest)["sha256"]
    return against if covers and isinstance(against, dict) else {}


def record_content(manifest: str, against: Mapping[str, Any]) -> bytes:
    """A record's content; `manifest` is the sha256 of the one that it speaks of."""
    return dump_json({"schema": SCHEMA, "manifest": manifest, "against": against})


def record(manifest: Path, against: str, found: Mapping[str, Any]) -> None:
    """Note that an artifact was held against its "source", or in an engine against the runtime, and stood the test.
    Nothing is noted of what has no manifest of its own there, as in the hub's cache; where nothing can be written that
    is logged: the artifact is as good without the note."""
    if not is_regular(manifest):
        return
    entry = {"dsv2quant": __version__, **found}
    path = record_path(manifest)
    try:
        write_whole(path, [record_content(hash_file(manifest)["sha256"], recorded(manifest) | {against: entry})])
    except OSError as error:
        logger.warning("%s: can't note that it was verified: %s", path, error.strerror)
