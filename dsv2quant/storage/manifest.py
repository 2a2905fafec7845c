"""The manifest of an artifact, `dsv2quant.json` in its folder or `NAME.gguf.json` beside a GGUF file: which files it
has, their sizes and hashes, and what it was made from.

Its last key, `digest`, is the sha256 of the file as it would be without that key: no byte of it changes unseen.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from dsv2quant.errors import InputError
from dsv2quant.storage.durable import dump_json, is_regular
from dsv2quant.storage.files import TEMPLATES, check_link, is_artifact_path
from dsv2quant.storage.safetensors import read_json

SCHEMAS = ("dsv2quant.manifest/", "dsv2quant.gguf-manifest/")  # in whichever version
DIGEST = "digest"
CARD_FILE = "README.md"  # its reader's to edit: it doesn't say whether an artifact is whole
PICTURES = "figures"  # a folder of what the card shows, beside it; no manifest lists them
TEXTS = (CARD_FILE, "LICENSE*")  # for people, who may edit them
# What consumers load by its name when it lies in a model's folder: weights, code, tokenizers, templates, and
# configurations (transformers 5, vLLM 0.33, SGLang 0.5).
LOADED = (
    "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.gguf",
    "*.py", "*.jinja", "*chat_template*", "tokenizer*", "*.model", "tekken.json", "vocab*", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "*config.json", "params.json", "modules.json", "dsv2quant.folds",
)  # fmt: skip
_SHA256 = re.compile("[0-9a-f]{64}")
_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}\.gguf")


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with its digest."""
    return dict(content) | {DIGEST: hashlib.sha256(dump_json(content)).hexdigest()}


def gguf_manifest(path: Path) -> Path:
    """Where the manifest of a GGUF file lies, given the file or the first that it was split into."""
    split = _SPLIT.fullmatch(path.name)
    return path.with_name(f"{split[1]}.gguf.json" if split else f"{path.name}.json")


def gguf_stem(name: str) -> str:
    """The name of a GGUF file, or of the one that it is a part of, without its suffix."""
    split = _SPLIT.fullmatch(name)
    return split[1] if split else name.removesuffix(".gguf")


def own_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest of ours, which lists files of its folder, be it sealed or not; None where there is none."""
    if not is_regular(path):
        return None
    try:
        manifest = read_json(path)
    except InputError:
        return None
    files, schema = manifest.get("files"), str(manifest.get("schema"))
    ours = (
        schema.startswith(SCHEMAS) and isinstance(files, dict) and all(is_inside(path.parent, name) for name in files)
    )
    return manifest if ours else None


def is_inside(folder: Path, name: str) -> bool:
    """Whether an artifact in `folder` may hold a file of this name, and no link leads from there to elsewhere."""
    return is_artifact_path(name) and (folder / name).parent.resolve().is_relative_to(folder.resolve())


def read_manifest(path: Path) -> dict[str, Any]:
    """A manifest, whose `files` are then {name: {"size", "sha256"}} of plain names. Raises InputError where it is not
    as it was written, or lists no files."""
    manifest = read_json(path)
    again = "get it again, or convert again with --force"
    if not str(manifest.get("schema")).startswith("dsv2quant."):
        raise InputError("is no manifest of dsv2quant's", where=path, fix=again)
    without = {key: value for key, value in manifest.items() if key != DIGEST}
    if DIGEST not in manifest:
        raise InputError(f"has no {DIGEST} of its own: it was changed, or is an early version's", where=path, fix=again)
    if sealed(without) != manifest or dump_json(manifest) != path.read_bytes():
        raise InputError("was changed: its digest is another", where=path, fix=again)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise InputError("lists no files", where=path, fix=again)
    for name, entry in files.items():
        if not is_artifact_path(name):
            raise InputError(f"lists {name!r}, which is outside its folder", where=path, fix=again)
        if not _is_entry(entry):
            raise InputError(f"lists {name} without its size and sha256", where=path, fix=again)
    return manifest


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
        return False
    size, sha256 = entry["size"], entry["sha256"]
    return type(size) is int and size >= 0 and isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None


def check_regular(path: Path, folder: Path) -> None:
    """Raise InputError where a file of an artifact in `folder` is missing, no regular file, or a link out of it."""
    again = "get it again, or convert again"
    try:
        found = path.stat()
    except OSError as error:
        missing = "is missing" if isinstance(error, FileNotFoundError) else f"can't be read: {error.strerror}"
        raise InputError(f"{path.name} {missing}", where=path.parent, fix=again) from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError("is no regular file", where=path, fix=again)
    check_link(path, folder)


def beside(folder: Path, listed: Container[str]) -> tuple[list[str], list[str]]:
    """(names of LOADED, all other names) in a folder that a manifest does not list, but for the card's pictures."""
    names = set(os.listdir(folder)) - {TEMPLATES, PICTURES}
    if (folder / TEMPLATES).is_dir():
        names |= {f"{TEMPLATES}/{name}" for name in os.listdir(folder / TEMPLATES)}
    added = sorted(name for name in names if name not in listed)
    loaded = [name for name in added if is_loaded(name)]
    return loaded, [name for name in added if name not in loaded]


def is_loaded(name: str) -> bool:
    """Whether consumers load a file of this name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in LOADED)


def is_text(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in TEXTS)
