"""Size against distance, for stock mixes, ours and peers', on text of three kinds: what pareto_figure.py draws.

    python benchmarks/pareto.py MODEL --scratch DIR --results benchmarks/results/pareto.csv [--device cuda] \\
        [--beside "AutoRound INT4=FOLDER" ...]

Artifacts: llama-quantize's mixes with an importance matrix; presets and mixes that `search` finds, of the bytes of a
stock one; folders for vLLM, with activations as it serves them; and what is given. All calibrate on the same tokens of
the default calibration text, on which searches also choose. KL divergence from BF16 is in nats, in float32, on 60
windows of 512 tokens of each of benchmarks/domains.py; errors are of resampled windows. `ratio` is of the means of a
mix and of the stock one whose bytes it spends, resampled in pairs. What lies in
DIR already is not made again, and what has a row is not measured again.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from domains import DOMAINS
from quality import Evaluator
from search import LENGTH, importance, ratio, size

import dsv2quant as dq
from dsv2quant import __version__
from dsv2quant.allocation.space import WINDOWS, prepare
from dsv2quant.bench.device import append
from dsv2quant.checkpoint.checkpoint import HfCheckpoint
from dsv2quant.evaluation.divergence import summarize
from dsv2quant.formats.gguf.file_types import PRESETS
from dsv2quant.progress import no_progress

STOCK = (
    "IQ1_M", "IQ2_XXS", "IQ2_S", "IQ2_M", "Q2_K", "IQ3_XXS", "IQ3_S", "IQ3_M", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M",
    "Q5_K_M", "Q6_K", "Q8_0",
)  # fmt: skip
SEARCHED = ("IQ2_XXS", "IQ2_M", "IQ3_XXS", "Q3_K_M", "Q4_K_M", "Q5_K_M")
PLAIN = ("fp8-block", "fp8-channel", "int8")
CALIBRATED = ("int4-pure", "int4-pure-g64")  # in groups of 128, and of 64
OF_EXPERTS = ("int4-mixed", "int4-experts", "int3-mixed", "int3-experts", "int2-mixed", "int2-experts")
# Of whom an artifact is.
LLAMA_CPP, PRESET, SEARCH, FOLDER, PEER = "llama.cpp", "preset", "search", "folder", "peer"


class Artifact(NamedTuple):
    """`stock` is the mix whose bytes it spends, if any."""

    kind: str
    name: str
    path: Path
    stock: str = ""


def artifacts(checkpoint: HfCheckpoint, options: argparse.Namespace) -> Iterator[Artifact]:
    """Made in the scratch folder, or found there."""
    scratch, imatrix = options.scratch, importance(checkpoint, options.scratch, options.device)

    def mix(kind: str, name: str, gguf: str, stock: str = "") -> Artifact:
        out = scratch / f"{name}.gguf"
        dq.convert(checkpoint, out, gguf=gguf, imatrix=imatrix, device=options.device)
        return Artifact(kind, name, out, stock)

    for name in STOCK:
        yield mix(LLAMA_CPP, name, name)
    if checkpoint.config.is_mla:
        for name, stock in PRESETS.items():
            yield mix(PRESET, name, name, stock)
    if options.budgets:
        given: dict[str, Any] = LENGTH | {"imatrix": imatrix, "length": options.searched}
        space = prepare(checkpoint, scratch / "blocks", True, given, options.device, no_progress)
    for stock in options.budgets:
        recipe = scratch / f"{stock}-mix.yaml"
        if not recipe.exists():
            found = space.choose(size(scratch / f"{stock}.gguf"), None, no_progress)
            recipe.write_text(space.recipe(stock, (), found).text)
        yield mix(SEARCH, f"{stock}-mix", str(recipe), stock)
    of_no_use = () if checkpoint.config.n_routed_experts else OF_EXPERTS
    for name in (name for name in options.folders if name not in of_no_use):
        scheme, _, group = name.partition("-g")
        asked: dict[str, Any] = {"scheme": scheme, "targets": ["vllm"]} | ({"group_size": int(group)} if group else {})
        calibrating = {} if name in PLAIN else LENGTH
        dq.convert(checkpoint, scratch / name, device=options.device, **asked, **calibrating)
        yield Artifact(FOLDER, name, scratch / name)
    for beside in options.beside:
        name, _, path = beside.rpartition("=")
        yield Artifact(PEER, name, Path(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budgets", nargs="*", default=SEARCHED, help="Stock mixes whose bytes a search spends.")
    parser.add_argument("--folders", nargs="*", default=(*PLAIN, *CALIBRATED, *OF_EXPERTS), help="Schemes of them.")
    parser.add_argument("--searched", type=int, default=LENGTH["length"], help="Tokens of each window of a search.")
    parser.add_argument("--beside", nargs="*", default=[], metavar="NAME=FOLDER", help="Anybody's artifacts.")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    checkpoint = dq.open(options.model).as_source()
    parameters = sum(weight.spec.size for weight in checkpoint.weights)
    made, known = list(artifacts(checkpoint, options)), measured(options.results)
    hardware = "cpu" if options.device == "cpu" else torch.cuda.get_device_name()
    versions = f"dsv2quant {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    for domain, windows in DOMAINS.items():
        lacking = [artifact for artifact in made if (options.model.name, domain, artifact.name) not in known]
        evaluate = Evaluator(options.model, weight_only=False, ids=windows(options.model), device=options.device)
        klds: dict[str, np.ndarray] = {}
        for kind, name, path, stock in made:
            if not any(name in (artifact.name, artifact.stock) for artifact in lacking):
                continue
            found = evaluate.compare(path)
            klds[name] = found.kld.mean(1)
            if (options.model.name, domain, name) in known:
                continue
            distance, nbytes = summarize(found), size(path)
            row = {
                "model": options.model.name, "domain": domain, "kind": kind, "artifact": name, "bytes": nbytes,
                "bits/weight": f"{8 * nbytes / parameters:.3f}",
                "KLD": f"{distance.kld.mean:.5f}", "stderr": f"{distance.kld.stderr:.5f}",
                "ln ppl ratio": f"{distance.ln_ratio.value:+.4f} ± {distance.ln_ratio.stderr:.4f}",
                "same top-1": f"{distance.top1_agreement.value:.4f}",
                "ppl of BF16": f"{np.exp(found.reference_nll.mean()):.3f}",
                "stock": stock, "ratio": ratio(klds[name], klds[stock]) if stock else "", "tokens": evaluate.tokens,
                "searched on": WINDOWS * options.searched if kind == SEARCH else "", "device": hardware,
                "cores": os.cpu_count(), "versions": versions,
            }  # fmt: skip
            print(*(f"{key} {value}" for key, value in row.items()), sep="  ", file=sys.stderr, flush=True)
            append(options.results, [row])


def measured(results: Path | None) -> set[tuple[str, str, str]]:
    """Models, domains and artifacts of rows that are there."""
    if results is None or not results.exists():
        return set()
    with results.open(newline="") as file:
        return {(row["model"], row["domain"], row["artifact"]) for row in csv.DictReader(file)}


if __name__ == "__main__":
    main()
