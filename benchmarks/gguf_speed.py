"""`dsv2quant convert --gguf` against llama.cpp, with its tools and library as `make test-clients` builds them.

    python benchmarks/gguf_speed.py encode --results benchmarks/results/gguf_encode.csv
    python benchmarks/gguf_speed.py convert --scratch /path/with/space --results benchmarks/results/gguf_convert.csv

`encode` times the block quantizers alone on one thread: ggml_quantize_chunk of libggml-base, which llama-quantize
calls, and ours, on the same float32 weights in memory, in turns. `convert` times whole commands on V2-Lite's shapes:
convert_hf_to_gguf.py --outtype bf16 followed by llama-quantize, and ours, both on all cores and with the input in the
page cache, in turns; ours also with no compiled code cached (`cold`). Ours ends with an fsync, theirs do not.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numba
import numpy as np
from convert import make_checkpoint, processor, run, set_cache

from dsv2quant import __version__
from dsv2quant.bench.device import append
from dsv2quant.formats.gguf import blocks

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "clients" / "llama_cpp")]
from llama_cpp_tools import CONVERTER  # noqa: E402

YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
LAYERS = 27  # llama.cpp knows V2-Lite by them


def versions() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "processor": processor(),
        "versions": f"dsv2quant {__version__}, Python {platform.python_version()}, numpy {np.__version__}, "
        f"numba {numba.__version__}; llama.cpp of llama-cpp-python 0.3.36",
    }


def encode(options: argparse.Namespace) -> None:
    """Weights per second and thread of every quantized type, with and without an importance matrix."""
    library = ctypes.CDLL(str(options.llama_cpp / "build" / "bin" / "libggml-base.so"))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    pointer = ctypes.c_void_p
    quantize.argtypes = [ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((options.rows, 2048), np.float32) * np.float32(0.02)
    importance = rng.chisquare(1, 2048).astype(np.float32)
    rows = []
    for name in options.types or [name for name in blocks.TYPES if blocks.TYPES[name].values > 1]:
        for weights in (None, importance)[name in blocks.NEEDY :]:
            theirs = np.empty(blocks.nbytes(name, x.shape), np.uint8)
            address = weights.ctypes.data if weights is not None else None
            kind = int(gguf.GGMLQuantizationType[name])
            blocks.encode(name, x[:64], weights)  # compiles, and makes grids, as theirs does
            quantize(kind, x.ctypes.data, theirs.ctypes.data, 0, 64, x.shape[1], address)
            ratios, rates = [], []
            for _ in range(options.runs):
                started = time.perf_counter()
                quantize(kind, x.ctypes.data, theirs.ctypes.data, 0, *x.shape, address)
                middle = time.perf_counter()
                ours = blocks.encode(name, x, weights)
                ended = time.perf_counter()
                ratios.append((middle - started) / (ended - middle))
                rates.append((x.size / (middle - started), x.size / (ended - middle)))
            row = {
                "type": name,
                "imatrix": weights is not None,
                "same bytes": np.array_equal(ours.reshape(-1), theirs),
                "ggml Mweights/s": round(statistics.median(r[0] for r in rates) / 1e6, 1),
                "ours Mweights/s": round(statistics.median(r[1] for r in rates) / 1e6, 1),
                "times as fast": round(statistics.median(ratios), 2),
                "lowest": round(min(ratios), 2),
                "highest": round(max(ratios), 2),
                **versions(),
            }
            print({key: row[key] for key in list(row)[:8]}, flush=True)
            rows.append(row)
    append(options.results, rows)


def convert(options: argparse.Namespace) -> None:
    """Seconds of the whole conversion."""
    source, out = options.scratch / "lite", options.scratch / "out"
    changes = {"n_routed_experts": 2, "num_experts_per_tok": 2, "vocab_size": 32000, "rope_scaling": YARN}
    bytes_in = make_checkpoint(source, LAYERS, **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "dsv2-mini" / name, source)
    out.mkdir(exist_ok=True)
    tools = options.llama_cpp
    rows = []
    for kind in options.types or ("Q4_K_M", "Q8_0"):
        bf16, theirs, ours = out / "bf16.gguf", out / "theirs.gguf", out / "ours.gguf"
        first = [sys.executable, "-c", CONVERTER, str(tools), str(source), "--outfile", str(bf16)]
        second = [str(tools / "build" / "bin" / "llama-quantize"), str(bf16), str(theirs), kind]
        own = [sys.executable, "-m", "dsv2quant", "convert", str(source), "--gguf", kind, "-o", str(ours), "-q"]
        found = []
        for number in range(options.runs + 1):
            for path in out.iterdir():
                path.unlink()
            set_cache(source, warm=True)
            if number == 0:
                compiled = out.parent / "numba"
                shutil.rmtree(compiled, ignore_errors=True)
                os.environ["NUMBA_CACHE_DIR"] = str(compiled)
                cold = run(own).seconds
                continue
            before = time.perf_counter()
            subprocess.run([*first, "--outtype", "bf16"], check=True, capture_output=True)
            converted = time.perf_counter()
            subprocess.run(second, check=True, capture_output=True)
            quantized = time.perf_counter()
            bf16.unlink()
            ran = run(own)
            found.append((converted - before, quantized - converted, ran.seconds, ran.peak))
            print(f"{kind}: {found[-1]}", file=sys.stderr, flush=True)
        ratios = [(a + b) / c for a, b, c, _ in found]
        row = {
            "type": kind,
            "GB in": round(bytes_in / 1e9, 2),
            "GB out": round(ours.stat().st_size / 1e9, 2),
            "same file": theirs.read_bytes() == ours.read_bytes(),
            "convert_hf_to_gguf s": round(statistics.median(f[0] for f in found), 1),
            "llama-quantize s": round(statistics.median(f[1] for f in found), 1),
            "ours s": round(statistics.median(f[2] for f in found), 1),
            "ours cold s": round(cold, 1),
            "times as fast": round(statistics.median(ratios), 2),
            "lowest": round(min(ratios), 2),
            "highest": round(max(ratios), 2),
            "peak MiB": round(max(f[3] for f in found) / 2**20),
            **versions(),
        }
        print(row, flush=True)
        rows.append(row)
    shutil.rmtree(source)
    shutil.rmtree(out)
    append(options.results, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["encode", "convert"])
    parser.add_argument("--llama-cpp", type=Path, default=ROOT / "build" / "llama.cpp")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=2048, help="of 2048 weights, to encode")
    parser.add_argument("--types", nargs="+", help="all block types, or the mixes Q4_K_M and Q8_0")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    {"encode": encode, "convert": convert}[options.what](options)


if __name__ == "__main__":
    main()
