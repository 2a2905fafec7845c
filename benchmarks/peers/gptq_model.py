"""W4A16, W3A16 or W2A16 by GPTQModel, on given calibration tokens, as a peer to compare.

    python -m venv peer/.venv && peer/.venv/bin/pip install -r benchmarks/peers/requirements-gptqmodel.txt
    peer/.venv/bin/pip install --no-deps gptqmodel==7.7.0
    peer/.venv/bin/python benchmarks/peers/gptq_model.py MODEL --tokens ids.npy --bits 4 --group-size 64 \\
        --ignore kv_b_proj -o OUT

Runs in GPTQModel's own environment and imports nothing of dsv2quant. Apart from the options here all settings are
GPTQModel's defaults: transformers' own model with its experts apart, symmetric groups, min-max scales (`--mse` searches
them, by that power of the error), columns of a group in order of activation and groups in order of their strongest
(`act_group_aware`; `--desc-act` has columns in order of activation, and groups of what follows one another then: OUT
needs its `g_idx`), dampening 0.05, experts on the tokens routed to them, each layer calibrated on the outputs of the
quantized layers before it. Router and head stay as they are. OUT is in GPTQ's layout. The log goes to standard error,
one JSON object to standard output; the time in it includes packing, not loading or writing.

Its `gptaq` compares a module's inputs in the unquantized model with those in the quantized one, which are of other
tokens where routers choose other experts: it ends in an error unless every expert is given all tokens
(`ExpertsRoutingBypass`), and then gained nothing here.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer than three cores its own choice is one: an error

PACKAGES = ["torch", "gptqmodel", "defuser", "transformers", "numpy", "safetensors"]


def quantize(options: argparse.Namespace) -> dict[str, object]:
    import numpy as np
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization.config import GPTQConfig

    ids = np.load(options.tokens)
    windows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    config = GPTQConfig(
        bits=options.bits,
        group_size=options.group_size,
        desc_act=options.desc_act,
        mse=options.mse,
        dynamic={f"-:.*{name}": {} for name in options.ignore},
        device="cuda:0" if torch.cuda.is_available() else "cpu",
    )
    model = GPTQModel.load(str(options.model), config)
    started = time.perf_counter()
    model.quantize(windows)
    seconds = time.perf_counter() - started
    model.save(str(options.out))
    return {
        "bits": options.bits,
        "group_size": options.group_size,
        "desc_act": options.desc_act,
        "mse": options.mse,
        "windows": len(ids),
        "ignore": options.ignore,
        "quantize_s": round(seconds, 2),
        "threads": torch.get_num_threads(),
        "device": str(config.device),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy of int64 [windows, ctx], complete windows")
    parser.add_argument("--bits", type=int, default=4, choices=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=128, choices=[32, 64, 128])
    parser.add_argument("--mse", type=float, default=0.0, metavar="POWER", help="2.4 is what it recommends")
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--ignore", action="append", default=[], metavar="NAME", help="module name or a part of it")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    options.model, options.tokens, options.out = (
        path.resolve() for path in (options.model, options.tokens, options.out)
    )
    # It leaves logs where it is run.
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work), contextlib.redirect_stdout(sys.stderr):
        result = quantize(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
