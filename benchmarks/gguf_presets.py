"""The presets of planning/gguf_presets.py against the stock mixes whose bytes they spend, and what they are made of.

    python benchmarks/gguf_presets.py --scratch DIR --results benchmarks/results/gguf_presets.csv [--model MODEL]
    python benchmarks/gguf_presets.py --scratch DIR --results benchmarks/results/gguf_costs.csv --costs [--model MODEL]

KL divergence from BF16 in nats, with the weights each file holds, on the first 60 windows of 512 tokens of Python's
help topics. `difference` is paired by window, preset minus stock, with its standard error; `ratio` is of the means. The
importance matrix is measured on docstrings and sources of Python's library.

`--costs` gives what WEIGHT, ENDS and ERROR are means of: one kind of tensors in one type and all else in BF16, on 16
windows of the calibration text that the matrix was not measured on; each kind in IQ4_NL, and in every type those
kinds whose rows are whole blocks of 256 in dsv2-mini, too.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import CTX, MODEL, Evaluator, windows
from search import LENGTH, importance

import dsv2quant as dq
from dsv2quant import __version__
from dsv2quant.arch.decoder import architecture
from dsv2quant.bench.device import append
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.formats.gguf.file_types import PRESETS
from dsv2quant.planning.gguf_presets import ERROR
from dsv2quant.planning.gguf_types import quantizable
from dsv2quant.text.calibration import standard_library
from dsv2quant.text.tokenizer import Tokenizer

IN_EVERY_TYPE = ("attn_output", "ffn_up_exps")
VERSIONS = f"dsv2quant {__version__}, Python {platform.python_version()}, torch {torch.__version__}"


def command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "dsv2quant", *map(str, words), "-q"], check=True)


def mean(values: np.ndarray) -> str:
    return f"{values.mean():.5f} ± {values.std(ddof=1) / math.sqrt(len(values)):.5f}"


def compared(model: Path, scratch: Path, imatrix: Path, results: Path | None) -> None:
    """Each preset and its stock mix, with the importance matrix and, where types do without one, without."""
    evaluate, out = Evaluator(model), scratch / "out.gguf"

    def measure(file_type: str, weighted: bool) -> tuple[int, np.ndarray]:
        given = ["--imatrix", imatrix] if weighted else []
        command("convert", model, "--gguf", file_type, *given, "--force", "-o", out)
        return out.stat().st_size, evaluate.compare(out).kld.mean(1)

    for preset, stock in PRESETS.items():
        for weighted in (True,) if stock.startswith("IQ") else (False, True):
            (stock_bytes, stock_kld), (our_bytes, our_kld) = measure(stock, weighted), measure(preset, weighted)
            row = {
                "model": model.name, "preset": preset, "stock": stock, "imatrix": weighted, "stock bytes": stock_bytes,
                "preset bytes": our_bytes, "stock KLD": mean(stock_kld), "preset KLD": mean(our_kld),
                "difference": mean(our_kld - stock_kld), "ratio": f"{our_kld.mean() / stock_kld.mean():.3f}",
                "tokens": evaluate.tokens, "cores": os.cpu_count(), "versions": VERSIONS,
            }  # fmt: skip
            print(row, flush=True)
            append(results, [row])


def costs(model: Path, scratch: Path, imatrix: Path, results: Path | None) -> None:
    """One kind of tensors in one type, all else in BF16."""
    ids = windows(standard_library(), Tokenizer.open(model), LENGTH["samples"] + 16, CTX, seed=0)[LENGTH["samples"] :]
    evaluate, recipe, out = Evaluator(model, ids=ids), scratch / "one.yaml", scratch / "one.gguf"
    tensors = [t for t in architecture(open_checkpoint(model).config).gguf_tensors() if quantizable(t)]
    for kind in dict.fromkeys(tensor.kind for tensor in tensors):
        for block_type in ERROR if kind in IN_EVERY_TYPE else ("IQ4_NL",):
            rules = f"  - {{tensors: [{kind}], type: {block_type}}}\n  - {{tensors: ['*'], type: BF16}}\n"
            recipe.write_text(f"name: one\ngguf:\n{rules}")
            dq.convert(model, out, gguf=str(recipe), imatrix=imatrix, force=True)
            row: dict[str, Any] = {
                "model": model.name, "kind": kind, "tensors": sum(tensor.kind == kind for tensor in tensors),
                "type": block_type, "KLD": mean(evaluate.compare(out).kld.mean(1)), "tokens": evaluate.tokens,
                "cores": os.cpu_count(), "versions": VERSIONS,
            }  # fmt: skip
            print(row, flush=True)
            append(results, [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    imatrix = importance(options.model, options.scratch)
    (costs if options.costs else compared)(options.model, options.scratch, imatrix, options.results)


if __name__ == "__main__":
    main()
