"""Plain attention's decoding by Triton's interpreter against its references: a program of its own, since Triton reads
TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python tests/gqa_interpreted.py

Prints one JSON object: of each case of attention the relative error, in the largest of its sequences, and of each that
fills the cache what is wrong.
"""

from __future__ import annotations

import json

import torch
from gqa_cases import append_faults, inputs, off, poisoned

from dsv2quant.kernels.gqa_decode import Blocks, gqa_decode

LENGTHS = [0, 33, 48, 1]
POSITIONS = [0, 6, 7, -1, 100]
STORED = {"float16": torch.float16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def main() -> None:
    torch.Tensor.new_empty = poisoned
    errors, faults = {}, {}
    for name, stored in STORED.items():
        for heads, groups, width in ((3, 3, 10), (12, 2, 48)):
            given = inputs(heads, groups, width, LENGTHS, 50, torch.float16, stored, "cpu")
            for splits in (1, 5) if stored == torch.float16 else (2,):
                got = gqa_decode(*given, blocks=Blocks(16, splits, 4, 2))
                errors[f"{name} {heads}/{groups} heads of {width}, {splits} splits"] = off(got, given)
        for dtype, sizes in ((torch.float16, (20, 2, 48)), (torch.float32, (3, 3, 10))):
            kind = stored if stored.itemsize == 1 else dtype
            faults[f"{name} {sizes} {dtype}"] = append_faults(POSITIONS, *sizes, kind, dtype, "cpu")
    errors["chosen"] = off(gqa_decode(*given, longest=48), given)
    print(json.dumps({"errors": errors, "faults": faults}))


if __name__ == "__main__":
    main()
