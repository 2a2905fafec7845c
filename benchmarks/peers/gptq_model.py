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
import json
import os
import sys
import tempfile
import time

from asked import answer, parser

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
    more = {"desc_act": options.desc_act, "mse": options.mse, "windows": len(ids), "ignore": options.ignore}
    more |= {"threads": torch.get_num_threads(), "device": str(config.device)}
    return answer(options, PACKAGES, seconds, **more)


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--mse", type=float, default=0.0, metavar="POWER", help="2.4 is what it recommends")
    asked.add_argument("--desc-act", action="store_true")
    options = asked.parse_args()
    options.model, options.tokens, options.out = (
        path.resolve() for path in (options.model, options.tokens, options.out)
    )
    # It leaves logs where it is run.
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work), contextlib.redirect_stdout(sys.stderr):
        result = quantize(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
