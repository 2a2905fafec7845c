"""INT4, INT3 and INT2 beside AutoRound's, GPTQModel's and llm-compressor's AWQ: one checkpoint, the same calibration
tokens, one evaluator, one run.

    python -m venv peer/gptqmodel && peer/gptqmodel/bin/pip install -r benchmarks/peers/requirements-gptqmodel.txt
    python benchmarks/beside.py --gptqmodel peer/gptqmodel/bin/python --scratch DIR --results FILE.csv

Each peer has an environment of its own, and those that are given are run. The same modules and groups on both sides: in
INT4 all linears but kv_b_proj, router and head, beside AutoRound also but kv_a_proj, whose 144 rows it leaves as they
are; in INT3 and INT2 the routed experts. The rest is as in quality.py.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from quality import CTX, MODEL, Evaluator, Made, ours, peers, planned

from dsv2quant.bench.device import append
from dsv2quant.text.calibration import standard_library, windows
from dsv2quant.text.tokenizer import Tokenizer


class Arm(NamedTuple):
    """What is quantized: its name in the results, bits, columns of a group, our recipe, rules before its own, and the
    parts of names by which a peer leaves the rest."""

    what: str
    bits: int
    group: int
    recipe: str
    rules: str
    left: tuple[str, ...]


class Peer(NamedTuple):
    """A peer: its name in the results, its script, what the script wants before a part of a name, its options by
    method, and what it is compared on."""

    tool: str
    script: str
    before: str
    methods: Mapping[str, tuple[str, ...]]
    arms: tuple[Arm, ...]


PURE_64 = Arm("pure", 4, 64, "int4-pure", "", ("kv_b_proj",))
PURE_128 = Arm("pure", 4, 128, "int4-pure", "", ("kv_b_proj", "layers.0.mlp.down_proj"))
KV_A = PURE_64._replace(what="pure, kv_a in BF16", rules="  - {roles: [kv_a_proj_with_mqa], scheme: bf16}\n")
INT3, INT2 = (
    Arm(f"int{bits}-experts", bits, 64, f"int{bits}-experts", "", ("self_attn", "shared_experts", "layers.0.mlp"))
    for bits in (3, 2)
)
PEERS = {
    "autoround": Peer("AutoRound", "autoround.py", "", {"200 steps": ()}, (KV_A, INT3, INT2)),
    "gptqmodel": Peer(
        "GPTQModel",
        "gptq_model.py",
        "",
        {"gptq": (), "gptq, mse": ("--mse", "2.4"), "gptq, mse, desc_act": ("--mse", "2.4", "--desc-act")},
        (PURE_64, PURE_128, INT3, INT2),
    ),
    "llmcompressor": Peer(
        "llm-compressor",
        "llmcompressor_oneshot.py",
        "re:.*",
        {
            "awq, as registered": ("--method", "awq-registered"),
            "awq": ("--method", "awq"),
            "awq, asymmetric": ("--method", "awq", "--asymmetric"),
        },
        (PURE_64,),  # AWQ divides by zero where what is behind a smoothed module is left unquantized
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, peer in PEERS.items():
        parser.add_argument(f"--{option}", metavar="PYTHON", help=f"Python of {peer.tool}'s environment")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    asked = [(peer, python) for option, peer in PEERS.items() if (python := getattr(options, option))]
    options.scratch.mkdir(parents=True, exist_ok=True)
    ids = windows(standard_library(), Tokenizer.open(MODEL), options.windows, CTX, seed=0)
    tokens, out = options.scratch / "ids.npy", options.scratch / "out"
    np.save(tokens, ids)
    evaluate = Evaluator()

    def record(tool: str, method: str, group: int, made: Made) -> None:
        row: dict[str, Any] = {
            "tool": tool,
            "method": method,
            "group": group,
            "windows": len(ids),
            "bits/weight": f"{made.bits:.3f}",
        }
        row |= evaluate(out) | {"rounding kept": made.kept, "seconds": f"{made.seconds:.1f}", "cores": os.cpu_count()}
        append(options.results, [row | {"evaluated": evaluate.tokens, "versions": made.versions}])
        print("  ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr)
        shutil.rmtree(out)

    for arm in (PURE_64, PURE_128, KV_A, INT3, INT2):
        beside = [(peer, python) for peer, python in asked if arm in peer.arms]
        if not beside:
            continue
        plan = planned(arm.recipe, arm.rules, method="gptq", group_size=arm.group)
        record(f"dsv2quant {arm.what}", "gptq", arm.group, ours(plan, ids, out))
        for peer, python in beside:
            given = ["--tokens", tokens, "--group-size", arm.group, *(f"--ignore={peer.before}{at}" for at in arm.left)]
            for method, more in peer.methods.items():
                bits = ["--bits", arm.bits] if arm.bits != 4 else []
                made = peers(python, peer.script, MODEL, out, *given, *bits, *more)
                record(peer.tool, f"{arm.what}, {method}", arm.group, made)


if __name__ == "__main__":
    main()
