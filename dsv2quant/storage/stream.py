"""The shards of a checkpoint on the hub, of which only those lie on disk that are needed: each is downloaded, held
against its hash, used and dropped.

They lie in a folder of their own, `OUT.hub`. Of a shard that was dropped a sparse file of its size stays there, with
its header and the bytes that tell one checkpoint from another, everything else being a hole: so a run that continues
needs no shard twice for its identity.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv2quant.errors import InputError
from dsv2quant.storage.durable import PARTIAL, create, disk_errors, hash_file, is_regular, sync_folder
from dsv2quant.storage.hub_errors import hub_errors, persistently
from dsv2quant.storage.safetensors import read_header

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)
_SAMPLES = ".samples"


class Stopped(Exception):
    """A download that nobody waits for any more ended where it was."""


@dataclass(frozen=True)
class Remote:
    """A file on the hub: its size, and the sha256 of a large one, or git's hash of a small one."""

    size: int
    sha256: str | None
    blob: str | None


@dataclass(eq=False)
class Stream:
    """The shards `files` of `repo` at `commit`, whose headers are known. `data` says where those lie that are on disk,
    and where their data begins; it changes as they come and go."""

    repo: str
    commit: str
    folder: Path
    files: Mapping[str, Remote]
    headers: Mapping[str, Mapping[str, Any]]
    data: dict[str, tuple[Path, int]] = field(default_factory=dict)
    stopped: threading.Event = field(default_factory=threading.Event)  # while set, downloads end where they are

    @property
    def room(self) -> int:
        """Bytes of disk that shards take at a time, as published checkpoints are cut: one of which a tensor's part is
        left, the one that is converted, and the next, which is loaded."""
        return 3 * max(remote.size for remote in self.files.values())

    def fingerprint(self) -> list[list[object]]:
        """Name, size and hash of every shard."""
        return [[file, remote.size, remote.sha256 or remote.blob] for file, remote in sorted(self.files.items())]

    def load(self, files: Sequence[str]) -> Generator[str, None, None]:
        """Names of shards, each when it is on disk. While one is used the next comes, in a thread that ends with this
        generator, in the middle of a download if need be. Raises as `fetch`."""
        self.stopped.clear()
        coming: Future[None] | None = None
        with ThreadPoolExecutor(1, "shards") as thread:
            try:
                for file, following in zip_longest(files, files[1:]):
                    coming = coming or thread.submit(self.fetch, file)
                    coming.result()
                    coming = None if following is None else thread.submit(self.fetch, following)
                    yield file
            finally:
                self.stopped.set()
                while coming is not None and not coming.done():
                    _abort_xet()
                    wait([coming], timeout=1)

    def fetch(self, file: str) -> None:
        """Have a shard on disk. Raises InputError where it can't be had, or is not what the hub says of it."""
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        for last in (False, True):
            path = self._downloaded(file)
            if self._is_whole(path, self.files[file]):
                break
            path.unlink()
            if last:
                raise InputError(f"{file} came twice with another hash than the hub's", where=self.repo, fix="retry")
            logger.warning("%s: %s came damaged; it is downloaded again", self.repo, file)
        header, start = read_header(path)
        if _places(header) != _places(self.headers[file]):
            raise InputError(f"{file} has another header than the hub showed", where=self.repo, fix="retry")
        self.data[file] = path, start

    def _downloaded(self, file: str) -> Path:
        from huggingface_hub import hf_hub_download

        here = threading.get_ident()

        def came() -> None:
            if threading.get_ident() == here:  # hf_xet tells of it in a thread of its own, which nothing stops
                self._go_on()

        bar = _bar(came)

        def download() -> str:
            self._go_on()
            return hf_hub_download(self.repo, file, revision=self.commit, local_dir=self.folder, tqdm_class=bar)

        logger.info("%s: fetching %s, %s bytes", self.repo, file, f"{self.files[file].size:,}")
        with hub_errors(self.repo, os.fspath(self.folder)):
            return Path(persistently(download, self.stopped))

    def _go_on(self, nbytes: int = 0) -> None:
        if self.stopped.is_set():
            raise Stopped

    def _is_whole(self, path: Path, remote: Remote) -> bool:
        found = hash_file(path, self._go_on)
        if remote.sha256 is not None:
            return found == {"size": remote.size, "sha256": remote.sha256}
        content = path.read_bytes()  # a small one
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == remote.blob

    def is_sampled(self, file: str) -> bool:
        """Whether a shard was dropped before, here or in a run that was cut."""
        return is_regular(self._samples(file)) and self._samples(file).stat().st_size == self.files[file].size

    def drop(self, file: str, kept: Iterable[tuple[int, int]]) -> None:
        """Remove a shard but for its header and the bytes `kept`, (first byte of the data, how many) each."""
        path, start = self.data.pop(file)
        if not self.is_sampled(file):
            samples = self._samples(file)
            partial = samples.with_name(samples.name + PARTIAL)
            with disk_errors(self.folder), path.open("rb") as shard, os.fdopen(create(partial), "wb") as sparse:
                for begin, nbytes in [(0, start), *((start + begin, nbytes) for begin, nbytes in kept)]:
                    shard.seek(begin)
                    sparse.seek(begin)
                    sparse.write(shard.read(nbytes))
                sparse.truncate(self.files[file].size)
                sparse.flush()
                os.fsync(sparse.fileno())
                partial.rename(samples)
                sync_folder(self.folder)
        path.unlink()

    def show_samples(self) -> None:
        """Have `data` lead to what was kept of the shards, all of which were dropped."""
        self.data.update({file: (self._samples(file), read_header(self._samples(file))[1]) for file in self.files})

    def _samples(self, file: str) -> Path:
        return self.folder / f"{file}{_SAMPLES}"

    def clear(self, *, everything: bool) -> None:
        """Remove what downloads that were cut have left, or with `everything` all that is ours, and the folder if
        nothing else is in it. Raises InputError where the folder is a link: what lies behind it is not ours."""
        if self.folder.is_symlink():
            raise InputError("is a link", where=self.folder, fix="remove it")
        shutil.rmtree(self.folder / ".cache" / "huggingface", ignore_errors=True)
        with suppress(OSError):
            (self.folder / ".cache").rmdir()
        if not everything:
            return
        for file in self.files:
            for path in (self.folder / file, self._samples(file), self.folder / f"{file}{_SAMPLES}{PARTIAL}"):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def _bar(came: Callable[[], object]) -> type[tqdm[Any]]:
    """A progress bar for huggingface_hub that shows nothing, as the conversion's is open, and calls when bytes came."""
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> bool | None:
            came()
            return super().update(n)

    return Bar


def _abort_xet() -> None:
    """End what hf_xet downloads, as huggingface_hub itself does on Ctrl-C. Its versions before 2 can't, and end the
    shard."""
    with suppress(ImportError):
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()


def _places(header: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {name: (e["dtype"], list(e["shape"]), list(e["data_offsets"])) for name, e in header.items()}
