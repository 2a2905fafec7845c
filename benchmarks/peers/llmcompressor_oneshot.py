"""W4A16 (round to nearest, AWQ or GPTQ, on given calibration tokens) or FP8 by llm-compressor, as a peer to compare.

    python -m venv peer/.venv && peer/.venv/bin/pip install -r benchmarks/peers/requirements-llmcompressor.txt
    peer/.venv/bin/python benchmarks/peers/llmcompressor_oneshot.py MODEL --tokens ids.npy --method gptq \\
        --group-size 64 --ignore 're:.*kv_b_proj$' -o OUT

Runs in llm-compressor's own environment and imports nothing of dsv2quant. Apart from the options here all settings are
llm-compressor's defaults: the model in the checkpoint's dtype, min-max scales, one window at a time, every expert
calibrated on all tokens, block 128, dampening 0.01, and each layer calibrated on the outputs of the quantized layers
before it. GPTQ orders columns by activation (`static`); FP8 is the presets FP8_DYNAMIC and FP8_BLOCK. AWQ smooths the
inputs of all linears of a decoder layer but o_proj's, as the mappings that are registered for DeepSeek-V2 do
(`awq-registered`), but has the router go along (`awq`): they scale the norm before the experts and leave the router as
it was, so that tokens go to other experts. The log goes to standard error, one JSON object to standard output. Loading
the model and splitting its experts is in neither of the two times; compressing it is in `save_s`.
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

PACKAGES = [
    "torch", "llmcompressor", "compressed-tensors", "transformers", "datasets", "accelerate", "numpy", "safetensors",
]  # fmt: skip
FP8 = {"fp8-channel": "FP8_DYNAMIC", "fp8-block": "FP8_BLOCK"}
CALIBRATED = ("gptq", "awq", "awq-registered")
ALWAYS_IGNORED = ["lm_head", r"re:.*mlp\.gate$"]


def read_tokens(path: Path):
    """The windows as llm-compressor takes tokenized data: it neither tokenizes nor cuts rows of one length."""
    import numpy as np
    from datasets import Dataset

    ids = np.load(path)
    if ids.ndim != 2 or ids.dtype != np.int64:
        sys.exit(f"{path}: expected int64 [windows, ctx], found {ids.dtype} {list(ids.shape)}")
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()})


def mappings(config):
    """What AWQ smooths in a DeepSeek-V2. A set of modules must be whole in every layer that has one of them, so that
    dense layers, which have no router, are apart."""
    from llmcompressor.modifiers.transform.awq import AWQMapping

    def norm(layers: range) -> str:
        return rf"re:.*layers\.({'|'.join(map(str, layers))})\.post_attention_layernorm$"

    dense, experts = range(config.first_k_dense_replace), range(config.first_k_dense_replace, config.num_hidden_layers)
    wide = [r"re:.*mlp\.experts\.\d+\.", r"re:.*shared_experts\."]
    return [
        AWQMapping("re:.*input_layernorm$", ["re:.*(q|q_a)_proj$", "re:.*kv_a_proj_with_mqa$"]),
        AWQMapping("re:.*q_a_layernorm$", ["re:.*q_b_proj$"]),
        AWQMapping("re:.*kv_a_layernorm$", ["re:.*kv_b_proj$"]),
        AWQMapping(norm(dense), [r"re:.*mlp\.gate_proj$", r"re:.*mlp\.up_proj$"]),
        AWQMapping(norm(experts), [r"re:.*mlp\.gate$", *(f"{at}{of}_proj$" for at in wide for of in ("gate", "up"))]),
        AWQMapping("re:.*up_proj$", ["re:.*down_proj$"]),
    ]


def recipe(options: argparse.Namespace, ignore: list[str], config):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    method, size = options.method, options.group_size
    if method in FP8:
        return QuantizationModifier(targets="Linear", scheme=FP8[method], ignore=ignore)

    symmetric = not options.asymmetric
    weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=size, symmetric=symmetric)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if method == "gptq":
        return GPTQModifier(config_groups=groups, ignore=ignore, actorder="static")
    rounding = QuantizationModifier(config_groups=groups, ignore=ignore)
    if method == "rtn":
        return rounding
    return [AWQModifier(mappings=mappings(config) if method == "awq" else None), rounding]


def quantize(options: argparse.Namespace) -> dict[str, object]:
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modeling.moe.linearize import linearize_moe
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not torch.accelerator.is_available():  # AWQ pins memory all the same, which is an error then
        IntermediatesCache.pin_memory = lambda self, batch_index: None
    # The routed experts are 3-D parameters, and the recipe targets `Linear`s. (`load_quantizable_moe` would need
    # torchvision, to import all of transformers.)
    model = linearize_moe(AutoModelForCausalLM.from_pretrained(options.model, dtype="auto"))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = {}
    if options.method in CALIBRATED:
        windows = read_tokens(options.tokens)
        # The order of the windows does not matter to either; unshuffled, two runs add them up alike.
        data = {
            "dataset": windows,
            "num_calibration_samples": len(windows),
            "shuffle_calibration_samples": False,
            "pipeline": "sequential",
        }
    modifier = recipe(options, ALWAYS_IGNORED + options.ignore, model.config)

    started = time.perf_counter()
    oneshot(model=model, processor=tokenizer, recipe=modifier, **data)
    quantized = time.perf_counter()
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)
    saved = time.perf_counter()
    return {
        "method": options.method,
        "group_size": options.group_size,
        "symmetric": not options.asymmetric,
        "windows": len(data["dataset"]) if data else 0,
        "ignore": ALWAYS_IGNORED + options.ignore,
        "quantize_s": round(quantized - started, 2),
        "save_s": round(saved - quantized, 2),
        "threads": torch.get_num_threads(),
        "device": str(torch.accelerator.current_accelerator() or "cpu"),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=Path, help=".npy of int64 [windows, ctx], complete windows, for GPTQ and AWQ")
    parser.add_argument("--method", required=True, choices=["rtn", *CALIBRATED, *FP8])
    parser.add_argument("--group-size", type=int, default=128, choices=[64, 128])
    parser.add_argument("--asymmetric", action="store_true", help="INT4 with zero points")
    parser.add_argument("--ignore", action="append", default=[], metavar="NAME", help="module name or `re:` pattern")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    if options.method in CALIBRATED and not options.tokens:
        parser.error(f"{options.method} needs --tokens")
    # llm-compressor logs to what standard output is when it is first imported.
    with contextlib.redirect_stdout(sys.stderr):
        result = quantize(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
