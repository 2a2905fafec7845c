"""INT4, INT3 and INT2 beside AutoRound's: one checkpoint, the same calibration tokens, one evaluator, one run.

    python -m venv peer/.venv && peer/.venv/bin/pip install -r benchmarks/peers/requirements-autoround.txt
    python benchmarks/autoround.py --peer peer/.venv/bin/python --scratch DIR --results benchmarks/results/quality.csv

Groups of 64 on both sides, of the same modules: in INT4 all linears but kv_b_proj, router, head, and kv_a_proj, whose
144 rows AutoRound leaves as they are; in INT3 and INT2 the routed experts. The rest is as in quality.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from quality import CTX, MODEL, TARGETS, Evaluator, Made, ours, peers

from dsv2quant.bench.device import append
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.text.calibration import standard_library, windows
from dsv2quant.text.tokenizer import Tokenizer

GROUP = 64
# Bits, our recipe, rules before its own, and what AutoRound leaves.
ARMS: tuple[tuple[int, str, str, tuple[str, ...]], ...] = (
    (4, "int4-pure", "  - {roles: [kv_a_proj_with_mqa], scheme: bf16}\n", ("kv_b_proj",)),
    (3, "int3-experts", "", ("self_attn", "shared_experts", "layers.0.mlp")),
    (2, "int2-experts", "", ("self_attn", "shared_experts", "layers.0.mlp")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="Python of AutoRound's environment")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    ids = windows(standard_library(), Tokenizer.open(MODEL), options.windows, CTX, seed=0)
    tokens, out = options.scratch / "ids.npy", options.scratch / "out"
    np.save(tokens, ids)
    evaluate = Evaluator()
    rows: list[dict[str, Any]] = []

    def record(tool: str, method: str, made: Made) -> None:
        row = {"tool": tool, "method": method, "group": GROUP, "windows": len(ids), "bits/weight": f"{made.bits:.3f}"}
        row |= evaluate(out) | {"rounding kept": made.kept, "seconds": f"{made.seconds:.1f}", "cores": os.cpu_count()}
        rows.append(row | {"evaluated": evaluate.tokens, "versions": made.versions})
        print("  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr)
        shutil.rmtree(out)

    for bits, name, rules, left in ARMS:
        given = ["--tokens", tokens, "--bits", bits, "--group-size", GROUP, *(f"--ignore={each}" for each in left)]
        what = "pure, kv_a in BF16" if rules else name
        record("AutoRound", f"{what}, 200 steps", peers(options.peer, "autoround.py", MODEL, out, *given))
        text = recipe.builtin(name, method="gptq", group_size=GROUP).text.replace("rules:\n", f"rules:\n{rules}", 1)
        plan = make_plan(open_checkpoint(MODEL), recipe.parse(text, name), for_targets=TARGETS)
        record(f"dsv2quant {what}", "gptq", ours(plan, ids, out))
    append(options.results, rows)


if __name__ == "__main__":
    main()
