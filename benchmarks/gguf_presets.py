"""The presets of formats/gguf/presets.py against the stock mixes whose bytes they spend, on dsv2-mini.

    python benchmarks/gguf_presets.py --scratch DIR --results benchmarks/results/gguf_presets.csv

KL divergence from BF16 in nats, with the weights each file holds, on the first 60 windows of 512 tokens of Python's
help topics; the presets were chosen on other text. `difference` is paired by window, preset minus stock, with its
standard error. The importance matrix is measured on docstrings and sources of Python's library.
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
from quality import MODEL, Evaluator

from dsv2quant import __version__
from dsv2quant.bench.device import append
from dsv2quant.formats.gguf.file_types import PRESETS


def command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "dsv2quant", *map(str, words), "-q"], check=True)


def mean(values: np.ndarray) -> str:
    return f"{values.mean():.4f} ± {values.std(ddof=1) / math.sqrt(len(values)):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    imatrix, out = options.scratch / "imatrix.gguf", options.scratch / "out.gguf"
    command("calibrate", MODEL, "-o", options.scratch / "statistics.safetensors", "--imatrix", imatrix)
    evaluate = Evaluator()
    rows: list[dict[str, Any]] = []

    def measure(file_type: str, weighted: bool) -> tuple[int, np.ndarray]:
        given = ["--imatrix", imatrix] if weighted else []
        command("convert", MODEL, "--gguf", file_type, *given, "--force", "-o", out)
        return out.stat().st_size, evaluate.compare(out).kld.mean(1)

    for preset, (stock, _) in PRESETS.items():
        for weighted in (False, True):
            (stock_bytes, stock_kld), (our_bytes, our_kld) = measure(stock, weighted), measure(preset, weighted)
            row = {
                "preset": preset,
                "stock": stock,
                "imatrix": weighted,
                "stock bytes": stock_bytes,
                "preset bytes": our_bytes,
                "stock KLD": mean(stock_kld),
                "preset KLD": mean(our_kld),
                "difference": mean(our_kld - stock_kld),
                "tokens": evaluate.tokens,
                "cores": os.cpu_count(),
                "versions": f"dsv2quant {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
            }
            print(row, flush=True)
            rows.append(row)
    append(options.results, rows)


if __name__ == "__main__":
    main()
