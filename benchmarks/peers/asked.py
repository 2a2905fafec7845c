"""What the peers of integers are asked and answer, in any environment: nothing but Python's library is imported."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that they share."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", type=Path)
    made.add_argument("--tokens", type=Path, required=True, help=".npy of int64 [windows, ctx], complete windows")
    made.add_argument("--bits", type=int, default=4, choices=[2, 3, 4])
    made.add_argument("--group-size", type=int, default=128, choices=[32, 64, 128])
    made.add_argument("--ignore", action="append", default=[], metavar="NAME", help="module name or a part of it")
    made.add_argument("-o", "--out", type=Path, required=True)
    return made


def answer(options: argparse.Namespace, packages: Iterable[str], seconds: float, **more: Any) -> dict[str, Any]:
    """What was asked, the seconds that quantization took, `more`, and versions."""
    return {
        "bits": options.bits,
        "group_size": options.group_size,
        "quantize_s": round(seconds, 2),
        **more,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
