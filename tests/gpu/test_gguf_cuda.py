"""GGUF block types on a CUDA device: the bytes of the CPU's encoders. Skipped without one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf_cases import extreme_matrices, importances, matrices
from tiny import MINI

from dsv2quant.formats.gguf import blocks
from dsv2quant.kernels.gguf_encode import ENCODED, encode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

QUANTIZED = [name for name in ENCODED if blocks.TYPES[name].values > 1]
COLS = 2816  # of V2-Lite's shared experts: 11 blocks of 256
MANY = {32: 800, 256: 6400}  # rows: over 65,536 blocks


def weights(rows: int) -> np.ndarray:
    """float32 [rows, COLS], heavy-tailed, of many sizes; BF16 values, so that there are ties, in every other row."""
    rng = np.random.default_rng(0)
    x = rng.standard_t(5, (rows, COLS)).astype(np.float32) * np.exp2(rng.integers(-20, 4, (rows, 1))).astype(np.float32)
    x[::2] = torch.from_numpy(x[::2]).bfloat16().float().numpy()
    x[:, :: COLS // 5] *= 30
    return x


def on_gpu(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    given = None if importance is None else torch.from_numpy(importance).cuda()
    return encode(name, torch.from_numpy(x).cuda(), given).cpu().numpy()


def same(name: str, x: np.ndarray, importance: np.ndarray | None) -> None:
    expected, got = blocks.encode(name, x, importance), on_gpu(name, x, importance)
    assert got.shape == expected.shape
    off = (got != expected).reshape(-1, blocks.TYPES[name].bytes)
    assert not off.any(), f"{off.any(1).sum()} of {len(off)} blocks differ, in bytes {np.flatnonzero(off.any(0))}"


@pytest.mark.parametrize("choice", [0, 1, 2], ids=["plain", "importance", "half zero"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_bytes_of_many_blocks_are_those_of_the_cpu(name: str, choice: int) -> None:
    importance = importances(COLS)[choice]
    same(name, weights(MANY[blocks.TYPES[name].values]), importance)


@pytest.mark.parametrize("name", ENCODED)
def test_bytes_of_awkward_blocks_are_those_of_the_cpu(name: str) -> None:
    """Zeros of both signs, constants, ties, subnormals, outliers, and scales that leave float16's range."""
    for x in extreme_matrices().values():
        for importance in importances(x.shape[1]):
            same(name, x, importance)
            if importance is not None:
                importance[32:96] = 0
                same(name, x, importance)


@pytest.mark.parametrize("name", QUANTIZED)
def test_bfloat16_is_taken_as_it_is(name: str) -> None:
    x = torch.from_numpy(matrices()["bell"]).bfloat16().cuda()
    assert torch.equal(encode(name, x), encode(name, x.float()))


@pytest.mark.parametrize("file_type", ["Q4_K_M", "DSV2_Q3_K_M", "MXFP4_MOE"])
def test_a_file_made_on_the_gpu_is_the_cpus(file_type: str, cli, tmp_path) -> None:
    files = [tmp_path / f"{device}.gguf" for device in ("cpu", "cuda")]
    for file in files:
        ran = cli("convert", MINI, "--gguf", file_type, "--device", file.stem, "-q", "-o", file)
        assert ran.code == 0, ran.err
    assert files[0].read_bytes() == files[1].read_bytes()
