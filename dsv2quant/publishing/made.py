"""What a release has made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import GateError, listing
from dsv2quant.publishing.wanted import Wanted
from dsv2quant.report.measured import Measured


@dataclass(frozen=True)
class Made:
    """An artifact of a release, and what was measured of it; `failed` are gates that it doesn't keep to, a line
    each."""

    wanted: Wanted
    path: Path
    conversion: Any  # Conversion: its module imports much
    measured: Measured
    failed: tuple[str, ...]


@dataclass(frozen=True)
class Released:
    """A release of `checkpoint` in folder `out`; cards say that it is `base_model`, where that is given."""

    out: Path
    checkpoint: Checkpoint
    base_model: str | None
    made: tuple[Made, ...]

    def check(self) -> None:
        """Raise GateError where an artifact doesn't keep to a gate."""
        failed = [f"{each.wanted.name}: {what}" for each in self.made for what in each.failed]
        if failed:
            raise GateError(listing(failed))
