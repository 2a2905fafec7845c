"""Numbers and sizes of ggml's tensor types: the gguf library's, and those that its releases don't know yet.

Sources: ggml/include/ggml.h (enum ggml_type), ggml/src/ggml-common.h (the structs of blocks).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants


class BlockType(NamedTuple):
    """`values` consecutive values of a row are stored in `bytes` bytes."""

    values: int
    bytes: int


NUMBERS = {kind.name: int(kind) for kind in GGMLQuantizationType} | {"Q1_0": 41, "Q2_0": 42}
NAMES = {number: name for name, number in NUMBERS.items()}
SIZES = {kind.name: BlockType(*size) for kind, size in GGML_QUANT_SIZES.items()}
SIZES |= {"Q1_0": BlockType(128, 18), "Q2_0": BlockType(64, 18)}
_FEW_BITS = {"Q1_0": 1, "Q2_0": 2}


def dequantize(name: str, data: np.ndarray) -> np.ndarray:
    """uint8 [rows, bytes of a row] → float32 [rows, cols], as ggml's dequantize_row_* has it."""
    if name in _FEW_BITS:
        return _few_bits(data, _FEW_BITS[name])
    values: np.ndarray = quants.dequantize(data, GGMLQuantizationType[name])
    return values


def _few_bits(data: np.ndarray, bits: int) -> np.ndarray:
    """A block is a float16 d, then codes of `bits` bits, the lowest first: one is −d or d, two are (code − 1) · d."""
    blocks = data.reshape(len(data), -1, 18)
    d = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)[..., None]
    codes = blocks[..., 2:, None] >> np.arange(0, 8, bits, dtype=np.uint8) & (2**bits - 1)
    signed = codes.astype(np.float32) * (2 if bits == 1 else 1) - 1
    values: np.ndarray = (signed * d).reshape(len(data), -1)
    return values
