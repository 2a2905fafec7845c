"""FP8, INT4 and Q4_K_M of the models of train_small.py: ours, llm-compressor's and llama.cpp's, by one evaluator.

    python -m venv peer/.venv && peer/.venv/bin/pip install -r benchmarks/peers/requirements-llmcompressor.txt
    python tests/clients/llama_cpp/build.py
    python benchmarks/families.py llama v3 --peer peer/.venv/bin/python --llama-cpp build/llama.cpp/build/bin \\
        --scratch DIR --results benchmarks/results/families.csv

llm-compressor quantizes the modules that our plan for vLLM does, GPTQ on the same tokens of the default calibration
text; llama-quantize starts from our BF16 file. KLD, perplexity and agreement are against BF16 in float32,
on windows of the default evaluation text, with FP8's activations quantized as vLLM quantizes them. The column
llama-perplexity is its own KLD of a file against that BF16 file, on its own windows of the text: BOS and 511 tokens, of
which it scores the latter half.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from convert import processor
from domains import CTX, EVALUATED
from quality import Evaluator, ours, peers
from safetensors.torch import load_file, save_file

import dsv2quant
from dsv2quant import __version__
from dsv2quant.bench.device import append
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.evaluation.divergence import summarize
from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.formats.schemes import UNQUANTIZED
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.text.calibration import standard_library, windows
from dsv2quant.text.text import python_topics
from dsv2quant.text.tokenizer import Tokenizer

GROUP = 128
# Our recipe, and the method of llm-compressor that makes the same scheme.
RECIPES = {"fp8-channel": "fp8-channel", "fp8-block": "fp8-block", "int4-pure": "gptq"}
LLAMA_CPP = "llama.cpp 0c1e57098, of llama-cpp-python 0.3.36"
MIX, PRESET = "Q4_K_M", "DSV2_Q4_K_M"


class LlamaCpp:
    """llama.cpp's tools on one model: its BF16 file, and the logits that others are compared with."""

    def __init__(self, tools: Path, model: Path, scratch: Path) -> None:
        self._tools, self._text, self._logits = tools, scratch / "topics.txt", scratch / "logits"
        self._source = scratch / "bf16.gguf"
        self._text.write_text(python_topics().content)
        dsv2quant.convert(model, self._source, gguf="BF16", force=True)
        self._perplexity(self._source, "--kl-divergence-base", self._logits)

    def quantize(self, out: Path) -> None:
        self._run("quantize", self._source, out, MIX, os.cpu_count())

    def divergence(self, file: Path) -> str:
        printed = self._perplexity(file, "--kl-divergence", "--kl-divergence-base", self._logits)
        found = re.search(r"^Mean +KLD: +([\d.]+) ± +([\d.]+)", printed, re.MULTILINE)
        if found is None:
            sys.exit(f"llama-perplexity of {file}: no KLD in what it printed:\n{printed[-2000:]}")
        return f"{float(found[1]):.4f} ± {float(found[2]):.4f}"

    def _perplexity(self, file: Path, *words: object) -> str:
        given = ("-m", file, "-f", self._text, "-c", CTX, "--chunks", EVALUATED, "-t", os.cpu_count())
        return self._run("perplexity", *given, *words)

    def _run(self, tool: str, *words: object) -> str:
        command = [str(self._tools / f"llama-{tool}"), *map(str, words)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        printed = ran.stdout.decode(errors="replace")  # it cuts long values within characters
        if ran.returncode:
            sys.exit(f"llama-{tool} failed:\n{printed[-2000:]}")
        return printed


def respell(folder: Path) -> None:
    """llm-compressor's FP8_BLOCK in DeepSeek-V3's spelling, which we read: the same codes and scales."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        scales = {name for name in tensors if name.endswith(".weight_scale")}
        spelled = {f"{name}_inv" if name in scales else name: tensors[name] for name in tensors}
        save_file({k: v.float() if k.endswith("_scale_inv") else v for k, v in spelled.items()}, path)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    ignored = config["quantization_config"]["ignore"]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ignored,
    }
    file.write_text(json.dumps(config))


class Table:
    """Rows of results on one model."""

    def __init__(self, model: Path, count: int) -> None:
        self._name, self._windows = model.name, count
        self._size = sum(weight.spec.size for weight in open_checkpoint(model).weights)
        self._evaluate = Evaluator(model, weight_only=False)
        self.rows: list[dict[str, Any]] = []

    def add(
        self, tool: str, artifact: str, versions: str, out: Path, theirs: str = "", calibrated: bool = False
    ) -> None:
        found = self._evaluate.compare(out)
        distance = summarize(found)
        files = [out] if out.is_file() else out.glob("*.safetensors")
        row = {
            "model": self._name,
            "artifact": artifact,
            "tool": tool,
            "bits/weight": f"{8 * sum(file.stat().st_size for file in files) / self._size:.3f}",
            "KLD": f"{distance.kld.mean:.4f}",
            "stderr": f"{distance.kld.stderr:.4f}",
            "ppl": f"{math.exp(found.nll.mean()):.3f}",
            "ppl of BF16": f"{math.exp(found.reference_nll.mean()):.3f}",
            "same top-1": f"{distance.top1_agreement.value:.4f}",
            "llama-perplexity": theirs,
            "calibrated on": self._windows * CTX if calibrated else 0,
            "evaluated": self._evaluate.tokens,
            "hardware": f"{processor()}, {os.cpu_count()} cores",
            "versions": versions,
        }
        print("  ".join(f"{key} {value}" for key, value in list(row.items())[:-2]), file=sys.stderr, flush=True)
        self.rows.append(row)


def beside_llm_compressor(model: Path, table: Table, options: argparse.Namespace) -> None:
    checkpoint, out, tokens = open_checkpoint(model), options.scratch / "out", options.scratch / "ids.npy"
    ids = windows(standard_library(), Tokenizer.open(model), options.windows, CTX, seed=0)
    np.save(tokens, ids)
    for name, method in RECIPES.items():
        plan = make_plan(checkpoint, recipe.builtin(name), for_targets=("vllm",))
        kept = [entry.spec.module for entry in plan.entries if entry.scheme in UNQUANTIZED]
        shutil.rmtree(out, ignore_errors=True)
        table.add("dsv2quant", name, ours(plan, ids, out).versions, out, calibrated=method == "gptq")
        shutil.rmtree(out)
        given = ["--tokens", tokens, "--method", method, "--group-size", GROUP, *(f"--ignore={each}" for each in kept)]
        made = peers(options.peer, "llmcompressor_oneshot.py", model, out, *given)
        if name == "fp8-block":
            respell(out)
        table.add("llm-compressor", name, made.versions, out, calibrated=method == "gptq")
        shutil.rmtree(out)


def beside_llama_cpp(model: Path, table: Table, options: argparse.Namespace) -> None:
    llama = LlamaCpp(options.llama_cpp, model, options.scratch)
    out, own = options.scratch / "out.gguf", options.scratch / "own.gguf"
    versions = f"dsv2quant {__version__}"
    llama.quantize(out)
    dsv2quant.convert(model, own, gguf=MIX, force=True)
    same = own.read_bytes() == out.read_bytes()
    table.add("either, the same bytes" if same else "llama.cpp", MIX, LLAMA_CPP, out, theirs=llama.divergence(out))
    if not same:
        table.add("dsv2quant", MIX, versions, own, theirs=llama.divergence(own))
    if open_checkpoint(model).config.is_mla:
        dsv2quant.convert(model, own, gguf=PRESET, force=True)
        table.add("dsv2quant", PRESET, versions, own, theirs=llama.divergence(own))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--peer", help="Python of llm-compressor's environment: compare FP8 and INT4")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's tools: compare GGUF")
    parser.add_argument("--windows", type=int, default=128, help="of calibration")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        table = Table(model, options.windows)
        if options.peer:
            beside_llm_compressor(model, table, options)
        if options.llama_cpp:
            beside_llama_cpp(model, table, options)
        append(options.results, table.rows)


if __name__ == "__main__":
    main()
