"""Asking a server for JSON, over HTTP. What it answers is untrusted: `Answered` takes it apart."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any
from urllib import error, request
from urllib.parse import urlsplit

from dsv2quant.errors import InputError, UsageError

TIMEOUT = 600.0  # seconds without a byte: a long window takes its time on a busy server
MAX_BYTES = 256 << 20  # of an answer


@dataclass(frozen=True)
class Server:
    """An engine's server at `url`, http://HOST:PORT, which may end in /v1. It is asked directly, past any proxy. Raises
    UsageError where this is no address."""

    engine: str
    url: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UsageError(f"--engine-url {self.url} is no server's address", fix="http://HOST:PORT is one")

    @property
    def root(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    def get(self, path: str) -> Answered:
        return self._asked(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Answered:
        return self._asked(path, json.dumps(body).encode())

    def _asked(self, path: str, data: bytes | None) -> Answered:
        """Raises InputError where the server can't be reached, refuses, or answers no JSON."""
        where = self.root + path
        opener = request.build_opener(request.ProxyHandler({}))
        try:
            asked = request.Request(where, data, {"Content-Type": "application/json"})
            with opener.open(asked, timeout=TIMEOUT) as response:
                got = response.read(MAX_BYTES + 1)
        except error.HTTPError as refused:
            raise self._refused(where, refused.code, refused.read(MAX_BYTES)) from None
        except TimeoutError:
            fix = "look whether it hangs, or score shorter windows with --ctx"
            raise InputError(f"no answer in {TIMEOUT:.0f} seconds", where=where, fix=fix) from None
        except (error.URLError, OSError) as failed:
            why = getattr(failed, "reason", failed)
            said = getattr(why, "strerror", None) or str(why)
            fix = f"give --engine-url the address that {self.engine} serves at"
            raise InputError(f"can't be reached: {said}", where=where, fix=fix) from None
        if len(got) > MAX_BYTES:
            raise self.unasked(where, f"more than {MAX_BYTES >> 20} MiB")
        try:
            return Answered(self, where, json.loads(got))
        except (ValueError, RecursionError):
            raise self.unasked(where, "no JSON") from None

    def _refused(self, where: str, code: int, body: bytes) -> InputError:
        if code == 404 and not body.lstrip().startswith(b'{"error"'):
            fix = f"look whether {self.engine} serves there: this is no path of its server"
            return InputError("is not found", where=where, fix=fix)
        try:
            said = json.loads(body)
        except (ValueError, RecursionError):
            said = None
        match said:
            case {"error": {"message": str(message)}} | {"message": str(message)} | {"detail": str(message)}:
                reason = message
            case _:
                reason = body[:200].decode(errors="replace") or "nothing more"
        return InputError(f"answers {code}: {reason[:300]}", where=where, fix=f"see what {self.engine} logged")

    def unasked(self, where: str, what: str) -> InputError:
        """An answer that is not in the server's form."""
        return InputError(f"answers {what}", where=where, fix=f"look whether {self.engine} serves there")


@dataclass(frozen=True)
class Answered:
    """A part of an answer. Each method raises InputError where it is of another kind."""

    server: Server
    where: str
    value: Any

    def __getitem__(self, key: str) -> Answered:
        if not isinstance(self.value, dict) or key not in self.value:
            raise self.not_a(f"{key!r}")
        return Answered(self.server, self.where, self.value[key])

    def has(self, key: str) -> bool:
        return isinstance(self.value, dict) and self.value.get(key) is not None

    def items(self, count: int | None = None) -> list[Answered]:
        """The members of a list, which must be so many."""
        if not isinstance(self.value, list) or count not in (None, len(self.value)):
            raise self.not_a("a list" if count is None else f"a list of {count}")
        return [Answered(self.server, self.where, each) for each in self.value]

    def pairs(self) -> list[tuple[str, Answered]]:
        """The members of an object, of which there must be one at least."""
        if not isinstance(self.value, dict) or not self.value:
            raise self.not_a("an object")
        return [(key, Answered(self.server, self.where, each)) for key, each in self.value.items()]

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.not_a("a text")
        return self.value

    def token(self, vocabulary: int) -> int:
        return _token(self, self.value, vocabulary)

    def tokens(self, vocabulary: int, count: int | None = None) -> list[int]:
        return [each.token(vocabulary) for each in self.items(count)]

    def logprob(self) -> float:
        """A natural log-probability: a number that is at most 0, up to rounding."""
        found = self.value
        if isinstance(found, bool) or not isinstance(found, int | float) or math.isnan(found) or found > 1e-3:
            raise self.not_a("a log-probability")
        return float(found)

    def not_a(self, wanted: str) -> InputError:
        return self.server.unasked(self.where, f"{_shown(self.value)} where {wanted} belongs")


def _token(part: Answered, value: Any, vocabulary: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocabulary:
        raise part.not_a(f"a token below {vocabulary}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
