"""numba's njit as the codecs use it, with a cache that is never stale and never in the way.

numba's own cache knows the file of a function, not those of the functions and constants compiled into it; a damaged
file or the want of a writable folder ends the program. Here one file holds one function for one signature, processor
and version of numba. It opens with a sha256 of the codecs' sources and of what follows: where that differs, the
function is compiled again and the file replaced. So what a `compiled` function calls or reads must be in this folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import njit
from numba.core import config
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.misc.appdirs import AppDirs

SOURCES = Path(__file__).parent
DIGEST_SIZE = hashlib.sha256().digest_size
logger = logging.getLogger(__name__)


def compiled(function: Callable[..., Any]) -> Any:
    """The function as machine code of one thread that releases the GIL, with IEEE division; kept between runs."""
    dispatcher = njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = Kept(
        f"{function.__module__}.{function.__qualname__}"
    )  # as Dispatcher.enable_caching sets its own
    return dispatcher


class Kept(NullCache):
    """What numba's dispatcher asks before it compiles, and tells afterwards."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sources = sources_digest()  # as they are when they are imported

    @property
    def cache_path(self) -> str | None:
        return str(path) if (path := folder()) else None

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The CompileResult, or None where none is kept that is whole and of these sources."""
        target.refresh()
        path = self._path(signature, target.codegen())
        kept = b""
        with contextlib.suppress(OSError):
            kept = path.read_bytes() if path else b""
        payload = kept[DIGEST_SIZE:]
        if kept[:DIGEST_SIZE] != self._seal(payload):
            _say_that_it_compiles()
            return None
        return CompileResult._rebuild(target, *pickle.loads(payload))

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep it, unless it holds addresses of this process. A disk that takes no more is no error."""
        if result.library.has_dynamic_globals or not (path := self._path(signature, result.codegen)):
            return
        payload = dumps(result._reduce())
        partial = path.with_suffix(f".{uuid.uuid4().hex}")
        try:
            partial.write_bytes(self._seal(payload) + payload)
            partial.replace(path)
        except OSError as error:
            logger.info("%s: compiled code can't be kept: %s", path.parent, error.strerror)
            with contextlib.suppress(OSError):
                partial.unlink()

    def _seal(self, payload: bytes) -> bytes:
        return hashlib.sha256(self.sources + payload).digest()

    def _path(self, signature: Any, codegen: Any) -> Path | None:
        """The processor's name and features are in the code generator's tuple."""
        if not (kept_in := folder()):
            return None
        versions = (numba.__version__, llvmlite.__version__, sys.implementation.cache_tag)
        key = repr((str(SOURCES), self.name, str(signature), codegen.magic_tuple(), versions))
        return kept_in / f"{self.name}.{hashlib.sha256(key.encode()).hexdigest()[:16]}.machine"


@functools.cache
def sources_digest() -> bytes:
    """Of every source in this folder, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*.py")):
        digest.update(f"{path.relative_to(SOURCES)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.digest()


@functools.cache
def _say_that_it_compiles() -> None:
    """Once a process: work stands still meanwhile, and its time left means nothing."""
    often = "once" if folder() else "at every run, as no folder to keep it in can be written to"
    logger.warning("compiling for this processor, %s: it can take a minute", often)


@functools.cache
def folder() -> Path | None:
    """Where machine code is kept, None where nowhere can be written. Reading it is running it, so a folder of another
    user's, or one that others may write to, is passed over."""
    for candidate in _candidates():
        with contextlib.suppress(OSError):
            candidate.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = candidate.stat(follow_symlinks=False)
            if found.st_uid == os.geteuid() and not found.st_mode & 0o002:
                tempfile.TemporaryFile(dir=candidate).close()
                logger.debug("compiled code is kept in %s", candidate)
                return candidate
    return None


def _candidates() -> Iterator[Path]:
    """The user's choice (NUMBA_CACHE_DIR, which numba reads), the package, the user's cache, the temporary folder."""
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR)
    yield SOURCES / "__pycache__"
    user, home = Path(AppDirs("dsv2quant", appauthor=False).user_cache_dir), Path(os.path.expanduser("~"))
    if user.is_absolute() and (home.is_dir() or not user.is_relative_to(home)):  # a service's home may not be there
        yield user
    with contextlib.suppress(FileNotFoundError):  # there is none
        yield Path(tempfile.gettempdir()) / f"dsv2quant-{os.geteuid()}"
