"""GGUF weights as the kernels hold them, the kernels run by Triton's interpreter, and what they compile to for Hopper;
tests/gpu has them on a device."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from gguf_gemm_interpreted import CASES
from gguf_weights import random_blocks, random_weight
from triton_tools import Compiled, compile_for_hopper, interpreted

from dsv2quant.formats.gguf import blocks
from dsv2quant.kernels import gguf_experts, gguf_gemm
from dsv2quant.kernels import gguf_gemm as gguf_product
from dsv2quant.kernels.gguf_gemm import Config, choose, constants, linear
from dsv2quant.kernels.gguf_layout import SPECS, blocks_of, from_blocks, supported
from dsv2quant.kernels.reference import dequantize_gguf, sort_pairs

# Sums of float32 products are off by about 2^-24 · √K relative to their size, which 128 + code makes up to 64 times (of
# Q2_K) that of the result; float16 rounds the result at 2^-11.
TOLERANCES = {"torch.float32": 2e-5, "torch.float16": 2.0**-11}
TYPES = {
    "x": "*bf16", "words": "*i32", "steps": "*i32", "multiples": "*i32", "lows": "*i32", "out": "*bf16",
    "partial": "*fp32", "arrivals": "*i32", "pairs": "*i32", "experts": "*i32", "begins": "*i32", "ends": "*i32",
    "weights": "*fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return interpreted("gguf_gemm_interpreted.py")


@pytest.mark.parametrize("name", SPECS)
def test_values_are_ggmls(name: str) -> None:
    """Bit for bit, of blocks of any bytes; a stack holds those of its matrices."""
    assert (SPECS[name].values, SPECS[name].bytes) == blocks.TYPES[name]
    columns = 768 if SPECS[name].values == 256 else 160
    data = random_blocks(name, (3, 72, columns))
    expected = torch.stack([torch.from_numpy(blocks.decode(name, matrix.numpy())) for matrix in data])
    for some, values in ((data, expected), (data[1], expected[1])):
        weight = from_blocks(name, some, columns)
        assert torch.equal(dequantize_gguf(weight).view(torch.int32), values.view(torch.int32))
        assert torch.equal(blocks_of(weight), some)


@pytest.mark.parametrize("name", SPECS)
def test_bytes_per_weight_are_as_said(name: str) -> None:
    weight = random_weight(name, (64, 256))
    held = sum(4 * part.numel() for part in weight[1:5] if part is not None) / (64 * 256)
    said = {
        "Q6_K": 0.828, "Q4_K": 0.578, "Q5_K": 0.828, "Q5_0": 0.813, "Q5_1": 0.875, "Q3_K": 0.578, "Q2_K": 0.641,
        "IQ4_NL": 1.063, "IQ4_XS": 1.047,
    }  # fmt: skip
    assert held == pytest.approx(said.get(name, SPECS[name].bytes / SPECS[name].values), abs=6e-4)


def test_types_without_a_layout_are_refused() -> None:
    assert supported("Q4_K")
    assert not supported("IQ2_XXS")
    with pytest.raises(ValueError, match="BF16 is none of Q4_0, Q4_1"):
        from_blocks("BF16", torch.zeros(1, 64, dtype=torch.uint8), 32)
    with pytest.raises(ValueError, match=r"torch.uint8 rows of 144 are not 512 columns of Q4_K"):
        from_blocks("Q4_K", torch.zeros(2, 144, dtype=torch.uint8), 512)
    with pytest.raises(ValueError, match="rows of 34 are not 33 columns of Q8_0"):
        from_blocks("Q8_0", torch.zeros(2, 34, dtype=torch.uint8), 33)


@pytest.mark.parametrize("name", SPECS)
def test_every_type_by_the_interpreter(name: str, errors: dict[str, float]) -> None:
    assert errors[f"{name} product"] < TOLERANCES["torch.float32"]
    assert errors[f"{name} values"] == 0


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_products_are_the_twins(name: str, dtype: str, errors: dict[str, float]) -> None:
    assert errors[f"{name} {dtype}"] < TOLERANCES[dtype]


def test_columns_may_be_ordered_for_either_version_of_triton(errors: dict[str, float]) -> None:
    assert errors["8 tokens in the other order"] < TOLERANCES["torch.float32"]


def test_many_tokens_take_the_dequantized_weight(errors: dict[str, float]) -> None:
    assert errors["many tokens"] < TOLERANCES["torch.float32"]


def test_products_of_experts_are_the_twins(errors: dict[str, float]) -> None:
    found = [value for case, value in errors.items() if case.startswith("experts")]
    assert len(found) == 6
    assert max(found) < TOLERANCES["torch.float32"]
    assert errors["stack Q4_1 values"] == errors["stack Q2_K values"] == 0


def test_the_interpreter_refuses_bf16(errors: dict[str, float]) -> None:
    assert "torch.bfloat16 is none of torch.float16, torch.float32" in errors


def compiled(name: str, config: Config, file: Path, experts: bool = False) -> Compiled:
    spec = SPECS[name]
    given = dict(zip(("BITS", "ZERO", "GROUP", "AFFINE"), constants(spec), strict=True)) | {
        "EVEN": True, "TILES": config.rows // 64, "TOKENS": config.tokens, "SPLIT": config.split,
        "STAGES": config.stages, "ASM": True,
    }  # fmt: skip
    given |= {} if spec.multiples else {"multiples": None}
    given |= {} if spec.multiples and spec.affine else {"lows": None}
    given |= {} if config.split > 1 else {"partial": None}
    kernel = gguf_experts._experts_kernel if experts else gguf_gemm._gemm_kernel
    return compile_for_hopper(kernel, TYPES, given, file, num_warps=config.warps)


@pytest.mark.parametrize(
    "config",
    [Config(64, 8, 1, 4, 3), Config(64, 16, 4, 4, 3), Config(64, 64, 1, 4, 3), Config(64, 128, 1, 8, 3)],
    ids=str,
)
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K"])
def test_compiled_for_hopper(name: str, config: Config, tmp_path: Path) -> None:
    """Weights go to wgmma through registers alone: nothing is written to shared memory on the way, nothing to local."""
    made = compiled(name, config, tmp_path / "k.cubin", experts=config.tokens >= 64)
    found = Counter(line.split()[0] for line in made.ptx.splitlines() if line.strip())
    narrow = config.tokens == 8 and gguf_product.NARROW.value  # mma.sync: its order of columns suits groups of 32
    unit = "mma.sync" if narrow else "wgmma.mma_async"
    assert any(instruction.startswith(unit) for instruction in found)
    assert found["shfl.sync.idx.b32"] == sum(found[what] for what in found if what.startswith("shfl"))
    assert found["shfl.sync.idx.b32"] <= 1 or (narrow and SPECS[name].group < 32)  # a warp's number
    assert any(instruction.startswith("cp.async.c") for instruction in found)
    if config.split == 1 and config.tokens > 8:
        assert not any(instruction.startswith("st.shared") for instruction in found)
    assert made.resources["LOCAL"] == made.resources["STACK"] == 0
    assert made.shared <= 226 * config.warps << 7  # 8 warps on a multiprocessor


@pytest.mark.parametrize("rows", [576, 1408, 5120, 10944, 32768])
@pytest.mark.parametrize("columns", [64, 512, 1408, 1536, 16384])
def test_chosen_configurations_fit(rows: int, columns: int) -> None:
    """No program without work, nor more counters than there are."""
    for tokens in (1, 16, 17, 64, 100, 128):
        config = choose(tokens, rows, columns, 32)
        assert config is not None
        assert config.split <= max(1, columns // 128)
        tiles = -(-rows // config.rows) * -(-tokens // config.tokens)
        assert tiles <= 4 * -(-rows // 64) or config.split == 1
    assert choose(129, rows, columns, 32) is None


def test_experts_split_columns_only_with_a_counter_for_each_tile() -> None:
    """Tiles of 128 pairs are the configuration whose registers test_compiled_for_hopper has looked at."""
    stack = random_weight("Q8_0", (2, 64, 1024))
    assert gguf_experts.choose(8, 16, stack) == Config(64, 16, 2, 4, 3)
    assert gguf_experts.choose(9, 16, stack) == Config(64, 16, 1, 4, 3)
    assert gguf_experts.choose(1000, 128, stack) == Config(64, 128, 1, 8, 3)


def test_arguments_that_do_not_fit_are_refused() -> None:
    weight, stack = random_weight("Q8_0", (64, 64)), random_weight("Q8_0", (2, 64, 64))
    routes = sort_pairs(torch.zeros(4, 2, dtype=torch.int64), 2, 16)
    with pytest.raises(ValueError, match="x has 32 columns; the weight has 64"):
        linear(torch.zeros(1, 32), weight)
    with pytest.raises(ValueError, match="the weight is a stack"):
        linear(torch.zeros(1, 64), stack)
    with pytest.raises(ValueError, match=r"torch\.float32 is none of torch\.bfloat16"):
        linear(torch.zeros(1, 64), weight)
    with pytest.raises(ValueError, match=r"out must be contiguous, torch.bfloat16, of shape \(1, 64\)"):
        linear(torch.zeros(1, 64).bfloat16(), weight, torch.zeros(1, 32).bfloat16())
    with pytest.raises(ValueError, match="the weight is one matrix"):
        gguf_experts.experts_product(torch.zeros(4, 64), routes, 2, weight)
    with pytest.raises(ValueError, match="4 rows of x with 1 choices each are not 8 pairs"):
        gguf_experts.experts_product(torch.zeros(4, 64), routes, 1, stack)
    with pytest.raises(ValueError, match=r"4 weights of torch.float32 for 8 pairs"):
        gguf_experts.experts_product(torch.zeros(4, 64), routes, 2, stack, torch.zeros(4))
    with pytest.raises(ValueError, match="x has 32 columns; the stack has 64"):
        gguf_experts.experts_product(torch.zeros(4, 32), routes, 2, stack)
