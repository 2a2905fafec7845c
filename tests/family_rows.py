"""What every verb makes of a small checkpoint of each published one: the table of docs/family.md."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tiny
from family_configs import ROWS, small

CALIBRATION = ("--num-calibration-samples", "4", "--max-seq-length", "32")
ARTIFACTS = {
    "FP8 channel": ("--fp8=channel",),
    "FP8 block": ("--fp8=block",),
    "INT4 GPTQ": ("--int4=pure", *CALIBRATION),
    "GGUF Q4_K_M": ("--gguf", "Q4_K_M"),
}
USES = ("verify", "eval-ppl", "generate")
COLUMNS = ("plan", *ARTIFACTS, *USES)


class Ran(NamedTuple):
    """How a command ended, and the last line that it printed on stderr."""

    code: int
    err: str


Cli = Callable[..., Any]  # the words of a command → what has `code` and `err`


def tried(name: str, folder: Path, cli: Cli) -> dict[str, str]:
    """By column, '' where all went well and otherwise what was said; artifacts are left in `folder`."""
    model, text = folder / "model", folder / "fox.txt"
    text.write_text("".join(f"The quick brown fox jumps over {i} lazy dogs, once more.\n" for i in range(40)))
    tiny.write_checkpoint(model, small(ROWS[name].config))
    said = dict.fromkeys(COLUMNS, "")

    def run(column: str, *words: object) -> None:
        ran = cli(*words)
        if ran.code:
            said[column] = said[column] or f"{words[0]}: {ran.err.strip().splitlines()[-1]}"

    run("plan", "plan", model)
    for column, options in ARTIFACTS.items():
        out = folder / column.replace(" ", "-")
        if "--gguf" in options:
            out.mkdir()
            out = out / "model.gguf"
        calibrated = ("--calibration", text) if CALIBRATION[0] in options else ()
        run(column, "convert", model, *options, *calibrated, "-q", "-o", out)
        run("verify", "verify", out, "--source", model, "-q")
        run("eval-ppl", "eval-ppl", out, "--text", text, "--ctx", "32", "--limit", "2", "-q")
        run("generate", "generate", out, "--prompt", "The", "--max-new-tokens", "4", "-q")
    return said
