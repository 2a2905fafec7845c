"""What stands between the products of a decode step, by Triton's interpreter against its references: a program of its
own, since Triton reads TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python tests/fused_interpreted.py

Prints one JSON object: of each operation the cases, with what is wrong in them. Results are written over NaN.
"""

from __future__ import annotations

import itertools
import json

import torch
from fused_cases import GRANULARITIES, absorb_faults, latent_faults, norm_faults, poisoned, silu_faults

from dsv2quant.kernels.activations import silu_mul

DTYPES = (torch.float32, torch.float16)
STORED = (torch.float8_e4m3fn, torch.float8_e5m2)


def refusal() -> str:
    """What bfloat16 is told here."""
    try:
        silu_mul(*torch.zeros(2, 1, 64, dtype=torch.bfloat16))
    except ValueError as error:
        return str(error)
    return "none"


def main() -> None:
    torch.empty = poisoned
    found: dict[str, dict[str, list[str]]] = {"add_norm": {}, "silu_mul": {}, "latents": {}, "absorb": {}}
    for granularity, dtype in itertools.product((None, *GRANULARITIES), DTYPES):
        for case in ((5, 300, 3, True), (1, 256, 0, True), (3, 640, 2, False), (2, 40, 0, False)):
            found["add_norm"][f"{case} {granularity} {dtype}"] = norm_faults(*case, granularity, dtype, "cpu")
        for case in ((5, 300, None), (1, 2176, 2184), (2, 40, 48)):
            found["silu_mul"][f"{case} {granularity} {dtype}"] = silu_faults(*case, granularity, dtype, "cpu")
    for dtype in DTYPES:
        for stored in (dtype, *STORED):
            for case in (([0, 6, 3, 7, -1, 100], 20, 16, 8, 48, False), ([6], 2, 24, 12, 64, True)):
                found["latents"][f"{case} {stored} {dtype}"] = latent_faults(*case, stored, dtype, "cpu")
        for case in ((1, 3, 32, 128, 64), (5, 2, 24, 40, 72), (33, 2, 16, 256, 160), (1, 2, 144, 24, 144)):
            found["absorb"][f"{case} {dtype}"] = absorb_faults(*case, dtype, "cpu")
    print(json.dumps({"faults": found, "refusal": refusal()}))


if __name__ == "__main__":
    main()
