"""The INT4 kernels' layout against the decoders of the on-disk layouts, bit for bit."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from int4_cases import random_weight

from dsv2quant.formats.int4 import pack_words
from dsv2quant.formats.schemes import CODECS
from dsv2quant.formats.transposed import ORDER
from dsv2quant.kernels import int4_layout
from dsv2quant.kernels.reference import dequantize_int4

FROM = {
    "int4": int4_layout.from_compressed_tensors,
    "int3": partial(int4_layout.from_compressed_tensors, bits=3),
    "int2": partial(int4_layout.from_compressed_tensors, bits=2),
    "gptq": int4_layout.from_gptq,
    "awq": int4_layout.from_awq,
}
DTYPES = {"U8": torch.uint8, "I32": torch.int32, "I64": torch.int64, "BF16": torch.bfloat16, "F16": torch.float16}
SHAPES = {32: (72, 96), 64: (576, 192), 128: (64, 384), None: (88, 200)}
SCHEMES = [name for name in CODECS if name.partition("-")[0] in FROM]


def stored(scheme: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The parts of a random weight as a checkpoint holds them, by the codec."""
    codec = CODECS[scheme]
    shape = SHAPES[codec.group_size]
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    (parts,) = codec.encode([weight])
    types = {part.suffix: DTYPES[part.dtype] for part in codec.layout(shape)}
    return {name: torch.from_numpy(value).view(types[name]) for name, value in parts.items()}


def scrambled(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with every code and zero point random: others' files are asymmetric."""
    make = torch.Generator().manual_seed(1)
    names = [name for name in parts if name in ("qweight", "qzeros", "weight_packed")]
    words = {
        name: torch.randint(-(2**31), 2**31, parts[name].shape, dtype=torch.int32, generator=make) for name in names
    }
    return parts | words


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_the_decoders(scheme: str, dtype: torch.dtype) -> None:
    for parts in (stored(scheme), scrambled(stored(scheme))):
        weight = FROM[scheme.partition("-")[0]](parts)
        assert torch.equal(dequantize_int4(weight, dtype), CODECS[scheme].decode(parts, dtype))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_symmetric_files_need_no_zeros(scheme: str) -> None:
    assert FROM[scheme.partition("-")[0]](stored(scheme)).zeros is None


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_the_layout_is_a_bijection(group: int) -> None:
    """Each code changes one nibble of the words, and no two the same: where 0 … 15 and where 1 bit of each goes."""
    rows, columns = 64, 256
    blank = torch.zeros(rows, columns, dtype=torch.uint8)
    scales = torch.ones(columns // group, rows)
    seen = torch.zeros(rows * columns, dtype=torch.int64)
    for bit in range(14):  # the bits of a code's index, one at a time: together they name each nibble's code
        index = torch.arange(rows * columns).view(rows, columns)
        words = int4_layout.pack((index >> bit & 1).to(torch.uint8) + blank, scales).words
        nibbles = words.view(torch.uint8).flatten()
        seen += torch.stack([nibbles & 15, nibbles >> 4], 1).flatten().long() << bit
    assert torch.equal(seen.sort().values, torch.arange(rows * columns))
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    assert torch.equal(int4_layout.unpack(int4_layout.pack(codes, scales)), codes)


@pytest.mark.parametrize("shape", [(8, 32), (65, 64), (576, 1408), (129, 10944)])
def test_any_shape_comes_back(shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    for group in (32, shape[1]):
        weight = int4_layout.pack(codes, torch.ones(shape[1] // group, shape[0]))
        assert torch.equal(int4_layout.unpack(weight), codes)


def test_a_word_is_a_threads_registers() -> None:
    """PTX ISA, wgmma.m64nNk16, A in registers: thread t of warp w holds rows 16w + t / 4 and 8 further, columns
    2 · (t % 4) and 8 further, in pairs. Of a word, shifted by 4i, bits 0 … 3 and 16 … 19 are register i's."""
    index = torch.arange(64 * 64).view(64, 64)
    at = torch.zeros(4, 32, 4, 8, dtype=torch.int64)  # warp, thread, word, nibble → index of the code there
    for bit in range(12):
        words = int4_layout.pack((index >> bit & 1).to(torch.uint8), torch.ones(1, 64)).words
        words = words[0, 0].reshape(4, 32, 4)
        at += (torch.stack([words >> 4 * i & 15 for i in range(8)], -1)).long() << bit
    for warp, thread, word, register in [(0, 0, 0, 0), (1, 5, 2, 1), (3, 31, 3, 3), (2, 14, 1, 2)]:
        row = 16 * warp + thread // 4 + 8 * (register & 1)
        column = 16 * word + 2 * (thread % 4) + 8 * (register >> 1)
        pair = at[warp, thread, word, [register, register + 4]]
        assert pair.tolist() == [row * 64 + column, row * 64 + column + 1]


def test_gptq_ordered_by_activation() -> None:
    parts = scrambled(stored("gptq-g32"))
    parts["g_idx"] = parts["g_idx"][torch.randperm(len(parts["g_idx"]), generator=torch.Generator().manual_seed(2))]
    weight = int4_layout.from_gptq(parts)
    assert weight.order is not None
    assert torch.equal(dequantize_int4(weight, torch.float32), CODECS["gptq-g32"].decode(parts, torch.float32))


def test_groups_that_do_not_fit_are_refused() -> None:
    parts = stored("gptq-g32")
    parts["g_idx"][0] = 1
    with pytest.raises(ValueError, match="g_idx does not name each of 3 groups for 32 of 96 columns"):
        int4_layout.from_gptq(parts)
    with pytest.raises(ValueError, match="96 columns in 6 groups: groups are of 32, 64, 128 or all columns"):
        int4_layout.pack(torch.zeros(8, 96, dtype=torch.uint8), torch.ones(6, 8))


def test_awq_order_is_the_formats() -> None:
    """One word by hand: AutoAWQ's nibble i is column ORDER[i]."""
    columns = np.arange(8, dtype=np.uint8)[None]
    parts = {
        "qweight": torch.from_numpy(pack_words(np.repeat(columns[:, ORDER], 32, 0))),
        "qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    assert int4_layout.unpack(int4_layout.from_awq(parts))[:, 0].tolist() == list(range(8))


def test_random_weight_uses_all_codes() -> None:
    assert int4_layout.unpack(random_weight(64, 64, 32)).unique().numel() == 16
