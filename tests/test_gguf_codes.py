"""Codes and scales of GGUF blocks, beside the gguf library's dequantize.

Equal means to the bit: code · step and + offset are the two roundings of float32 that ggml has. A fused multiply-add
has one of them, and is within an ulp of the larger term.
"""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf_cases import bell, importances, matrices

from dsv2quant.formats.gguf.blocks import NEEDY, TYPES, UNWEIGHTED, decode, encode
from dsv2quant.formats.gguf.codes import Levels, levels, with_codes, with_factors

MATRICES = matrices()
CODED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
         "TQ1_0", "TQ2_0")  # fmt: skip
POINTS = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M")
SCALED = tuple(name for name in (*CODED, *POINTS) if name != "MXFP4")
AFFINE = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
RANGES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127), "Q3_K": (-4, 3), "Q6_K": (-32, 31),
          "Q2_K": (0, 3), "Q4_1": (0, 15), "Q4_K": (0, 15), "Q5_1": (0, 31), "Q5_K": (0, 31), "IQ4_NL": (-127, 113),
          "IQ4_XS": (-127, 113), "MXFP4": (-12, 12), "TQ1_0": (-1, 1), "TQ2_0": (-1, 2)}  # fmt: skip
SIXTEENS = ("Q2_K", "Q3_K", "Q6_K")


def dequantized(name: str, blocks: np.ndarray) -> np.ndarray:
    return quants.dequantize(blocks, GGMLQuantizationType[name])


def product(found: Levels, codes: np.ndarray | None = None) -> np.ndarray:
    codes = found.codes if codes is None else codes
    groups = codes.reshape(*found.step.shape, -1).astype(np.float32) * found.step[..., None]
    if found.offset is not None:
        groups = groups + found.offset[..., None]
    return groups.reshape(codes.shape)


def encoded(name: str) -> list[np.ndarray]:
    """Every matrix with each importance that the type takes."""
    made = []
    for x in MATRICES.values():
        few = importances(x.shape[1])
        wanted = few[:1] if name in UNWEIGHTED else few[1:] if name in NEEDY else few
        made += [encode(name, x, importance) for importance in wanted]
    return made


def any_bits(name: str) -> np.ndarray:
    """uint8 [blocks, bytes]: whatever a file may hold, with finite values."""
    data = np.random.default_rng(1).integers(0, 256, (500, TYPES[name].bytes), np.uint8)
    with np.errstate(all="ignore"):
        return data[np.isfinite(dequantized(name, data)).all(1)]


def some_codes(found: Levels, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if found.table is not None:
        return rng.choice(found.table, found.codes.shape)
    return rng.integers(found.low, found.high, found.codes.shape, np.int8, endpoint=True)


@pytest.mark.parametrize("name", CODED)
def test_codes_times_steps_are_the_values(name: str) -> None:
    for blocks in [*encoded(name), any_bits(name)]:
        found = levels(name, blocks)
        assert found is not None
        np.testing.assert_array_equal(product(found), dequantized(name, blocks), strict=True)
        assert (found.codes.dtype, found.step.dtype) == (np.int8, np.float32)
        group = 16 if name in SIXTEENS else 256 if name.startswith("TQ") else 32
        assert found.codes.shape[1] == found.step.shape[1] * group
        assert (found.offset is not None) == (name in AFFINE)
        assert (found.low, found.high) == RANGES[name]
        if found.table is not None:
            assert np.isin(found.codes, found.table).all()


@pytest.mark.parametrize("name", CODED)
def test_own_codes_give_the_same_bytes(name: str) -> None:
    for blocks in encoded(name):
        found = levels(name, blocks)
        assert found is not None
        np.testing.assert_array_equal(with_codes(name, blocks, found.codes), blocks, strict=True)


@pytest.mark.parametrize("name", CODED)
def test_other_codes_under_the_same_scales(name: str) -> None:
    for seed, blocks in enumerate([*encoded(name), any_bits(name)]):
        found = levels(name, blocks)
        assert found is not None
        codes, before = some_codes(found, seed), blocks.copy()
        made = with_codes(name, blocks, codes)
        np.testing.assert_array_equal(dequantized(name, made), product(found, codes), strict=True)
        np.testing.assert_array_equal(blocks, before)


@pytest.mark.parametrize("name", CODED)
def test_codes_that_the_type_does_not_have_are_refused(name: str) -> None:
    blocks = encode(name, bell((2, 512), 5))
    found = levels(name, blocks)
    assert found is not None
    allowed = set(range(found.low, found.high + 1)) if found.table is None else set(found.table.tolist())
    for code in range(-128, 128):
        codes = found.codes.copy()
        codes[1, 511] = code
        if code in allowed:
            assert (with_codes(name, blocks, codes)[0] == blocks[0]).all()
        else:
            with pytest.raises(ValueError, match=f"{name} does not have all of these codes"):
                with_codes(name, blocks, codes)


def test_what_does_not_fit_is_refused() -> None:
    blocks = encode("Q4_K", bell((2, 512), 5))
    codes = np.zeros((2, 512), np.int8)
    with pytest.raises(ValueError, match=r"codes are int64 \(2, 512\); blocks of Q4_K have int8 \(2, 512\)"):
        with_codes("Q4_K", blocks, codes.astype(np.int64))
    with pytest.raises(ValueError, match=r"codes are int8 \(2, 256\)"):
        with_codes("Q4_K", blocks, codes[:, :256])
    with pytest.raises(ValueError, match="IQ3_S has no codes"):
        with_codes("IQ3_S", encode("IQ3_S", bell((2, 512), 5)), codes)
    with pytest.raises(ValueError, match=r"factors have shape \(2, 1\); blocks of Q4_K need \(2, 2\)"):
        with_factors("Q4_K", blocks, np.ones((2, 1), np.float32))
    for call in (
        lambda data: levels("Q4_K", data),
        lambda data: with_codes("Q4_K", data, codes),
        lambda data: with_factors("Q4_K", data, np.ones((2, 2), np.float32)),
    ):
        with pytest.raises(ValueError, match="Q4_K stores blocks of 144 bytes: a row of 287 is not whole blocks"):
            call(blocks[:, 1:])


def test_types_without() -> None:
    for name in (*POINTS, "F32", "F16", "BF16"):
        assert levels(name, encode(name, bell((2, 512), 5), importances(512)[1])) is None
    for name in ("F32", "F16", "BF16", "MXFP4"):
        blocks = encode(name, bell((2, 512), 5))
        assert with_factors(name, blocks, np.ones((2, 512 // TYPES[name].values), np.float32)) is None


def test_blocks_may_be_read_only_and_apart() -> None:
    """A mapped file's, or a part of each row."""
    blocks = encode("Q5_K", bell((3, 768), 5))
    mapped = np.frombuffer(blocks.tobytes(), np.uint8).reshape(blocks.shape)[:, :352]
    found, expected = levels("Q5_K", mapped), levels("Q5_K", blocks)
    assert found is not None
    assert expected is not None
    np.testing.assert_array_equal(found.codes, expected.codes[:, :512])
    np.testing.assert_array_equal(with_codes("Q5_K", mapped, found.codes), mapped)


def factors_for(name: str, blocks: np.ndarray, seed: int) -> np.ndarray:
    shape = (len(blocks), blocks.shape[1] // TYPES[name].bytes)
    return np.random.default_rng(seed).uniform(0.8, 1.25, shape).astype(np.float32)


@pytest.mark.parametrize("name", SCALED)
def test_values_follow_their_factors(name: str) -> None:
    """To float16's rounding of each scale, 2^-11 of what it makes."""
    for importance in importances(768)[1:]:
        blocks = encode(name, bell((20, 768), 6), importance)
        before, factors = blocks.copy(), factors_for(name, blocks, 7)
        made = with_factors(name, blocks, factors)
        assert made is not None
        new, values = made, decode(name, made)
        old, found = dequantized(name, blocks), levels(name, blocks)
        size = np.abs(old)
        if found is not None and found.offset is not None:  # two terms, each with its rounding
            size += 2 * np.abs(found.offset).repeat(old.shape[1] // found.offset.shape[1], 1)
        wanted = old.astype(np.float64) * factors.repeat(TYPES[name].values, 1)
        np.testing.assert_array_equal(values, dequantized(name, new), strict=True)
        assert (np.abs(values - wanted) <= 1.001 * 2**-11 * 1.25 * size).all()
        np.testing.assert_array_equal(blocks, before)
        twice = with_factors(name, blocks, np.full_like(factors, 2))
        assert twice is not None
        np.testing.assert_array_equal(decode(name, twice), old * np.float32(2))


@pytest.mark.parametrize("name", SCALED)
def test_factors_leave_all_but_scales(name: str) -> None:
    for blocks in encoded(name):
        factors = factors_for(name, blocks, 8)
        made = with_factors(name, blocks, factors)
        assert made is not None
        new, values = made, decode(name, made)
        before, after = (data.reshape(-1, TYPES[name].bytes) for data in (blocks, new))
        changed = np.flatnonzero((before != after).any(0))
        assert len(changed) <= (4 if name in AFFINE or name == "IQ1_M" else 2)
        np.testing.assert_array_equal(values, dequantized(name, new), strict=True)
        assert np.isfinite(values).all()


@pytest.mark.parametrize("name", SCALED)
def test_scales_do_not_become_zero_or_infinite(name: str) -> None:
    blocks = encode(name, bell((3, 512), 9), importances(512)[1])
    for factor in (0, 1e-9, 1e9, np.inf, np.nan):
        made = with_factors(name, blocks, np.full((3, 512 // TYPES[name].values), factor, np.float32))
        assert made is not None
        np.testing.assert_array_equal(made, blocks)


def q4_1(d: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Blocks of one row each, with these scales and codes 0 … 15."""
    blocks = np.zeros((len(d), 20), np.uint8)
    blocks[:, :2], blocks[:, 2:4] = (part.astype(np.float16)[:, None].view(np.uint8) for part in (d, low))
    blocks[:, 4:] = np.arange(16) * 17
    return blocks


def test_scales_are_rounded_once() -> None:
    """Every float16 as d; among the products are such as float32 rounds onto the middle of two."""
    d = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    rng = np.random.default_rng(2)
    twice = 0
    for _ in range(20):
        factors = rng.uniform(0.9, 1.1, (len(d), 1)).astype(np.float32)
        exact = d[:, None].astype(np.float64) * factors
        with np.errstate(over="ignore"):
            expected = exact.astype(np.float16)
            twice += int((exact.astype(np.float32).astype(np.float16) != expected).sum())
        fits = np.isfinite(expected) & ((expected != 0) | (d[:, None] == 0))
        made = with_factors("Q4_1", q4_1(d, -d), factors)
        assert made is not None
        np.testing.assert_array_equal(made, np.where(fits, q4_1(expected[:, 0], -expected[:, 0]), q4_1(d, -d)))
    assert twice


def test_a_block_keeps_both_scales_or_none() -> None:
    least, most = 2.0**-24, 65504.0
    d, low = np.array([0, 1, 3, 1, 2, 0, 3 * least]), np.array([-1, 0, -least, -most, -0.0, 0, 5 * least])
    factors = np.array([2, 2, 0.25, 1.5, 0.5, 3, 2], np.float32)[:, None]
    made = with_factors("Q4_1", q4_1(d, low), factors)
    assert made is not None
    expected = q4_1(np.array([0, 2, 3, 1, 1, 0, 6 * least]), np.array([-2, 0, -least, -most, -0.0, 0, 10 * least]))
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(decode("Q4_1", made), dequantized("Q4_1", expected))
