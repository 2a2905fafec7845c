"""The INT4 kernels run by Triton's interpreter, and what they compile to for Hopper; tests/gpu has them on a device."""

from __future__ import annotations

from pathlib import Path

import int4_compiled
import pytest
import torch
from int4_cases import random_weight
from int4_interpreted import CASES
from triton_tools import interpreted, sass

from dsv2quant.kernels.int4_gemm import Config, choose, linear
from dsv2quant.kernels.int4_held import Held, rule, steps_of

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


@pytest.mark.parametrize(("group", "zeros"), [(32, True), (64, False), (128, False), (128, True), (512, False)])
@pytest.mark.parametrize("share", [Held(8, 5), Held(2, 20)], ids=str)
def test_held_words_are_asked_for_before_the_wait(share: Held, group: int, zeros: bool, tmp_path: Path) -> None:
    """Words and scales are on their way; then come the wait, x, the products and what is written. All words and x of a
    step are 16 bytes of a thread: 8 where it has 32 columns."""
    made = int4_compiled.gemm(share, group, tmp_path / "k.cubin", zeros)
    code = sass(tmp_path / "k.cubin")
    assert made.resources["LOCAL"] == made.resources["STACK"] == 0
    (wait,) = _places(code, "ACQBULK")
    assert wait < code.index("PREEXIT")  # where the next kernel may start
    before = [code[i] for i in _places(code, "LDG") if i < wait]
    steps, wide = steps_of(share, 5120, min(group, 128))[1], ".64" if group == 32 else ".128"
    assert sum(name.endswith(f".EF{wide}") for name in before) == steps * (2 if group > 64 else 1)
    assert len(before) >= steps * (1 if group == 512 else 2)
    assert wait < min(_places(code, f"LDG.E{wide}")) < min(_places(code, "HGMMA"))
    assert wait < min(_places(code, "STG") + _places(code, "ATOMG"))
    assert not _places(code, "HMMA")


def _places(code: list[str], name: str) -> list[int]:
    return [i for i, instruction in enumerate(code) if instruction.startswith(name)]


def test_the_pipelined_kernel_waits_before_it_reads_or_writes(tmp_path: Path) -> None:
    int4_compiled.gemm(COMPILED[1], 128, tmp_path / "k.cubin")
    code = sass(tmp_path / "k.cubin")
    (wait,) = _places(code, "ACQBULK")
    first = min(_places(code, "LDG") + _places(code, "STG") + _places(code, "ATOMG") + _places(code, "LDGSTS"))
    assert wait < min(first, code.index("PREEXIT"))


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


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ((2112, 5120), (10, 4)),
        ((32768, 512), (1, 4)),
        ((6144, 5120), (5, 4)),
        ((2048, 2816), (5, 5)),
        ((64, 64), (1, 1)),
    ],
)
def test_held_programs_run_all_at_once(shape: tuple[int, int], share: tuple[int, int]) -> None:
    assert rule(*shape) == share


def test_parts_are_held_in_passes_of_like_size() -> None:
    assert steps_of(Held(1, 5), 1536, 128) == (12, 4)
    assert steps_of(Held(8, 5), 5120, 32) == (20, 10)  # 12 at most
    assert steps_of(Held(3, 8), 704, 64) == (4, 4)
    assert steps_of(Held(4, 2), 200, 128) == (1, 1)


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
