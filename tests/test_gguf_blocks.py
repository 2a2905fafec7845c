"""GGUF block types: bytes as ggml's C library writes them, and as gguf-py does where it has a quantizer.

tests/golden/gguf_blocks.json holds CRC-32s of what ggml_quantize_chunk (llama.cpp 0c1e57098, ggml/src built by gcc -O3
for x86-64 without -march) gives for the matrices of gguf_cases.py, per type and matrix one for each importance, null
where the type can't be had without. tests/clients/llama_cpp/goldens.py makes it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from gguf_cases import bell, digest, importances, matrices
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2quant.formats.gguf.blocks import DECODABLE, NEEDY, TYPES, decode, encode, first_bad_block, nbytes
from dsv2quant.storage.gguf import NUMBERS, SIZES

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gguf_blocks.json").read_text())
MATRICES = matrices()
PLAIN = ("F32", "F16", "BF16")
QUANTIZED = [name for name in TYPES if name not in PLAIN]
IN_GGUF_PY = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4")


def test_block_sizes_are_those_of_ggml() -> None:
    assert {name: tuple(size) for name, size in TYPES.items()} == {
        name: GGML_QUANT_SIZES[GGMLQuantizationType[name]] for name in TYPES
    }


@pytest.mark.parametrize("case", MATRICES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_are_those_of_ggml(name: str, case: str) -> None:
    x = MATRICES[case]
    for importance, golden in zip(importances(x.shape[1]), GOLDEN[name][case], strict=True):
        if golden is not None:
            assert digest(encode(name, x, importance)) == golden


@pytest.mark.parametrize("name", IN_GGUF_PY)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 5), exponent=st.integers(-20, 10), levels=st.integers(0, 12))
def test_bytes_are_those_of_gguf_py(name: str, seed: int, rows: int, exponent: int, levels: int) -> None:
    x = bell((rows, 768), seed)
    if levels:  # few distinct values: ties
        x = np.rint(x * np.float32(levels)) / np.float32(levels)
    x = x * np.float32(2.0**exponent) + np.float32(0)  # no −0: numpy's min takes either zero, ggml's the first
    expected = quants.quantize(x, GGMLQuantizationType[name])
    np.testing.assert_array_equal(encode(name, x), expected.view(np.uint8))


def test_scales_are_rounded_to_float16_as_numpy_does() -> None:
    """Every float16, every midpoint of two and its float32 neighbours, as the min of a constant Q4_1 block."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves + np.append(halves[1:], np.float32(65536))) / np.float32(2)
    values = np.concatenate([halves, middles, np.nextafter(middles, 0), np.nextafter(middles, np.float32(np.inf))])
    values = np.concatenate([values, -values])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    data = encode("Q4_1", np.repeat(values[:, None], 32, 1))
    np.testing.assert_array_equal(np.ascontiguousarray(data[:, 2:4]).view(np.float16)[:, 0], expected)


@pytest.mark.parametrize("name", QUANTIZED)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(2, 70), weighted=st.booleans(), data=st.data())
def test_a_row_range_encodes_as_in_the_whole(
    name: str, seed: int, rows: int, weighted: bool, data: st.DataObject
) -> None:
    x = bell((rows, 512), seed)
    importance = importances(512)[1] if weighted or name in NEEDY else None
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    np.testing.assert_array_equal(
        encode(name, x[first:last], importance), encode(name, x, importance)[first:last], strict=True
    )


@pytest.mark.parametrize("name", QUANTIZED)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), shift=st.integers(-3, 5), weighted=st.booleans())
def test_a_power_of_two_changes_scales_alone(name: str, seed: int, shift: int, weighted: bool) -> None:
    """Powers of two pass through every rounding while float16 scales stay normal; here they do."""
    x = bell((3, 256), seed) * np.float32(64)
    importance = importances(256)[1] if weighted or name in NEEDY else None
    times = np.float32(2.0**shift)
    np.testing.assert_array_equal(
        decode(name, encode(name, x * times, importance)), decode(name, encode(name, x, importance)) * times
    )


@pytest.mark.parametrize("name", TYPES)
def test_values_on_the_grid_come_back(name: str) -> None:
    """Zeros in every type; in the types of one scale, whole multiples of a power of two up to the last level."""
    importance = importances(256)[1] if name in NEEDY else None
    assert not decode(name, encode(name, np.zeros((2, 256), np.float32), importance)).any()
    last = {"F32": 127, "F16": 127, "BF16": 127, "Q8_0": 127, "Q4_0": 8, "Q5_0": 16, "MXFP4": 4, "TQ1_0": 1,
            "TQ2_0": 1}.get(name)  # fmt: skip
    if last:
        x = (np.arange(512).reshape(2, 256) % last - last).astype(np.float32) * np.float32(0.125)
        x[:, ::32] = -last * np.float32(0.125)
        np.testing.assert_array_equal(decode(name, encode(name, x)), x)


@pytest.mark.parametrize("name", TYPES)
def test_sizes_and_layout_of_the_input(name: str) -> None:
    x, importance = bell((4, 512), 8), importances(512)[1]
    data = encode(name, x, importance)
    assert data.dtype == np.uint8
    assert data.shape == (4, nbytes(name, (512,)))
    assert data.size == nbytes(name, (2, 2, 512))
    assert decode(name, data).shape == x.shape
    np.testing.assert_array_equal(encode(name, np.asfortranarray(x), importance), data)


@pytest.mark.parametrize("name", QUANTIZED)
def test_rows_that_are_not_whole_blocks_are_refused(name: str) -> None:
    cols = TYPES[name].values * 3 // 2
    with pytest.raises(ValueError, match=f"{name} stores blocks of .* a row of {cols} is not whole blocks"):
        encode(name, np.zeros((2, cols), np.float32))
    with pytest.raises(ValueError, match="is not whole blocks"):
        nbytes(name, (2, cols))
    with pytest.raises(ValueError, match="is not whole blocks"):
        decode(name, np.zeros((2, TYPES[name].bytes + 1), np.uint8))
    with pytest.raises(ValueError, match="importance has shape"):
        encode(name, np.zeros((2, 512), np.float32), np.ones(256, np.float32))


@pytest.mark.parametrize("name", NEEDY)
def test_types_that_need_importance_are_refused_without(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs importance"):
        encode(name, np.zeros((2, 256), np.float32))


def random_blocks(name: str, seed: int) -> np.ndarray:
    """uint8 [64, bytes of a block]: any bits, among them scales that are NaN or infinite."""
    size = SIZES[name].bytes
    return np.random.default_rng(seed).integers(0, 256, (64, size), np.uint8)


@pytest.mark.parametrize("name", [name for name in DECODABLE if name not in ("MXFP4", "NVFP4")])
def test_bad_blocks_are_those_that_decode_to_nan_or_infinity(name: str) -> None:
    seen = set()
    for seed in range(20):
        data = random_blocks(name, seed)
        if seed % 2:  # as in a Q4_1, whose scale is finite and whose min is not
            data[:, 1::4] &= 0x3F
        with np.errstate(all="ignore"):
            bad = ~np.isfinite(decode(name, data)).all(1)
        seen |= set(bad.tolist())
        assert first_bad_block(name, data) == (int(bad.argmax()) if bad.any() else None)
        assert first_bad_block(name, data[~bad]) is None
        for block in np.flatnonzero(bad):
            assert first_bad_block(name, data[block]) == 0
    assert seen == {True, False}


def test_exponents_that_are_not_float16() -> None:
    """ggml_validate_row_data refuses a power of two of 0xFF in MXFP4, and takes every scale of NVFP4."""
    data = random_blocks("MXFP4", 0)
    data[:, 0] = np.arange(64) + 192
    assert first_bad_block("MXFP4", data) == 63
    assert first_bad_block("MXFP4", data[:63]) is None
    assert first_bad_block("NVFP4", random_blocks("NVFP4", 0)) is None


def test_one_and_two_bits() -> None:
    """dequantize_row_q1_0 and _q2_0, value by value; the library has neither."""
    for name, values, bits, level in (("Q1_0", 128, 1, (-1, 1)), ("Q2_0", 64, 2, (-1, 0, 1, 2))):
        data = random_blocks(name, 2).reshape(32, -1)
        data[:, 1::18] &= 0x3B  # finite scales
        expected = np.empty((32, 2 * values), np.float32)
        for row in range(32):
            for i in range(2 * values):
                block = data[row, i // values * 18 :][:18]
                code = block[2 + i % values * bits // 8] >> (i % (8 // bits) * bits) & (2**bits - 1)
                expected[row, i] = np.float32(level[code]) * np.float32(block[:2].view(np.float16)[0])
        np.testing.assert_array_equal(decode(name, data).view(np.uint32), expected.view(np.uint32), strict=True)
        assert nbytes(name, (3, 2 * values)) == 3 * 36
        assert GGMLQuantizationType.__members__.get(name, NUMBERS[name]) == NUMBERS[name]


@pytest.mark.parametrize("name", DECODABLE)
def test_what_is_decodable_decodes(name: str) -> None:
    values = SIZES[name].values
    with np.errstate(all="ignore"):
        assert decode(name, random_blocks(name, 1)).shape == (64, values)
