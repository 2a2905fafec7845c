"""A prompt's kernels by Triton's interpreter against their references: a program of its own, since Triton reads
TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python tests/prompts_interpreted.py

Prints one JSON object: of each operation the cases, with what is wrong in them. Results are written over NaN.
"""

from __future__ import annotations

import json

import torch
from fused_cases import GRANULARITIES, poisoned
from prompts_cases import keys_faults, prompt_faults
from routing_cases import choices, logits_off, router_operands, same

from dsv2quant.kernels import reference, router, routing

DTYPES = (torch.float32, torch.float16)
SORTED = ((1400, 6, 160, 64), (3000, 6, 64, 128), (4200, 2, 3, 16), (8300, 1, 1, 8))


def main() -> None:
    torch.empty = poisoned
    found: dict[str, dict] = {"prompt": {}, "keys": {}, "logits": {}, "parts": {}, "sorted": {}}
    for dtype in DTYPES:
        for granularity in (None, *GRANULARITIES):
            for case in (
                (2, 5, (3, 16, 8, 48), False, (9, 2), granularity, dtype),
                (1, 7, (20, 24, 12, 144), True, (7, 0), granularity, torch.float8_e4m3fn),
                (3, 2, (33, 16, 8, 300), False, (4, 1), granularity, torch.float8_e5m2),
                (2, 3, (0, 0, 8, 64), False, (3, 0), granularity, None),
            ):
                found["prompt"][f"{case} {dtype}"] = prompt_faults(*case, dtype, "cpu")
        for case in ((5, 3, 16, 8, 24), (1, 33, 24, 12, 8)):
            found["keys"][f"{case} {dtype}"] = keys_faults(*case, dtype, "cpu")
    for case in ((65, 4, 64), (130, 70, 200), (70, 7, 513 * 4)):
        x, weight = router_operands(*case, torch.float32)
        parts = router.split(weight)
        found["logits"][str(case)] = logits_off(router.many_logits(x, parts.float()), x, weight)
        rounded = weight.bfloat16().float()
        found["parts"][str(case)] = [len(parts), len(router.split(rounded))]
        assert torch.equal(router.split(rounded)[0].float(), rounded)
    for case in SORTED:
        chosen = choices(*case[:3])
        want = reference.sort_pairs(chosen, *case[2:])
        found["sorted"][str(case)] = same(routing.sort_pairs(chosen, *case[2:]), want)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
