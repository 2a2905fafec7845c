"""The table of docs/family.md: what every verb makes of a small checkpoint of each published one.

    python tools/family_table.py              every row, written into docs/family.md
    python tools/family_table.py NAME…        these rows alone, the others as they stand there

The checkpoints are those of tests/family_rows.py: random weights in the row's widths and with its quirks, few layers.
Prints what was said where something failed, and exits with 1 then.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(*words: object) -> object:
    """Run a command in this process."""
    from family_rows import Ran

    from dsv2quant.cli.main import main

    sys.argv = ["dsv2quant", *map(str, words)]
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            return Ran(int(end.code or 0), err.getvalue())
    return Ran(0, err.getvalue())


def main() -> int:
    """See the module's docstring."""
    from family_configs import ROWS
    from family_rows import ticks, tried, with_rows

    names = sys.argv[1:] or list(ROWS)
    page = ROOT / "docs" / "family.md"
    failed = 0
    for name in names:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            said = tried(name, Path(folder), run)
        page.write_text(with_rows(page.read_text(), {name: ticks(said)}))
        print(f"{time.perf_counter() - started:6.1f} s  {name}", flush=True)
        for column, what in said.items():
            if what:
                print(f"    {column}: {what}")
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
