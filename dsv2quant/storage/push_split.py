"""`push --split`: a GGUF file cut while it is sent, and what speaks of it: its manifest, what was verified, the card.

The pieces are llama-gguf-split's (`gguf_split.py`). One at a time lies on disk, beside the whole file. What was
verified of the whole holds for them: every byte of a tensor is the same.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dsv2quant.errors import InputError, UsageError
from dsv2quant.progress import Progress
from dsv2quant.storage.card import changed
from dsv2quant.storage.durable import PARTIAL, FileEntry, disk_errors, dump_json, hash_together, open_locked
from dsv2quant.storage.gguf_split import Piece, pieces
from dsv2quant.storage.manifest import CARD_FILE, DIGEST, read_manifest, sealed
from dsv2quant.storage.verified import record_content, record_path, recorded

Content = Path | bytes | Piece  # of a file of the repository
Room = Callable[[Piece], bytes | Path]  # has a piece where huggingface_hub can read it
SMALL = 10_000_000  # bytes; a file up to this need not be a large one to the hub, which then reads it at the commit


def in_pieces(
    manifest: Path, contents: Mapping[str, Content], limit: int, progress: Progress
) -> tuple[dict[str, Content], dict[str, FileEntry]]:
    """Contents of the repository's files, by name, where the artifact is a GGUF file of more than `limit` bytes of
    tensors, and the manifest entries of its pieces; else contents as they are, and no entry. Raises UsageError where it
    is another artifact, or a tensor alone is larger."""
    listed = read_manifest(manifest)
    name = manifest.name.removesuffix(".json")
    if set(listed["files"]) != {name}:
        fix = "`convert --max-shard-size` cuts what is in a folder; several GGUF files are cut already"
        raise UsageError("--split goes with a single GGUF file", fix=fix)
    cut = pieces(manifest.with_name(name), limit, "--split")
    if len(cut) == 1:
        return dict(contents), {}
    with progress(sum(piece.nbytes for piece in cut), "B", "checksums") as advance:
        entries = dict(zip((piece.name for piece in cut), hash_together(_hashed, cut, advance), strict=True))
    about = {key: value for key, value in listed.items() if key not in ("files", DIGEST)}
    made = dump_json(sealed(about | {"split_from": listed["files"], "files": entries}))
    texts = {manifest.name: made}
    if (record := record_path(manifest).name) in contents:
        texts[record] = record_content(hashlib.sha256(made).hexdigest(), recorded(manifest))
    if CARD_FILE in contents:
        texts[CARD_FILE] = changed(whole(contents[CARD_FILE]), lambda card: _renamed(card, name, entries))
    kept = {other: content for other, content in contents.items() if other != name}
    return {piece.name: piece for piece in cut} | kept | texts, entries


def _hashed(piece: Piece, progress: Callable[[int], object]) -> FileEntry:
    digest = hashlib.sha256()
    for chunk in piece.chunks():
        digest.update(chunk)
        progress(len(chunk))
    return {"size": piece.nbytes, "sha256": digest.hexdigest()}


def _renamed(card: bytes, name: str, entries: Mapping[str, FileEntry]) -> bytes:
    """A card that names the first piece where it named the file, which is what programs are given; all of them where it
    lists files. The command that made the file stays."""
    it = re.escape(name)
    rows = "".join(f"| {piece} | {entry['size'] / 1e9:.2f} GB |\n" for piece, entry in entries.items())
    text = re.sub(rf"(?m)^\| *{it} *\|[^|\n]*\| *\n", lambda _: rows, card.decode(errors="surrogateescape"))
    text = re.sub(rf"(?<![\w.-])(?<!-o ){it}(?![\w-]|\.\w)", next(iter(entries)), text)
    return text.encode(errors="surrogateescape")


def whole(source: Content) -> bytes:
    """The content of a small file."""
    if isinstance(source, Piece):
        return b"".join(source.chunks())
    return source if isinstance(source, bytes) else source.read_bytes()


@contextmanager
def scratch(manifest: Path, sources: Iterable[Content]) -> Iterator[Room]:
    """Room for one piece at a time, in a file beside the whole one that goes in the end. Raises InputError where the
    disk has none, or another run uses it."""
    largest = max((source.nbytes for source in sources if isinstance(source, Piece)), default=0)
    if largest <= SMALL:
        yield whole
        return
    path = manifest.with_name(f"{manifest.name.removesuffix('.json')}.push{PARTIAL}")
    if largest > (free := shutil.disk_usage(path.parent).free):
        what = f"needs {largest:,} bytes for a piece at a time, the disk has {free:,} free"
        raise InputError(what, where=path.parent, fix="free space, or give a smaller --split")
    with disk_errors(path):
        descriptor = open_locked(path, path)

    def room(piece: Piece) -> bytes | Path:
        if piece.nbytes <= SMALL:
            return whole(piece)
        with disk_errors(path):
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            for chunk in piece.chunks():
                left = memoryview(chunk)
                while left:
                    left = left[os.write(descriptor, left) :]
        return path

    try:
        yield room
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
