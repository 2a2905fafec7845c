"""The INT4 experts' kernels by Triton's interpreter against their torch references: a program of its own, since Triton
reads TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python tests/int4_experts_interpreted.py

Prints one JSON object: the relative error of each case.
"""

from __future__ import annotations

import json

import torch
from int4_cases import error
from int4_experts_cases import random_choice, random_experts

from dsv2quant.kernels.int4_experts import Config, down, gate_up
from dsv2quant.kernels.reference import down_int4, gate_up_int4, sort_pairs

CASES = {  # experts, hidden, width, group, zeros, scales, tokens, k, block, config, split of down
    "group 128": (4, 256, 128, 128, False, torch.bfloat16, 3, 2, 16, Config(64, 1, 4, 3), 1),
    "split, zeros, float16 scales": (4, 384, 192, 64, True, torch.float16, 3, 2, 16, Config(64, 1, 4, 3), 3),
    "rows of two blocks, tails": (3, 384, 192, 64, False, torch.bfloat16, 5, 2, 16, Config(128, 1, 4, 3), 2),
    "group 32, all pairs to one expert": (3, 96, 64, 32, True, torch.bfloat16, 20, 2, 16, Config(64, 1, 4, 3), 2),
    "whole rows, columns beyond blocks": (3, 200, 72, None, True, torch.bfloat16, 4, 2, 32, Config(64, 1, 4, 2), 1),
    "held, whole": (2, 256, 256, 64, True, torch.bfloat16, 2, 2, 16, Config(64, 1, 4, 1, 2), 2),
    "held, tails, split": (2, 224, 160, 32, True, torch.float16, 2, 2, 16, Config(64, 1, 4, 1, 5), 3),
    "held, rows of two blocks": (2, 160, 96, 32, False, torch.bfloat16, 3, 2, 16, Config(128, 1, 8, 1, 4), 1),
    "held, whole rows, columns beyond blocks": (
        2, 328, 72, None, True, torch.bfloat16, 2, 2, 32, Config(64, 1, 4, 1, 2), 1,
    ),
    "chosen, split": (8, 128, 256, 64, False, torch.bfloat16, 2, 4, 16, None, 2),
    "chosen": (8, 256, 128, 64, False, torch.bfloat16, 2, 4, 16, None, 1),
}  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    found: dict[str, float] = {}
    for name, (experts, hidden, width, group, zeros, scales, tokens, k, block, config, split) in CASES.items():
        stack = random_experts(experts, hidden, width, group, zeros, scales)
        weights, chosen = random_choice(tokens, experts, k)
        if "one expert" in name:
            chosen.fill_(1)
        routes = sort_pairs(chosen, experts, block)
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(tokens, hidden).to(dtype)
            h = gate_up(x, routes, k, stack, config)
            outputs = down(h, weights, routes, stack, config and config._replace(split=split))
            found[f"gate_up {name} {dtype}"] = error(h, gate_up_int4(x, routes, k, stack))
            expected = down_int4(h, weights, routes, stack)
            found[f"down {name} {dtype}"] = error(outputs.unflatten(1, (k, split)).sum(2), expected)
    try:
        gate_up(x.bfloat16(), routes, k, stack)
    except ValueError as refused:
        found[str(refused)] = 0.0
    print(json.dumps(found))


if __name__ == "__main__":
    main()
