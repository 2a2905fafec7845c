"""Every GGUF block type that has kernels, by Triton's interpreter against the CPU's encoder: a program of its own,
since Triton reads TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python tests/gguf_interpreted.py

Prints one JSON object: for each type, without and with importance, the names of the cases whose bytes differ.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from gguf_cases import extreme_matrices, importances

from dsv2quant.formats.gguf import blocks
from dsv2quant.kernels import gguf_encode
from dsv2quant.kernels.gguf import lanes, scales
from dsv2quant.kernels.gguf_encode import ENCODED, encode

COLS = 512
# Types that differ from another by constants alone are left to the tests on a GPU.
SKIPPED = {("Q5_0", True), ("Q5_1", True), ("Q5_K", True), ("IQ4_NL", True)}


def cases() -> dict[str, np.ndarray]:
    """Up to 8 rows [rows, 512] of each of gguf_cases' matrices."""
    found = extreme_matrices()
    return {name: x.reshape(-1)[: min(x.size // COLS, 8) * COLS].reshape(-1, COLS) for name, x in found.items()}


def importance() -> np.ndarray:
    """float32 [512]: of many sizes, then half of them zero, with two sub-blocks all zero."""
    _, many, half = importances(COLS)
    assert many is not None
    assert half is not None
    out = np.concatenate([many[: COLS // 2], half[COLS // 2 :]])
    out[96:160] = 0
    return out


def main() -> None:
    np.seterr(all="ignore")
    for module in (lanes, scales):
        module.LANES = 4096  # one program: the interpreter's time is that of its steps, whatever their width
    gguf_encode.ELEMENTS = 1 << 16
    by_case = cases()
    x = np.concatenate(list(by_case.values()))
    names = np.repeat(list(by_case), [len(rows) for rows in by_case.values()])
    different = {}
    for name in ENCODED:
        for weights in (None, importance()):
            if (name, weights is not None) in SKIPPED:
                continue
            got = encode(name, torch.from_numpy(x), None if weights is None else torch.from_numpy(weights))
            off = (got.numpy() != blocks.encode(name, x, weights)).any(1)
            different[f"{name} {'importance' if weights is not None else 'plain'}"] = sorted(set(names[off].tolist()))
    print(json.dumps(different))


if __name__ == "__main__":
    main()
