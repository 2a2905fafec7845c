"""Errors that are the user's ordinary day: one clear line and an exit code, never a traceback.

A message says what is wrong, where (file, tensor), which rule it breaks, and what to do. Anything else that
escapes is a bug, shows its traceback and exits with 1.
"""

from __future__ import annotations


class Dsv2quantError(Exception):
    """A failure the user can act on. `str()` is one line: `where: what (fix)`, safe to print."""

    exit_code = 3

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        line = f"{where}: {what}" if where is not None else what
        if fix:
            line += f" ({fix})"
        super().__init__(printable(" ".join(line.split())))


class UsageError(Dsv2quantError):
    """The command's options contradict each other or the model."""

    exit_code = 2


class InputError(Dsv2quantError):
    """A file, tensor, configuration, recipe or folder is not what it must be."""

    exit_code = 3


class GateError(Dsv2quantError):
    """A measured value passed the limit that the caller set."""

    exit_code = 4


class PlanViolation(RuntimeError):
    """What was made is not what was planned: a bug of ours, never the user's. Nothing may look finished after it."""


def listing(items: list[str], limit: int = 3) -> str:
    """The first `limit` items and how many more there are: 'a, b, c and 7 more'."""
    shown = ", ".join(item if len(item) <= 200 else f"{item[:200]}…" for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def printable(text: str) -> str:
    """Text whose control characters are escaped: names in files of others must not drive a terminal. Line breaks
    stay."""
    if all(c.isprintable() or c in " \n" for c in text):
        return text
    return "".join(c if c.isprintable() or c in " \n" else c.encode("unicode_escape").decode() for c in text)
