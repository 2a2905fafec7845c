"""stdout and stderr that take any text: what their encoding lacks is spelled in ASCII, and never an error."""

from __future__ import annotations

import codecs
import io
import sys

_SPELLED = {"→": "->", "×": "x", "±": "+-", "−": "-", "…": "...", "·": "*", "“": '"', "”": '"', "’": "'"}
_ERRORS = "dsv2quant.spell"


def take_any_text() -> None:
    """Of stdout and stderr, where they are streams of bytes."""
    codecs.register_error(_ERRORS, _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_SPELLED.get(c, "?") for c in error.object[error.start : error.end]), error.end
