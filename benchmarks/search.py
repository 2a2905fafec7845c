"""Mixes that `search` finds, beside stock mixes of the same bytes: of block types against llama-quantize's, with an
importance matrix, and of schemes that vLLM takes against the recipe `int4-mixed`.

    python benchmarks/search.py MODEL --scratch DIR --results benchmarks/results/search.csv [--device cuda]

KL divergence from BF16 in nats, with the weights that each file holds (of a folder with activations as served), on the
first 60 windows of 512 tokens of Python's help topics; mixes are chosen on docstrings and sources of Python's library.
`ratio` is of the two means, with the standard error of resampled windows. With `--tune 8M` the mix is tuned as well, on
so many tokens of the text it was chosen on: `tuned`. What llama-quantize would write is what
`convert` writes, byte for byte (tests/clients).
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import Evaluator

import dsv2quant as dq
from dsv2quant import __version__
from dsv2quant.allocation.space import Space, prepare
from dsv2quant.bench.device import append
from dsv2quant.evaluation.divergence import resampled_means
from dsv2quant.progress import no_progress

STOCK = ("Q4_K_M", "Q3_K_M", "IQ3_XXS", "IQ2_M")
LENGTH: dict[str, Any] = {"samples": 128, "length": 512}


def ratio(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Of means over windows, resampled in pairs."""
    return f"{ours.mean() / theirs.mean():.3f} ± {(resampled_means(ours) / resampled_means(theirs)).std():.3f}"


def mean(values: np.ndarray) -> str:
    return f"{values.mean():.5f} ± {resampled_means(values).std():.5f}"


def size(path: Path) -> int:
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.glob("*.safetensors")))


def importance(model: Any, scratch: Path, device: str = "cpu") -> Path:
    """The importance matrix in a scratch folder, measured where it is not there."""
    imatrix = scratch / "imatrix.gguf"
    if not imatrix.exists():
        dq.calibrate(model, scratch / "statistics.safetensors", imatrix=imatrix, device=device, **LENGTH)
    return imatrix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stock", nargs="*", default=STOCK)
    parser.add_argument("--tune", metavar="TOKENS")
    parser.add_argument("--folder", action="store_true", help="Also schemes of a folder, against int4-mixed.")
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    checkpoint = dq.open(asked.model).as_source()
    imatrix = importance(checkpoint, asked.scratch, asked.device)
    weights, served = Evaluator(asked.model), Evaluator(asked.model, weight_only=False)

    def row(space: Space, stock: str, theirs: Path, evaluate: Evaluator, **options: Any) -> None:
        most, begun = size(theirs), time.perf_counter()
        mix = space.choose(most, None, no_progress)
        seconds = time.perf_counter() - begun
        recipe = asked.scratch / f"{stock}.yaml"
        recipe.write_text(space.recipe(stock, (), mix).text)
        ours = asked.scratch / f"{stock}-mix{'.gguf' * space.into_gguf}"
        given: dict[str, Any] = {"gguf" if space.into_gguf else "recipe": str(recipe)}
        dq.convert(checkpoint, ours, **given, **options)
        found, stock_kld = evaluate.compare(ours).kld.mean(1), evaluate.compare(theirs).kld.mean(1)
        tuned = {"tuned KLD": "", "tuned ratio": "", "tuned on": "", "tuning seconds": ""}
        if asked.tune:
            begun, given = time.perf_counter(), given | {"tune": asked.tune, "length": LENGTH["length"]}
            dq.convert(checkpoint, ours, force=True, **given | options | {"device": asked.device})
            kld = evaluate.compare(ours).kld.mean(1)
            tuned = {"tuned KLD": mean(kld), "tuned ratio": ratio(kld, stock_kld), "tuned on": asked.tune}
            tuned["tuning seconds"] = f"{time.perf_counter() - begun:.0f}"
        made = {
            "model": checkpoint.model, "stock": stock, "stock bytes": most, "mix bytes": size(ours),
            "bits/weight": f"{8 * size(ours) / space.parameters:.3f}", "stock KLD": mean(stock_kld),
            "mix KLD": mean(found), "ratio": ratio(found, stock_kld), **tuned,
            "predicted": f"{mix.point.predicted:.5f}", "measured there": f"{mix.point.measured:.5f}",
            "unrefined": f"{mix.first.measured:.5f}", "unrefined predicted": f"{mix.first.predicted:.5f}",
            "bound": f"{mix.bound:.5f}", "tokens": evaluate.tokens, "seconds": f"{seconds:.0f}",
            "device": asked.device if asked.device == "cpu" else torch.cuda.get_device_name(), "cores": os.cpu_count(),
            "versions": f"dsv2quant {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        }  # fmt: skip
        print(made, flush=True)
        append(asked.results, [made])

    weighted: dict[str, Any] = {"imatrix": imatrix}
    if asked.stock:
        blocks = prepare(checkpoint, asked.scratch / "blocks", True, weighted | LENGTH, asked.device, no_progress)
    for stock in asked.stock:
        theirs = asked.scratch / f"{stock}.gguf"
        dq.convert(checkpoint, theirs, gguf=stock, **weighted)
        row(blocks, stock, theirs, weights, **weighted)
    if asked.folder:
        given = {**LENGTH, "targets": ["vllm"]}
        schemes = prepare(checkpoint, asked.scratch / "schemes", False, given, asked.device, no_progress)
        theirs = asked.scratch / "int4-mixed"
        dq.convert(checkpoint, theirs, scheme="int4-mixed", device=asked.device, **given)
        row(schemes, "int4-mixed", theirs, served, device=asked.device, **given)


if __name__ == "__main__":
    main()
