"""What every verb makes of a small checkpoint of each published one: the table of docs/family.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import torch
from family_configs import ROWS, Config, as_deep, language, small

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.arch.spec import LINEAR_ROLES

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


# What stands before the names of a language model within another model.
PREFIXES = {"MultiModalityCausalLM": "language_model.", "DeepseekVLV2ForCausalLM": "language."}


def write(folder: Path, config: Config) -> Path:
    """A small checkpoint of a row, its weights as the row's are stored: in FP8 blocks where it says so."""
    inner, prefix = language(config), PREFIXES.get(config["architectures"][0], "")
    weights = tiny.random_weights(inner)
    quantization = inner.get("quantization_config")
    if quantization is not None:
        linears = [s for s in architecture(model_config(inner, "")).specs() if s.role in LINEAR_ROLES]
        for spec in linears:
            scale_name, whole = f"{spec.module}.weight_scale_inv", "scale_fmt" in quantization
            weights[spec.name], weights[scale_name] = _blocks(weights[spec.name].float(), whole)
    named = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    return tiny.write_checkpoint(folder, config | {"vocab_size": inner["vocab_size"]}, named)


def _blocks(weight: torch.Tensor, powers_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes and the float32 scales of blocks of 128 × 128."""
    rows, cols = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -cols % 128, 0, -rows % 128))
    blocks = padded.view(padded.shape[0] // 128, 128, -1, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    if powers_of_two:
        scales = torch.exp2(scales.log2().ceil())
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn).view(padded.shape)
    return codes[:rows, :cols].contiguous(), scales


def tried(name: str, folder: Path, cli: Cli) -> dict[str, str]:
    """By column, '' where all went well and otherwise what was said; artifacts are left in `folder`."""
    model, text = folder / "model", folder / "fox.txt"
    text.write_text("".join(f"The quick brown fox jumps over {i} lazy dogs, once more.\n" for i in range(40)))
    config = ROWS[name].config
    write(model, small(config))
    said = dict.fromkeys(COLUMNS, "")

    def run(column: str, *words: object) -> bool:
        ran = cli(*words)
        if ran.code:
            said[column] = said[column] or f"{words[0]}: {ran.err.strip().splitlines()[-1]}"
        return not ran.code

    run("plan", "plan", model, "--fp8=channel")
    for column, options in ARTIFACTS.items():
        out = folder / column.replace(" ", "-")
        if column == "FP8 block" and config["architectures"] == ["DeepseekVLV2ForCausalLM"]:
            options = (*options, "--language-only")  # vLLM would not find what is unquantized of the whole
        if "--gguf" in options:
            out.mkdir()
            out = out / "model.gguf"
            if as_deep(config) != small(config):
                model = write(folder / "deep", as_deep(config))
        calibrated = ("--calibration", text) if CALIBRATION[0] in options else ()
        if not run(column, "convert", model, *options, *calibrated, "-q", "-o", out):
            continue
        run("verify", "verify", out, "--source", model, "-q")
        run("eval-ppl", "eval-ppl", out, "--text", text, "--ctx", "32", "--limit", "2", "-q")
        run("generate", "generate", out, "--prompt", "The", "--max-new-tokens", "4", "-q")
    return said


def ticks(said: Mapping[str, str]) -> list[str]:
    """A row's cells."""
    return ["no" if said[column] else "✓" for column in COLUMNS]


def with_rows(page: str, rows: Mapping[str, list[str]]) -> str:
    """The page with these rows of its table."""
    for name, cells in rows.items():
        line = rf"(?m)^\| {re.escape(name)} \|(?:[^|\n]*\|){{{len(COLUMNS)}}}$"
        page, found = re.subn(line, f"| {name} | {' | '.join(cells)} |", page)
        assert found == 1, f"docs/family.md has no row {name}"
    return page
