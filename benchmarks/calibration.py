"""Time and memory of calibrating layers of a published model's true shapes, against what the plan states.

    python benchmarks/random_checkpoint.py v2-lite DIR --device cuda --layers 2
    python benchmarks/calibration.py DIR --device cuda --scratch DIR --results benchmarks/results/calibration.csv
    torchrun --nproc-per-node 2 benchmarks/calibration.py DIR --device cuda …

Random weights and tokens; kernels are compiled before. A first run is timed as it is; of a second, every phase is, with
the device waited for around each; packing and writing go on in threads of their own. Memory is torch's peak on CUDA and
the process's peak resident size on the CPU, above what was held before; on CUDA `host GB` is the process's. `--gpu-gb`
has torch take no more of the GPU than so much.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import os
import platform
import resource
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from dsv2quant import __version__
from dsv2quant.bench.device import append
from dsv2quant.calib import gptq, layerwise, routed, streams
from dsv2quant.calib.calibration import Calibration, layer_file, work_memory
from dsv2quant.calib.distributed import Ranks
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.cli.ranks import together
from dsv2quant.formats.int4 import Int4
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import Plan, make_plan

SAID_EVERY = 5.0  # seconds, on stderr
PHASES: dict[str, list[tuple[Any, str]]] = {
    "read": [(layerwise.Loader, "layer")],
    "moments": [(gptq.Moments, "add")],
    "factor": [(gptq, "factor")],
    "quantize": [(layerwise, "choose"), (routed, "choose")],
    "pack": [(Int4, "pack")],
    "write": [(streams, "save_layer")],
}


def timed(
    function: Callable[..., Any], name: str, seconds: dict[str, float], threads: threading.local
) -> Callable[..., Any]:
    """The function, whose own time is added to its phase's."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        begin = time.perf_counter()
        inner = threads.__dict__.setdefault("inner", [])
        inner.append(0.0)
        try:
            return function(*args, **options)
        finally:
            torch.cuda.synchronize() if torch.cuda.is_available() else None
            took = time.perf_counter() - begin
            seconds[name] += took - inner.pop()
            if inner:
                inner[-1] += took

    return call


@contextmanager
def phases() -> Iterator[dict[str, float]]:
    """Seconds by phase of what is computed in here."""
    seconds: dict[str, float] = defaultdict(float)
    threads = threading.local()
    with ExitStack() as stack:
        for name, places in PHASES.items():
            for owner, attribute in places:
                wrapped = timed(getattr(owner, attribute), name, seconds, threads)
                stack.enter_context(patch.object(owner, attribute, wrapped))
        yield seconds


def run(plan: Plan, work: Path, ids: np.ndarray, ranks: Ranks) -> tuple[list[float], str]:
    """Seconds of each layer, and a hash of all that was made, at the first rank."""
    calibration = Calibration(ids, "random", "", 0, [])
    shutil.rmtree(work, ignore_errors=True) if ranks.is_first else None
    ranks.agreed(None)
    began = time.time()
    told, done = began, 0

    def tell(weights: int) -> None:
        nonlocal told, done
        done += weights
        if ranks.is_first and time.time() - told >= SAID_EVERY:
            told = time.time()
            print(f"{told - began:.0f} s, {done / 1e9:.2f}e9 weights", file=sys.stderr, flush=True)

    into = work if ranks.is_first else None
    layerwise.quantize_layers(plan, into, calibration, ranks.device, tell, ranks=ranks)
    if not ranks.is_first:
        return [], ""
    files = [layer_file(work, layer) for layer in range(plan.checkpoint.config.num_hidden_layers)]
    ends = [began, *(file.stat().st_mtime for file in files)]
    print(*(f"{end - began:.1f} s" for end in ends[1:]), file=sys.stderr, flush=True)
    made = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
    return [end - begin for begin, end in itertools.pairwise(ends)], made[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--recipe", default="int4-mixed")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--gpu-gb", type=float)
    parser.add_argument("--no-phases", action="store_true")
    parser.add_argument("--phases-alone", action="store_true", help="time phases in the one run")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    with together(options.device) as ranks:
        measure(options, ranks)


def measure(options: argparse.Namespace, ranks: Ranks) -> None:
    cuda = ranks.device != "cpu"
    if cuda and options.gpu_gb:
        total = torch.cuda.mem_get_info(ranks.device)[1]
        index = torch.device(ranks.device).index or 0
        torch.cuda.set_per_process_memory_fraction(options.gpu_gb * 1e9 / total, index)
    checkpoint = open_checkpoint(options.model)
    plan = make_plan(checkpoint, recipe.builtin(options.recipe))
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (options.windows, options.ctx))
    work = options.scratch / "work"
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(plan, work, ids[: 16 * ranks.size], ranks)  # kernels are compiled once on a machine
    with phases() if options.phases_alone else nullcontext({}) as named:
        layers, made = run(plan, work, ids, ranks)
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated(ranks.device) if cuda else resident - before
    timed_layers = layers
    if not (options.no_phases or options.phases_alone):
        with phases() as named:
            timed_layers, same = run(plan, work, ids, ranks)
            assert same == made, "other bytes"
    aside = ("pack", "write")  # in threads of their own
    named["forward and rest"] = sum(timed_layers) - sum(s for name, s in named.items() if name not in aside)
    if not ranks.is_first:
        return
    dense = [s for i, s in enumerate(layers) if not checkpoint.config.is_moe(i)]
    experts = [s for i, s in enumerate(layers) if checkpoint.config.is_moe(i)]
    row = {
        "model": options.model.name, "layers": len(layers), "recipe": options.recipe,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores",
        "ranks": ranks.size, "tokens": ids.size, "dense layer s": f"{sum(dense) / max(1, len(dense)):.1f}",
        "expert layer s": " ".join(f"{s:.1f}" for s in experts), "peak GB": f"{peak / 1e9:.2f}",
        "host GB": f"{resident / 1e9:.2f}", "stated GB": f"{work_memory(plan) / 1e9:.2f}",
        "GPU GB allowed": options.gpu_gb or "",
        "phases of all layers s": " ".join(f"{name} {s:.1f}" for name, s in named.items()), "made": made,
        "versions": f"dsv2quant {__version__}, torch {torch.__version__}",
    }  # fmt: skip
    print("\n".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    append(options.results, [row])
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
