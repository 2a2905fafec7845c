"""MLA decoding by Triton's interpreter against its reference: a program of its own, since Triton reads TRITON_INTERPRET
when it is imported.

    TRITON_INTERPRET=1 python tests/mla_interpreted.py

Prints one JSON object: of each case the relative error, in the largest of its sequences.
"""

from __future__ import annotations

import json

import torch
from mla_cases import inputs, off, poisoned

from dsv2quant.kernels.mla_decode import Blocks, mla_decode

LENGTHS = [1, 0, 33, 64, 70, 16]
STORED = {"float16": torch.float16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def main() -> None:
    torch.Tensor.new_empty = poisoned
    errors = {}
    for name, stored in STORED.items():
        for rank, rope, heads in ((64, 16, 4), (48, 8, 20)):
            given = inputs(6, heads, LENGTHS, 80, rank, rope, torch.float16, stored, "cpu")
            for splits in (1, 7) if stored == torch.float16 else (3,):
                got = mla_decode(*given, blocks=Blocks(16, 16, splits, 4, 2))
                errors[f"{name} {rank}+{rope}, {splits} splits"] = off(got, given)
    errors["chosen"] = off(mla_decode(*given, longest=70, dtype=torch.float16), given)
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
