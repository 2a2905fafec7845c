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
import json
import os
import sys
import time

from asked import answer, parser

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
    device = str(torch.accelerator.current_accelerator() or "cpu")
    more = {"windows": len(ids), "ignore": list(layers), "threads": torch.get_num_threads(), "device": device}
    return answer(options, PACKAGES, seconds, **more)


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--iters", type=int, default=200)
    options = asked.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        result = quantize(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
