"""What can go wrong between here and the hub, as one line each."""

from __future__ import annotations

import difflib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from dsv2quant.errors import InputError

Result = TypeVar("Result")
TRIES = 5
PAUSE = 1.0  # seconds before the second
_BUSY = (408, 429, 500, 502, 503, 504)
_OFFLINE = "retry, or use --offline for what the cache holds"
_AGAIN = "run the same command again: it sends what is not there yet"
_WRITE_TOKEN = "log in with a token that may write there: `hf auth login`, or HF_TOKEN"


def near(path: str) -> str | None:
    """What to say of a path that does not exist, where its folder holds one that is spelled nearly so."""
    parent, _, name = path.rstrip("/").rpartition("/")
    folder = Path(parent or ("/" if path.startswith("/") else "."))
    names = os.listdir(folder) if folder.is_dir() and os.access(folder, os.R_OK) else []
    found = difflib.get_close_matches(name, names, 1, 0.75)
    return f"did you mean {folder / found[0]}?" if found else None


@contextmanager
def hub_errors(
    repo: str, cache_dir: str | None, *, writes: bool = False, is_dataset: bool = False
) -> Iterator[None]:  # fmt: skip
    """Raise InputError for what huggingface_hub raises within, reading a model or, as is said, a data set, or writing.
    Nothing else belongs inside: an answer that is not the hub's fails in its parsing, in any way."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError:
        raise InputError("the hub refuses access", where=repo, fix="accept its licence and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        if is_dataset:
            fix = near(repo) or "check the spelling, or set HF_TOKEN for a private one; a local file must exist"
            raise InputError("no such data set on the hub and no such file", where=repo, fix=fix) from None
        if writes:
            raise InputError("the hub shows no such repository", where=repo, fix=_WRITE_TOKEN) from None
        fix = near(repo) or "check the spelling, or set HF_TOKEN for a private one; a local folder must exist"
        raise InputError("no such model on the hub and no such folder", where=repo, fix=fix) from None
    except errors.RevisionNotFoundError:
        raise InputError("no such revision", where=repo, fix="give a branch, tag or commit of it") from None
    except errors.LocalEntryNotFoundError as error:  # the cache was its last resort
        raise _unreachable(error.__cause__ or error, repo, writes) from None
    except errors.EntryNotFoundError as error:
        raise InputError(f"the hub has no such file: {error}", where=repo) from None
    except errors.SafetensorsParsingError as error:
        raise InputError(f"a safetensors header can't be parsed: {error}", where=repo) from None
    except errors.HFValidationError as error:
        raise InputError(f"is no hub id: {error}", where=repo, fix=near(repo) or "give owner/name") from None
    # errors.HTTPError is the client library's own base class: httpx in huggingface_hub 1, httpx2 in 2.
    except (errors.HTTPError, ConnectionError) as error:
        raise _unreachable(error, repo, writes) from None
    except RuntimeError as error:  # huggingface_hub's own, around what stopped an upload; and all that hf_xet raises
        if isinstance(error.__cause__, (errors.HTTPError, ConnectionError)):
            raise _unreachable(error.__cause__, repo, writes) from None
        raise InputError(
            f"the transfer failed: {error!s:.300}", where=repo, fix=_AGAIN if writes else "retry"
        ) from None
    except OSError as error:
        if error.errno is None:  # huggingface_hub's own, of a file that did not come whole, or hf_xet's
            raise InputError(f"the transfer failed: {error}", where=repo, fix=_AGAIN if writes else "retry") from None
        where = error.filename or cache_dir or constants.HF_HUB_CACHE
        fix = "make room, or give another --cache-dir"
        raise InputError(f"can't keep downloads of {repo}: {error.strerror}", where=where, fix=fix) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"the answer is not the hub's: {type(error).__name__}: {error!s:.80}"
        raise InputError(
            what, where=repo, fix="look for a proxy or a login page in between, and at HF_ENDPOINT"
        ) from None


def persistently(call: Callable[[], Result], stopped: threading.Event | None = None) -> Result:
    """What a call returns, tried again after 1, 2, 4 and 8 s, or at once where it is `stopped`, where the hub is busy
    or the connection breaks. What huggingface_hub waits out by itself differs from version to version, and from call
    to call."""
    from huggingface_hub import errors

    for tried in range(1, TRIES + 1):
        try:
            return call()
        # A RuntimeError is what it puts around a failed upload.
        except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError, RuntimeError) as error:
            if tried == TRIES or not _passes(error.__cause__ if isinstance(error, RuntimeError) else error):
                raise
            (time.sleep if stopped is None else stopped.wait)(PAUSE * 2 ** (tried - 1))
    raise AssertionError("the last try returns or raises")


def _passes(error: BaseException | None) -> bool:
    """Whether the hub may answer in another way in a moment."""
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response.status_code in _BUSY
    return isinstance(error, (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError))


def _unreachable(error: BaseException, repo: str, writes: bool) -> InputError:
    from huggingface_hub import errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    again = _AGAIN if writes else _OFFLINE
    if status == 401:
        what, fix = "the hub refuses the token", "set a valid HF_TOKEN, or none for a public model"
    elif status == 403:
        what, fix = "the hub refuses access", "set an HF_TOKEN that may read it"
    elif status == 429:
        what, fix = "the hub has had too many requests (429)", "wait some minutes; with HF_TOKEN the limit is higher"
    elif status is not None and status < 500:
        what, fix = f"the hub answers with status {status}", "check the id and HF_ENDPOINT"
    elif status is not None:
        what, fix = f"the hub fails with status {status}", again
    else:
        what, fix = f"the hub can't be reached: {type(error).__name__}: {error!s:.200}", again
    if writes and status in (401, 403):
        fix = _WRITE_TOKEN
    return InputError(what, where=repo, fix=" ".join(filter(None, (None if writes else near(repo), fix))))
