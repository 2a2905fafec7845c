"""How a command ends early: its exit code, and the line that says why."""

from __future__ import annotations

import click

from dsv2quant.cli.signals import Stopped
from dsv2quant.errors import Dsv2quantError, printable

EARLY = (KeyboardInterrupt, click.Abort, Stopped, Dsv2quantError, OSError)


def ending(error: BaseException) -> tuple[int, str]:
    """Exit code and line of what is one of `EARLY`."""
    match error:
        case Dsv2quantError():
            return error.exit_code, f"error: {error}"
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            return 3, printable(f"error: {where}{error.strerror or error}")
        case Stopped():
            return 128 + error.args[0], "terminated"
    return 130, "interrupted"
