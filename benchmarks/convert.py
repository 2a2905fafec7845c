"""Speed and memory of `dsv2quant convert --fp8` against copying the same bytes, on DeepSeek-V2-Lite's tensor shapes.

    python benchmarks/convert.py --layers 14 --scratch /path/with/space --results benchmarks/results/convert.csv

The copy reads all of the input and writes as many bytes as the output, with fsync: what any converter must at least do.
Both start with the input out of the page cache (`cold`, as any checkpoint larger than memory is) or in it (`warm`).
Convert is the whole command, interpreter start included; each pair of runs gives one ratio, and the median is kept.
Peak anonymous memory (RssAnon) and the number of threads are sampled every 10 ms; `above` subtracts the memory of an
interpreter that imported numpy. CPU seconds are the whole command's, in the program and in the system. One more run
shows where the time went (convert_stages.py), in a file beside the results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv2quant import __version__
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.deepseek_v2 import CAUSAL_LM
from dsv2quant.arch.families import model_config
from dsv2quant.bench.device import append
from dsv2quant.storage.processors import processors
from dsv2quant.storage.safetensors import Output, Shard

V2_LITE = {
    "architectures": [CAUSAL_LM], "model_type": "deepseek_v2", "torch_dtype": "bfloat16", "vocab_size": 102400,
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_attention_heads": 16,
    "q_lora_rank": None, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "first_k_dense_replace": 1, "topk_method": "greedy", "max_position_embeddings": 163840,
}  # fmt: skip
BLOCK = 16 << 20


def make_checkpoint(folder: Path, layers: int, **changes: Any) -> int:
    """Random BF16 weights in V2-Lite's shapes, in shards of about 5 GB; `changes` are to the configuration. Returns
    the weights' bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    raw = V2_LITE | {"num_hidden_layers": layers} | changes
    (folder / "config.json").write_text(json.dumps(raw))
    outputs = [
        Output(s.name, "BF16", s.shape, 2 * s.size) for s in architecture(model_config(raw, "config.json")).specs()
    ]
    groups: list[list[Output]] = [[]]
    for output in outputs:
        if sum(o.nbytes for o in groups[-1]) + output.nbytes > 5e9:
            groups.append([])
        groups[-1].append(output)
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    rng = np.random.default_rng(0)
    pool = ((rng.standard_normal(1 << 26, np.float32) * 0.02).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    total = 0
    for name, members in zip(names, groups, strict=True):
        shard = Shard(name, tuple(members))
        with (folder / name).open("wb") as file:
            file.write(shard.header)
            left = shard.nbytes - len(shard.header)
            total += left
            while left:
                # Another offset each time, so that no two tensors are alike.
                begin = 2 * int(rng.integers(len(pool) // 4))
                left -= file.write(memoryview(pool)[begin : begin + min(left, len(pool) // 2)])
            file.flush()
            os.fsync(file.fileno())
    weight_map = {o.name: name for name, members in zip(names, groups, strict=True) for o in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return total


def set_cache(folder: Path, warm: bool) -> None:
    """Bring the shards into the page cache, or drop them from it."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            if warm:
                while file.read(BLOCK):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_memory(nbytes: int) -> None:
    """Use and free as much memory as the page cache will need. In a virtual machine the host takes free pages back, and
    the first run to touch them again would pay for it, whichever it is."""
    pages = np.ones(nbytes // 8)
    del pages


def copy(source: Path, target: Path, bytes_out: int) -> float:
    """Seconds to read every shard and write `bytes_out` bytes, fsynced."""
    buffer = memoryview(bytearray(BLOCK))
    left = bytes_out
    started = time.perf_counter()
    with target.open("wb", buffering=0) as out:
        for path in sorted(source.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                share = path.stat().st_size
                while count := file.readinto(buffer):
                    # Written in proportion, so that reads and writes interleave as in a conversion.
                    portion = min(left, -(-count * bytes_out // max(share, bytes_out)))
                    left -= out.write(buffer[:portion])
        while left > 0:
            left -= out.write(buffer[: min(left, BLOCK)])
        os.fsync(out.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


@dataclass(frozen=True)
class Ran:
    """What a command took: seconds, CPU seconds in the program and in the system, peak RssAnon in bytes, threads."""

    seconds: float
    user: float
    system: float
    peak: int
    threads: int


def run(command: list[str]) -> Ran:
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = threads = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            break
        said = dict(line.split(":", 1) for line in status.splitlines())
        peak = max(peak, 1024 * int(said.get("RssAnon", "0 kB").split()[0]))
        threads = max(threads, int(said["Threads"]))
        time.sleep(0.01)
    process.wait()
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(process.stderr.read().decode() if process.stderr else "failed")
    return Ran(seconds, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, peak, threads)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--fp8", default="block", choices=["block", "channel", "tensor"])
    parser.add_argument("--cache", default="cold", choices=["cold", "warm"])
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()

    source, out = options.scratch / f"lite-{options.layers}", options.scratch / "out"
    bytes_in = make_checkpoint(source, options.layers)
    convert = [sys.executable, "-m", "dsv2quant", "convert", str(source), f"--fp8={options.fp8}", "-o", str(out), "-q"]
    run([*convert, "--force"])  # compiles the encoder once; its cache then lies beside the package
    bytes_out = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    bare = run([sys.executable, "-c", "import numpy, time; time.sleep(0.5)"]).peak

    def prepare() -> None:
        set_cache(source, options.cache == "warm")
        touch_memory(min(bytes_in * (options.cache == "cold") + bytes_out, 12 << 30))

    pairs: list[tuple[float, Ran]] = []
    for _ in range(options.runs):
        shutil.rmtree(out)
        prepare()
        copied = copy(source, options.scratch / "copy.bin", bytes_out)
        prepare()
        ran = run(convert)
        pairs.append((copied, ran))
        print(f"copy {copied:.2f} s, convert {ran.seconds:.2f} s, ratio {ran.seconds / copied:.3f}", file=sys.stderr)
    shutil.rmtree(out)
    prepare()
    stages = [sys.executable, str(Path(__file__).with_name("convert_stages.py")), str(source), str(out)]
    named = ["--results", str(options.results.with_name("convert_stages.csv"))] if options.results else []
    subprocess.run([*stages, "--fp8", options.fp8, *named], check=True)
    shutil.rmtree(source)
    shutil.rmtree(out)
    row = {
        "layers": options.layers,
        "scheme": f"fp8-{options.fp8}",
        "cache": options.cache,
        "GB in": round(bytes_in / 1e9, 2),
        "GB out": round(bytes_out / 1e9, 2),
        "copy s": round(statistics.median(p[0] for p in pairs), 2),
        "convert s": round(statistics.median(ran.seconds for _, ran in pairs), 2),
        "ratio": round(statistics.median(ran.seconds / copied for copied, ran in pairs), 3),
        "ratios": " ".join(f"{ran.seconds / copied:.3f}" for copied, ran in pairs),
        "peak MiB above": round((max(ran.peak for _, ran in pairs) - bare) / 2**20),
        "interpreter MiB": round(bare / 2**20),
        "cores": processors(),
        "processor": processor(),
        "versions": f"dsv2quant {__version__}, Python {platform.python_version()}, numpy {np.__version__}",
        "user s": round(statistics.median(ran.user for _, ran in pairs), 2),
        "system s": round(statistics.median(ran.system for _, ran in pairs), 2),
        "threads": max(ran.threads for _, ran in pairs),
    }
    print("\n".join(f"{key}: {value}" for key, value in row.items()))
    append(options.results, [row])


if __name__ == "__main__":
    main()
