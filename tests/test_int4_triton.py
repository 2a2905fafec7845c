"""The INT4 kernels run by Triton's interpreter, and what they compile to for Hopper; tests/gpu has them on a device."""

from __future__ import annotations

from pathlib import Path

import int4_compiled
import pytest
import torch
from int4_cases import random_weight
from int4_interpreted import CASES
from triton_tools import interpreted

from dsv2quant.kernels.int4_gemm import Config, choose, linear

# Sums of float32 products are off by about 2^-24 · √K relative to their size; float16 rounds the result at 2^-11.
TOLERANCES = {"torch.float32": 2e-6, "torch.float16": 2.0**-11}
COMPILED = [Config(64, 16, 1, 4, 4), Config(128, 16, 4, 4, 4), Config(64, 64, 1, 4, 3), Config(128, 64, 1, 8, 3)]


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return interpreted("int4_interpreted.py")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_products_are_the_twins(name: str, dtype: str, errors: dict[str, float]) -> None:
    assert errors[f"{name} {dtype}"] < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_dequantized_values_are_the_twins(name: str, dtype: str, errors: dict[str, float]) -> None:
    assert errors[f"dequantize {name} {dtype}"] == 0


def test_many_tokens_take_the_dequantized_weight(errors: dict[str, float]) -> None:
    assert errors["many tokens torch.float32"] < 2e-6


def test_the_interpreter_refuses_bf16(errors: dict[str, float]) -> None:
    assert "torch.bfloat16 is none of torch.float16, torch.float32" in errors


@pytest.mark.parametrize("group", [32, 64, 128, 512])
@pytest.mark.parametrize("config", COMPILED, ids=str)
def test_compiled_for_hopper(config: Config, group: int, tmp_path: Path) -> None:
    """Weights go to wgmma through registers alone: but for a split's sums, nothing is written to shared memory and
    read back on the way (a result's transposition is `stmatrix`), and nothing to local memory."""
    made = int4_compiled.gemm(config, group, tmp_path / "k.cubin")
    assert any(name.startswith("wgmma.mma_async") for name in made.instructions)
    assert not any(name.startswith("mma.sync") for name in made.instructions)
    if config.split == 1 and group <= 128:
        assert not any(name.startswith(("st.shared", "ldmatrix")) for name in made.instructions)
    assert any(name.startswith("cp.async.c") for name in made.instructions)
    assert made.resources["LOCAL"] == made.resources["STACK"] == 0
    assert made.shared <= 227 << 10


def test_zeros_and_plain_decoding_compile(tmp_path: Path) -> None:
    for zeros, asm in ((True, True), (False, False)):
        made = int4_compiled.gemm(Config(128, 16, 1, 4, 3), 128, tmp_path / "k.cubin", zeros, asm)
        assert any(name.startswith("wgmma.mma_async") for name in made.instructions)
        assert made.resources["LOCAL"] == made.resources["STACK"] == 0


@pytest.mark.parametrize("group", [32, 64, 128, 512])
def test_dequantize_compiles(group: int, tmp_path: Path) -> None:
    made = int4_compiled.dequantize(group, tmp_path / "k.cubin")
    assert made.resources["LOCAL"] == made.resources["STACK"] == 0


@pytest.mark.parametrize("rows", [576, 1408, 5120, 10944, 32768])
@pytest.mark.parametrize("columns", [64, 512, 1408, 1536, 16384])
def test_chosen_configurations_fit(rows: int, columns: int) -> None:
    """No program without work, nor more counters than there are."""
    blocks = -(-rows // 64)
    for tokens in (1, 16, 17, 64, 100, 256):
        config = choose(tokens, rows, columns)
        if config is not None:
            assert config.split <= max(1, columns // 128)
            assert -(-blocks * 64 // config.rows) * -(-tokens // config.tokens) <= 4 * blocks or config.split == 1


def test_the_more_rows_the_later_the_weight_is_dequantized() -> None:
    assert [choose(tokens, 5120, 1536) is None for tokens in (1, 128, 129)] == [False, False, True]
    assert [choose(tokens, 8192, 1536) is None for tokens in (1, 256, 257)] == [False, False, True]


def test_arguments_that_do_not_fit_are_refused() -> None:
    weight = random_weight(64, 64, 32)
    with pytest.raises(ValueError, match="x has 32 columns; the weight has 64"):
        linear(torch.zeros(1, 32), weight)
    with pytest.raises(ValueError, match=r"torch\.float32 is none of torch\.float16, torch\.bfloat16"):
        linear(torch.zeros(1, 64), weight)
    with pytest.raises(ValueError, match=r"out must be contiguous, torch.float16, of shape \(1, 64\)"):
        linear(torch.zeros(1, 64).half(), weight, torch.zeros(1, 32).half())
