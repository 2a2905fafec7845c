"""W4A16, W3A16 or W2A16 by AutoRound, on given calibration tokens, as a peer to compare.

    python -m venv peer/.venv && peer/.venv/bin/pip install -r benchmarks/peers/requirements-autoround.txt
    peer/.venv/bin/python benchmarks/peers/autoround.py MODEL --tokens ids.npy --bits 4 --group-size 64 \\
        --ignore kv_b_proj -o OUT

Runs in AutoRound's own environment and imports nothing of dsv2quant. Apart from the options here all settings are
AutoRound's defaults: symmetric groups, 200 sign-SGD steps a layer on 8 windows each, rounding and clipping learned
together, each layer on the outputs of the quantized layers before it. Router and head stay as they are, and so does
what has a number of rows that 32 does not divide. OUT is in compressed-tensors' layout. The log goes to standard error,
one JSON object to standard output; the time in it includes packing and writing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

PACKAGES = ["torch", "auto-round", "compressed-tensors", "transformers", "numpy", "safetensors"]


def quantize(options: argparse.Namespace) -> dict[str, object]:
    import numpy as np
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.from_numpy(np.load(options.tokens))
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=8)
    unquantized = {"bits": 16, "data_type": "float"}
    layers = dict.fromkeys([*options.ignore, "lm_head"], unquantized)
    started = time.perf_counter()
    rounding = AutoRound(
        model,
        tokenizer,
        scheme=f"W{options.bits}A16",
        group_size=options.group_size,
        layer_config=layers,
        dataset=windows,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        iters=options.iters,
        device_map="cpu" if not torch.cuda.is_available() else 0,
    )
    rounding.quantize_and_save(str(options.out), format="llm_compressor")
    seconds = time.perf_counter() - started
    (folder,) = options.out.iterdir()  # named for the model
    for path in folder.iterdir():
        path.rename(options.out / path.name)
    folder.rmdir()
    return {
        "bits": options.bits,
        "group_size": options.group_size,
        "windows": len(ids),
        "ignore": list(layers),
        "quantize_s": round(seconds, 2),
        "threads": torch.get_num_threads(),
        "device": str(torch.accelerator.current_accelerator() or "cpu"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy of int64 [windows, ctx], complete windows")
    parser.add_argument("--bits", type=int, default=4, choices=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=128, choices=[32, 64, 128])
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--ignore", action="append", default=[], metavar="NAME", help="module name or a part of it")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        result = quantize(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
