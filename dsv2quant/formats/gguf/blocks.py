"""The block types of GGUF: their sizes, and a matrix encoded into and decoded from them."""

from __future__ import annotations

from collections.abc import Collection
from math import prod

import numpy as np
from gguf import GGMLQuantizationType, quants

from dsv2quant.formats.cpu import amax_bits
from dsv2quant.formats.gguf import iq1, kquants, lattice, legacy, ternary
from dsv2quant.formats.gguf.grids import grid
from dsv2quant.formats.gguf.layouts import HALVES
from dsv2quant.formats.schemes import CODECS
from dsv2quant.storage.gguf import SIZES, BlockType, dequantize

# What can be encoded. ggml/src/ggml-common.h: the static_asserts beside each block's struct.
TYPES = {
    "F32": BlockType(1, 4), "F16": BlockType(1, 2), "BF16": BlockType(1, 2),
    "Q8_0": BlockType(32, 34), "Q4_0": BlockType(32, 18), "Q4_1": BlockType(32, 20),
    "Q5_0": BlockType(32, 22), "Q5_1": BlockType(32, 24),
    "Q2_K": BlockType(256, 84), "Q3_K": BlockType(256, 110),
    "Q4_K": BlockType(256, 144), "Q5_K": BlockType(256, 176), "Q6_K": BlockType(256, 210),
    "IQ4_NL": BlockType(32, 18), "IQ4_XS": BlockType(256, 136),
    "IQ3_S": BlockType(256, 110), "IQ3_XXS": BlockType(256, 98), "IQ2_S": BlockType(256, 82),
    "IQ2_XS": BlockType(256, 74), "IQ2_XXS": BlockType(256, 66), "IQ1_M": BlockType(256, 56),
    "IQ1_S": BlockType(256, 50),
    "TQ1_0": BlockType(256, 54), "TQ2_0": BlockType(256, 66), "MXFP4": BlockType(32, 17),
}  # fmt: skip
UNWEIGHTED = ("F32", "F16", "BF16", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")  # have no use for importance
NEEDY = ("IQ2_XXS", "IQ2_XS", "IQ1_S")  # can't do without (ggml_quantize_requires_imatrix)


def _halves(*offsets: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(((offset + 1, 0x7C),) for offset in offsets)


# What can be decoded, and where in a block the exponents of its scales lie: a scale is NaN or infinite where its bytes,
# (offset, mask), have all bits of their masks set. Structs of ggml/src/ggml-common.h.
_EXPONENTS = {
    "F32": (((2, 0x80), (3, 0x7F)),), "F16": _halves(0), "BF16": (((0, 0x80), (1, 0x7F)),),
    **{name: _halves(*offsets) for name, offsets in HALVES.items()},
    "IQ1_M": (((53, 0xC0), (55, 0x70)),), "MXFP4": (((0, 0xFF),),), "NVFP4": (),
}  # fmt: skip
DECODABLE = tuple(_EXPONENTS)
# The largest magnitude in any block of several values but MXFP4's, that of Q6_K and IQ4_XS. The search for scales
# squares values: much larger ones overflow there, and can end as zeros.
LARGEST = 65504.0 * 127 * 32
_ROWS = 256  # decoded at a time


def nbytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of `shape` (rows last, as numpy has it) in a block type of TYPES or DECODABLE.

    Raises ValueError where the last dimension is not a multiple of the type's block.
    """
    values, size = SIZES[name]
    if shape[-1] % values:
        raise ValueError(f"{name} stores blocks of {values} values: a row of {shape[-1]} is not whole blocks")
    return prod(shape) // values * size


def encode(name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """float32 [rows, cols] → uint8 [rows, bytes of a row], the bytes of ggml_quantize_chunk on x86-64.

    `importance` float32 [cols] is the mean square of each input channel (llama-imatrix); types of UNWEIGHTED have no
    use for it. x must be finite. One thread; the GIL is released.
    Raises ValueError where cols is not a multiple of the type's block, importance has another length, or is not there
    for a type of NEEDY.
    """
    rows, cols = x.shape
    row_bytes = nbytes(name, (cols,))
    if importance is None and name in NEEDY:
        raise ValueError(f"{name} needs importance")
    if importance is not None and importance.shape != (cols,):
        raise ValueError(f"importance has shape {importance.shape}; {cols} columns need ({cols},)")
    x = np.ascontiguousarray(x, np.float32)
    weights = np.ascontiguousarray(np.empty(0) if importance is None else importance, np.float32)
    out = np.empty((rows * cols // TYPES[name].values, TYPES[name].bytes), np.uint8)
    match name:
        case "F32":
            return x.view(np.uint8)
        case "F16":
            with np.errstate(over="ignore"):
                return x.astype(np.float16).view(np.uint8)
        case "BF16":
            return quants.quantize(x, GGMLQuantizationType.BF16)
        case "Q8_0":
            legacy.encode_q8_0(x.reshape(-1, 32), out)
        case "Q4_0" | "Q4_1" | "Q5_0" | "Q5_1":
            legacy.encode_q45(x, weights, int(name[1]), name.endswith("_1"), out)
        case "Q2_K":
            kquants.encode_q2_k(x.reshape(-1, 256), weights.reshape(-1, 256), out)
        case "Q3_K":
            kquants.encode_q3_k(x.reshape(-1, 256), weights.reshape(-1, 256), out)
        case "Q4_K" | "Q5_K":
            kquants.encode_q45_k(x.reshape(-1, 256), weights.reshape(-1, 256), int(name[1]), out)
        case "Q6_K":
            kquants.encode_q6_k(x.reshape(-1, 256), weights.reshape(-1, 256), out)
        case "IQ4_NL" | "IQ4_XS":
            values = TYPES[name].values
            legacy.encode_iq4(x.reshape(-1, values), weights.reshape(-1, values), out)
        case "IQ2_XXS" | "IQ2_XS" | "IQ2_S" | "IQ3_XXS" | "IQ3_S":
            lattice.encode(name, x.reshape(-1, 256), weights.reshape(-1, 256), out)
        case "IQ1_S":
            iq1.encode_iq1_s(x.reshape(-1, 256), weights.reshape(-1, 256), grid("IQ1_S"), out)
        case "IQ1_M":
            iq1.encode_iq1_m(x.reshape(-1, 256), weights.reshape(-1, 256), grid("IQ1_S"), out)
        case "MXFP4":
            legacy.encode_mxfp4(x.reshape(-1, 32), out)
        case "TQ1_0":
            ternary.encode_tq1_0(x.reshape(-1, 256), out)
        case "TQ2_0":
            ternary.encode_tq2_0(x.reshape(-1, 256), out)
    return out.reshape(rows, row_bytes)


def count_blocks(name: str, data: np.ndarray) -> int:
    """How many blocks a row of `data` has, uint8 [rows, bytes of a row] of a type of DECODABLE.

    Raises ValueError where a row is not whole blocks.
    """
    size, row_bytes = SIZES[name].bytes, data.shape[-1]
    if row_bytes % size:
        raise ValueError(f"{name} stores blocks of {size} bytes: a row of {row_bytes} is not whole blocks")
    return int(row_bytes // size)


def decode(name: str, data: np.ndarray) -> np.ndarray:
    """uint8 [rows, bytes of a row] of a type of DECODABLE → float32 [rows, cols], as ggml's dequantize_row does.

    Raises ValueError where a row is not whole blocks.
    """
    out = np.empty((len(data), count_blocks(name, data) * SIZES[name].values), np.float32)
    for first in range(0, len(data), _ROWS):  # the library would hold everything twice
        out[first : first + _ROWS] = dequantize(name, data[first : first + _ROWS])
    return out


def keeps(name: str, scheme: str, suffixes: Collection[str]) -> bool:
    """Whether a weight that has these parts in a scheme is on a type's grid, so that `of_int4` is without loss."""
    return name == "Q4_0" and CODECS["int4-g32"].keeps(scheme, suffixes)


def of_int4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Q4_0 of codes (int8 [rows, cols], −8 … 7) and scales (float32 [rows, cols / 32]), which are rounded to float16:
    those in BF16 are float16's from 2^-17 to 65504."""
    nibbles = (codes + np.int8(8)).view(np.uint8).reshape(*scales.shape, 2, 16)
    data = np.empty((*scales.shape, SIZES["Q4_0"].bytes), np.uint8)
    with np.errstate(over="ignore"):  # `first_bad_block` finds infinity
        data[..., :2] = scales.astype(np.float16)[..., None].view(np.uint8)
    data[..., 2:] = nibbles[..., 0, :] | nibbles[..., 1, :] << 4
    return data.reshape(len(codes), -1)


def holds(name: str, x: np.ndarray, data: np.ndarray) -> bool:
    """Whether no value of x (float32) was too large for `data`, what `encode` made of it."""
    if TYPES[name].values > 1 and amax_bits(x.view(np.uint32)) > np.float32(LARGEST).view(np.uint32):
        return False
    return first_bad_block(name, data) is None


def first_bad_block(name: str, data: np.ndarray) -> int | None:
    """The first block of `data` (uint8, whole blocks of a type of DECODABLE) with a scale that is NaN or infinite, of
    plain types the first such value: what ggml_validate_row_data refuses. None where all are finite."""
    rows = data.reshape(-1, SIZES[name].bytes)
    bad = np.zeros(len(rows), bool)
    for exponent in _EXPONENTS[name]:
        bad |= np.logical_and.reduce([rows[:, offset] & mask == mask for offset, mask in exponent])
    return int(bad.argmax()) if bad.any() else None
