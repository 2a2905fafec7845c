"""Time and memory of calibrating DeepSeek-V2-Lite's layers (64 experts of 2048 × 1408) against what the plan states.

    python benchmarks/calibration.py --device cuda --scratch DIR --results benchmarks/results/calibration.csv

Random weights and tokens in V2-Lite's true shapes: the first, dense layer and one of experts. Memory is torch's peak on
CUDA and the process's peak resident size on the CPU, each above what was held before.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from convert import make_checkpoint, processor

from dsv2quant import __version__
from dsv2quant.bench.device import append
from dsv2quant.calib.calibration import Calibration, layer_file, work_bytes, work_memory
from dsv2quant.calib.layerwise import quantize_layers
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan

LAYERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--recipe", default="int4-mixed")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    source, work = options.scratch / "lite", options.scratch / "work"
    shutil.rmtree(work, ignore_errors=True)
    make_checkpoint(source, LAYERS)
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, recipe.builtin(options.recipe))
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, (options.windows, options.ctx))
    calibration = Calibration(ids, "random", "", 0, [])
    cuda = options.device != "cpu"
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.time()
    quantize_layers(plan, work, calibration, options.device)
    ends = [began, *(layer_file(work, layer).stat().st_mtime for layer in range(LAYERS))]
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    )
    row = {
        "recipe": options.recipe,
        "device": torch.cuda.get_device_name() if cuda else f"{processor()}, {os.cpu_count()} cores",
        "tokens": ids.size,
        "dense layer s": f"{ends[-2] - ends[-3]:.1f}",
        "expert layer s": f"{ends[-1] - ends[-2]:.1f}",
        "peak GB": f"{peak / 1e9:.2f}",
        "stated GB": f"{work_memory(plan) / 1e9:.2f}",
        "work folder GB": f"{work_bytes(plan, calibration) / 1e9:.2f}",
        "versions": f"dsv2quant {__version__}, torch {torch.__version__}",
    }
    print("\n".join(f"{key}: {value}" for key, value in row.items()), file=sys.stderr)
    shutil.rmtree(source)
    shutil.rmtree(work)
    append(options.results, [row])


if __name__ == "__main__":
    main()
