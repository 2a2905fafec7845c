"""INT4 quality and time against llm-compressor: one checkpoint, the same calibration tokens, one evaluator, one run.

    python -m venv peer/.venv && peer/.venv/bin/pip install -r benchmarks/peers/requirements-llmcompressor.txt
    python benchmarks/quality.py --peer peer/.venv/bin/python --scratch DIR --results benchmarks/results/quality.csv

Both sides quantize the same modules: all linears but kv_b_proj, router and head, and at group size 128 not layer 0's
down_proj, whose 704 columns don't fill groups. KLD is against the BF16 checkpoint in float32, weights decoded in
float32, on windows of the default evaluation text; calibration is on the default calibration text. Times are of the
quantization: llm-compressor's `oneshot` call without loading or saving, our whole conversion.
`--tune` instead tunes our GPTQ of group size 64 on 8M tokens of the same text, of which the calibration's come first;
`--by-layers` does so as where the device can't hold the model.
`--few-bits` instead has routed experts alone in INT4, INT3 and INT2, by each method; INT3 and INT2 in groups of
64 also tuned on as many tokens.
`--starved` instead gives GPTQ 2, 4 and 8 windows of 512 tokens, and compares with rounding on tokens neither saw.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from domains import CTX, prose

from dsv2quant import __version__
from dsv2quant.bench.device import append
from dsv2quant.calib import tuning
from dsv2quant.calib.calibration import Calibration, Tuning, needs_calibration, needs_statistics
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.evaluation.divergence import Divergence, Held, Pass, batches_of, compare, run
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import Plan, make_plan
from dsv2quant.text.calibration import standard_library, windows
from dsv2quant.text.tokenizer import Tokenizer

MODEL = Path(__file__).parent.parent / "examples" / "dsv2-mini"
# vLLM would have the experts, which are 128 wide, in groups of 64; SGLang would leave kv_a's 144 rows unquantized.
TARGETS = ("transformers",)


class Made(NamedTuple):
    """An artifact: seconds to make it, bits per weight, matrices for which plain rounding was kept, versions."""

    seconds: float
    bits: float
    kept: str
    versions: str


class Evaluator:
    """KLD from a BF16 checkpoint on token windows, by default of the default evaluation text."""

    def __init__(
        self, model: Path = MODEL, *, weight_only: bool = True, ids: np.ndarray | None = None, device: str = "cpu"
    ) -> None:
        self._options = LoadOptions(torch.float32, device, weight_only=weight_only)
        self._ids = prose(model) if ids is None else ids
        self.tokens = self._ids[:, 1:].size
        self._reference = Held.of(self._pass(self.opened(model)))

    def opened(self, folder: Path) -> Model:
        return Model(open_checkpoint(folder), self._options)

    def compare(self, artifact: Path | Model) -> Divergence:
        model = artifact if isinstance(artifact, Model) else self.opened(artifact)
        return compare(self._pass(model), self._reference, self._ids, 0)

    def __call__(self, folder: Path) -> dict[str, Any]:
        compared = self.compare(folder)
        by_window = compared.kld.mean(1)
        stderr = by_window.std(ddof=1) / math.sqrt(len(by_window))
        return {
            "KLD": f"{by_window.mean():.4f}",
            "stderr": f"{stderr:.4f}",
            "ppl": f"{math.exp(compared.nll.mean()):.3f}",
        }

    def _pass(self, model: Model) -> Pass:
        return run(model, self._ids, batches_of(len(self._ids), 8))


def planned(name: str, rules: str = "", **options: Any) -> Plan:
    """One of our recipes for dsv2-mini, with rules before its own."""
    chosen = recipe.builtin(name, **options)
    if options["group_size"] == 128:
        rules += "  - {roles: [dense.down_proj], scheme: bf16}\n"
    if rules:
        chosen = recipe.parse(chosen.text.replace("rules:\n", f"rules:\n{rules}", 1), name)
    return make_plan(open_checkpoint(MODEL), chosen, for_targets=TARGETS)


def text_of(ids: np.ndarray) -> Calibration:
    """Token windows as a text."""
    return Calibration(ids, "benchmark", "", 0, [])


def ours(plan: Plan, ids: np.ndarray, out: Path, tuned_on: Tuning | None = None, device: str = "cpu") -> Made:
    """The plan's artifact, calibrated on token windows where it needs that, and tuned."""
    calibrates = needs_calibration(plan) or needs_statistics(plan)
    calibration = text_of(ids) if calibrates else None
    result = convert(plan, out, command="", calibration=calibration, tuning=tuned_on, device=device)
    kept = f"{sum(o.kept_rtn for o in result.outcomes)} of {len(result.outcomes)}" if result.outcomes else ""
    versions = f"dsv2quant {__version__}, torch {torch.__version__}"
    return Made(result.seconds, 8 * plan.bytes_out / plan.parameters, kept, versions)


def peers(python: str, script: str, model: Path, out: Path, *options: object) -> Made:
    """What a peer's script makes in its own environment."""
    command = [python, str(Path(__file__).parent / "peers" / script), str(model), "-o", str(out), *map(str, options)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    printed = json.loads(ran.stdout)
    bits = 8 * sum(path.stat().st_size for path in out.glob("*.safetensors"))
    size = sum(weight.spec.size for weight in open_checkpoint(model).weights)
    versions = ", ".join(f"{name} {version}" for name, version in printed["versions"].items())
    return Made(printed["quantize_s"], bits / size, "", versions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="Python of llm-compressor's environment")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--starved", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--by-layers", action="store_true")
    parser.add_argument("--tuned", type=int, default=8_000_000, help="Tokens.")
    parser.add_argument("--device", default="cpu", help="Of what is tuned.")
    parser.add_argument("--few-bits", action="store_true")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    if options.peer is None and not (options.tune or options.few_bits):
        parser.error("--peer goes with all but --tune and --few-bits")
    options.scratch.mkdir(parents=True, exist_ok=True)
    count = max(options.windows, options.tuned // CTX)
    all_ids = windows(standard_library(), Tokenizer.open(MODEL), count, CTX, seed=0)
    evaluate, tuned_on = Evaluator(), Tuning(text_of(all_ids), options.tuned)
    rows: list[dict[str, Any]] = []

    def record(tool: str, method: str, group: int, count: int, made: Made, out: Path) -> None:
        row = {"tool": tool, "method": method, "group": group, "windows": count, "bits/weight": f"{made.bits:.3f}"}
        row |= evaluate(out) | {"rounding kept": made.kept, "seconds": f"{made.seconds:.1f}", "cores": os.cpu_count()}
        rows.append(row | {"evaluated": evaluate.tokens, "versions": made.versions})
        print("  ".join(f"{key} {value}" for key, value in list(row.items())), file=sys.stderr)
        shutil.rmtree(out)

    how = f"tuned on {options.tuned / 10**6:g}M tokens" + ", each layer by itself" * options.by_layers
    if options.by_layers:
        tuning._fits = lambda model, specs, device: False
    if options.tune:
        out, ids = options.scratch / "tuned", all_ids[: options.windows]
        made = ours(planned("int4-pure", method="gptq", group_size=64), ids, out, tuned_on, options.device)
        record("dsv2quant pure", f"gptq, {how}", 64, options.windows, made, out)
        append(options.results, rows)
        return
    if options.few_bits:
        out, ids = options.scratch / "few", all_ids[: options.windows]
        for name, group in itertools.product(("int4-experts", "int3-experts", "int2-experts"), (128, 64, 32)):
            for method in ("rtn", "mse", "gptq"):
                made = ours(planned(name, method=method, group_size=group), ids, out)
                record(f"dsv2quant {name}", method, group, options.windows, made, out)
            if group == 64 and name != "int4-experts":
                made = ours(planned(name, method="gptq", group_size=group), ids, out, tuned_on, options.device)
                record(f"dsv2quant {name}", f"gptq, {how}", group, options.windows, made, out)
        append(options.results, rows)
        return
    counts = [2, 4, 8] if options.starved else [options.windows]
    for count in counts:
        ids, tokens, out = all_ids[:count], options.scratch / "ids.npy", options.scratch / "out"
        np.save(tokens, ids)
        for group in (64,) if options.starved else (64, 128):
            shutil.rmtree(out, ignore_errors=True)
            ignored = [r"--ignore=re:.*kv_b_proj$"] + ["--ignore=model.layers.0.mlp.down_proj"] * (group == 128)
            for method in ("rtn", "gptq"):
                given = ["--tokens", tokens, "--method", method, "--group-size", group, *ignored]
                made = peers(options.peer, "llmcompressor_oneshot.py", MODEL, out, *given)
                record("llm-compressor", method, group, count, made, out)
            for method in ("rtn", "mse", "awq", "gptq"):
                made = ours(planned("int4-pure", method=method, group_size=group), ids, out)
                record("dsv2quant pure", method, group, count, made, out)
            if not options.starved:
                made = ours(planned("int4-mixed", group_size=group), ids, out)
                record("dsv2quant mixed", "gptq", group, count, made, out)
    append(options.results, rows)


if __name__ == "__main__":
    main()
