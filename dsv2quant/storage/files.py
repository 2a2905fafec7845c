"""Reading files of a folder that nobody vouches for: regular ones, of a bounded size, that lie in it.

A shard may be a link to another disk: it must parse, and only its tensors are used. Whatever else is read may end up in
an artifact word for word, so a link must not lead to a file that the folder's author has no business with.

Memory that a thread keeps between jobs: touching fresh pages costs more than filling them.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dsv2quant.errors import InputError

AGAIN = "download it again"
# Tokenizer, generation defaults and chat template. No Python: consumers have DeepSeek-V2 built in.
_CARRIED = (
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "generation_config.json", "chat_template.*", "LICENSE*",
)  # fmt: skip
# How images become inputs, as JSON (transformers' processors).
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
MAX_CARRIED_BYTES = 256 << 20
TEMPLATES = "additional_chat_templates"  # where transformers 5 keeps all but the default one
_POINTER = b"version https://git-lfs.github.com/spec/"
_BLOB = re.compile(r"models--[^/]+/blobs/[0-9a-f]{40,64}")  # where the hub cache keeps what its snapshots link to


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a file system that fails into one line: which file can't be read, and why."""
    try:
        yield
    except FileNotFoundError:
        if path.is_symlink():
            what = f"is a link to {os.readlink(path)}, which is not there"
            raise InputError(what, where=path, fix=AGAIN) from None
        raise InputError("missing", where=path, fix="a checkpoint's folder must hold it") from None
    except OSError as error:
        what = f"can't be read: {error.strerror or error}"
        raise InputError(what, where=path, fix="check the disk and the file's permissions") from None


def open_regular(path: Path) -> int:
    """A descriptor of a file. Raises InputError where it is none: a device need not end, nor a pipe begin."""
    with reading(path):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
            raise InputError(f"is {kind}, not a file", where=path, fix="put the file itself there")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def fill(buffer: np.ndarray, path: Path, places: Iterable[tuple[int, int]], name: str) -> np.ndarray:
    """Fill a buffer (uint8) with a file's bytes at some places, (offset, how many), one behind the other, and return
    it. Raises InputError where the file can't be read, or ends before the tensor `name` does."""
    view = buffer.data
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for offset, nbytes in places:
                piece, view = view[:nbytes], view[nbytes:]
                while piece:
                    count = os.preadv(descriptor, [piece], offset)
                    if count == 0:
                        raise InputError(f"{name} ends early", where=path, fix=AGAIN)
                    offset, piece = offset + count, piece[count:]
        finally:
            os.close(descriptor)
    return buffer


def read_bytes(path: Path, limit: int, folder: Path | None = None) -> bytes:
    """A file's content. Raises InputError where it is missing, no file, larger than `limit` bytes, a git-lfs pointer,
    or a link that leads out of `folder`, by default its own; the hub cache's blobs are let be."""
    check_link(path, folder or path.parent)
    with os.fdopen(open_regular(path), "rb") as file, reading(path):
        if os.fstat(file.fileno()).st_size > limit:
            raise InputError(f"larger than {limit:,} bytes", where=path, fix="no checkpoint has such a file")
        content = file.read(limit)
    check_pointer(content, path)
    return content


def check_link(path: Path, folder: Path) -> None:
    """Raise InputError for a link that leads out of `folder`, save to the hub cache's blobs, or nowhere."""
    with reading(path):
        real, root = (Path(os.path.realpath(x, strict=True)) for x in (path, folder))
    if not real.is_relative_to(root) and not _BLOB.fullmatch("/".join(real.parts[-3:])):
        raise InputError(f"is a link out of its folder, to {real}", where=path, fix="put the file itself there")


def read_text(path: Path, limit: int) -> str:
    """The same of a UTF-8 text."""
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error}", where=path, fix=AGAIN) from None


def check_pointer(content: bytes, path: Path) -> None:
    """Raise InputError for what git leaves in the place of a large file that it did not fetch."""
    if content.startswith(_POINTER):
        fix = f"run `git lfs pull` in the folder, or {AGAIN}"
        raise InputError("is a git-lfs pointer, not the file", where=path, fix=fix)


def carried_files(folder: Path, *, processors: bool = False) -> dict[str, bytes]:
    """{path below the folder: content} of a checkpoint's files that an artifact carries along, with the `processors` of
    a multimodal one. Raises InputError where one can't be read by the rules of `read_bytes`, or has a name that no
    artifact may hold."""
    wanted = (*_CARRIED, *(_PROCESSORS if processors else ()))
    names = [path.name for path in folder.iterdir() if not path.is_dir()]
    names = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)]
    names += [f"{TEMPLATES}/{path.name}" for path in folder.glob(f"{TEMPLATES}/*.jinja")]
    for name in names:
        if not is_artifact_path(name):
            fix = "templates are named with letters, digits, '_', '-' and '.'"
            raise InputError("has a name that can't be carried along", where=folder / name, fix=fix)
    return {name: read_bytes(folder / name, MAX_CARRIED_BYTES, folder) for name in sorted(names)}


def is_artifact_path(name: str) -> bool:
    """Whether an artifact may hold a file of this name: in the folder itself and not hidden, or a further template."""
    return re.fullmatch(rf"[^/.\0][^/\0]*|{TEMPLATES}/\w[\w.-]*\.jinja", name) is not None


class Scratch(threading.local):
    """One buffer per thread."""

    _buffer = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """`nbytes` bytes, valid until this thread's next call."""
        if self._buffer.nbytes < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes]
