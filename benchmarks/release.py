"""A release of dsv2-mini beside the commands that it stands for, one by one: convert, verify and eval-ppl of each.

    python benchmarks/release.py --results benchmarks/results/release.csv

The commands score the reference anew each time, as they do without a kept one. The same artifacts come of both, which
is checked. `plain` are artifacts that don't calibrate; of `demo`, those of examples/release.yaml, two choose INT4 by
GPTQ, which takes as long in both. On a machine that does other things as well, processors' seconds tell more than the
clock; with OMP_NUM_THREADS=1 no thread spends them on waiting for another.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dsv2quant import __version__
from dsv2quant.bench.device import append

ROOT = Path(__file__).parent.parent
MINI = ROOT / "examples" / "dsv2-mini"
CALIBRATED = ["--num-calibration-samples", "64", "--max-seq-length", "512"]
SCORED = ["--ctx", "512", "--limit", "60"]
COMMON = {
    "fp8-block": ["--fp8=block"], "fp8-channel": ["--fp8=channel"], "fp8-tensor": ["--fp8=tensor"], "int8": ["--int8"],
    "Q4_K_M": ["--gguf", "Q4_K_M"], "DSV2_Q4_K_M": ["--gguf", "DSV2_Q4_K_M"],
}  # fmt: skip
SETS: dict[str, dict[str, list[str]]] = {
    "plain": COMMON | {"Q8_0": ["--gguf", "Q8_0"], "Q6_K": ["--gguf", "Q6_K"]},
    "demo": COMMON | {"int4-mixed": ["--int4=mixed", *CALIBRATED], "int4-pure": ["--int4=pure", *CALIBRATED]},
}


MEASURED = ("one by one, s", "one by one, CPU s", "release, s", "release, CPU s")


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "dsv2quant", *map(str, words), "-q"], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def timed(found: dict[str, float], name: str) -> Iterator[None]:
    """Note seconds of the clock, and of processors in all processes begun meanwhile."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    yield
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found[f"{name}, s"] = time.perf_counter() - begin
    found[f"{name}, CPU s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def one_by_one(artifacts: dict[str, list[str]], out: Path) -> None:
    for name, options in artifacts.items():
        path = out / (f"{name}.gguf" if "--gguf" in options else name)
        run("convert", MINI, *options, "-o", path)
        run("verify", path, "--source", MINI)
        run("eval-ppl", path, "--reference", MINI, *SCORED)


def together(artifacts: dict[str, list[str]], out: Path, jobs: int) -> None:
    recipe = out / "release.yaml"
    recipe.write_text(
        f"artifacts: [{', '.join(artifacts)}]\ncalibration: {{samples: 64, length: 512}}\n"
        "evaluation: {ctx: 512, limit: 60}\n"
    )
    run("release", MINI, "--recipe", recipe, "-o", out / "release", "--jobs", jobs)


def weights(out: Path) -> list[bytes]:
    """What holds weights in a folder."""
    found = [path for kind in ("*.safetensors", "*.gguf") for path in out.rglob(kind) if not path.name.startswith(".")]
    return sorted(path.read_bytes() for path in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--machine", default="idle", help="what else it does: idle, shared")
    parser.add_argument("--set", choices=SETS, action="append", help="default: both")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    for name in args.set or SETS:
        artifacts = SETS[name]
        with tempfile.TemporaryDirectory() as folder:
            single, whole = Path(folder, "single"), Path(folder, "whole")
            for each in (single, whole):
                each.mkdir()
            found: dict[str, float] = {}
            with timed(found, "one by one"):
                one_by_one(artifacts, single)
            with timed(found, "release"):
                together(artifacts, whole, args.jobs)
            assert weights(single) == weights(whole), "other bytes"
            if args.jobs > 1:
                del found["release, CPU s"]  # its processes are another's children
        row = {
            "set": name, "artifacts": len(artifacts), **{key: found.get(key, "") for key in MEASURED},
            "times as fast": found["one by one, s"] / found["release, s"], "jobs": args.jobs,
            "threads": os.environ.get("OMP_NUM_THREADS", ""), "machine": args.machine,
            "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "versions": f"dsv2quant {__version__}, torch {torch.__version__}",
        }  # fmt: skip
        print(row)
        append(args.results, [row])


if __name__ == "__main__":
    main()
