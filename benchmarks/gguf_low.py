"""llama-quantize's mixes of few bits, on dsv2-mini, with an importance matrix.

    python benchmarks/gguf_low.py --scratch DIR --results benchmarks/results/gguf_low.csv

KL divergence from BF16 in nats, as in gguf_presets.py.
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import torch
from gguf_presets import command, mean
from quality import MODEL, Evaluator

from dsv2quant import __version__
from dsv2quant.bench.device import append

MIXES = (
    "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS",
    "IQ1_M", "IQ1_S", "MXFP4_MOE",
)  # fmt: skip


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
    for mix in MIXES:
        command("convert", MODEL, "--gguf", mix, "--imatrix", imatrix, "--force", "-o", out)
        row = {
            "mix": mix,
            "bytes": out.stat().st_size,
            "KLD": mean(evaluate.compare(out).kld.mean(1)),
            "tokens": evaluate.tokens,
            "cores": os.cpu_count(),
            "versions": f"dsv2quant {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        }
        print(row, flush=True)
        rows.append(row)
    append(options.results, rows)


if __name__ == "__main__":
    main()
