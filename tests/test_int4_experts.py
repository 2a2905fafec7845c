"""INT4 experts: their layout, their kernels run by Triton's interpreter, and what these compile to for Hopper;
tests/gpu has them on a device."""

from __future__ import annotations

from pathlib import Path

import int4_experts_compiled
import pytest
import torch
from int4_experts_cases import random_choice, random_experts, random_weights
from int4_experts_interpreted import CASES
from triton_tools import interpreted

from dsv2quant.kernels.int4_experts import Config, choose, down, gate_up
from dsv2quant.kernels.int4_layout import down_of, empty, fill, gate_up_of, pack
from dsv2quant.kernels.reference import down_int4, gate_up_int4, linear_int4, sort_pairs
from dsv2quant.kernels.routing import tiles_needed

# Sums of float32 products are off by about 2^-24 · √K relative to their size; float16 rounds the result at 2^-11.
TOLERANCES = {"torch.float32": 2e-6, "torch.float16": 2.0**-11}
UP, FEW_UP = Config(64, 1, 4, 1, 8), Config(64, 1, 4, 1, 4)
SPLIT, DOWN, FEW_DOWN = Config(64, 2, 4, 1, 6), Config(64, 1, 4, 1, 4), Config(64, 1, 4, 1, 6)
MORE, MANY_UP, MANY_DOWN = Config(128, 1, 4, 4), Config(128, 1, 8, 3), Config(64, 1, 4, 3)
COMPILED = [  # kernel, pairs in a tile, group, a configuration that is chosen
    ("gate_up", 16, 128, UP), ("gate_up", 16, 64, UP), ("gate_up", 32, 32, FEW_UP), ("gate_up", 16, 2048, UP),
    ("gate_up", 16, 128, FEW_UP), ("down", 16, 128, FEW_DOWN),
    ("gate_up", 16, 128, MORE), ("gate_up", 32, 128, MORE), ("gate_up", 32, 32, MORE),
    ("gate_up", 64, 128, MANY_UP), ("gate_up", 128, 128, MANY_UP), ("gate_up", 128, 2048, MANY_UP),
    ("down", 16, 128, SPLIT), ("down", 16, 64, SPLIT), ("down", 32, 32, SPLIT), ("down", 16, 128, DOWN),
    ("down", 16, 128, MORE), ("down", 32, 128, MORE), ("down", 64, 128, MANY_DOWN), ("down", 128, 128, MANY_DOWN),
    ("down", 128, 2048, MANY_DOWN),
]  # fmt: skip


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    return interpreted("int4_experts_interpreted.py")


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", ["gate_up", "down"])
def test_kernels_are_the_twins(kernel: str, name: str, dtype: str, errors: dict[str, float]) -> None:
    assert errors[f"{kernel} {name} {dtype}"] < TOLERANCES[dtype]


def test_the_interpreter_refuses_bf16(errors: dict[str, float]) -> None:
    assert "x must be contiguous, of shape (2, 256) and one of torch.float16, torch.float32" in errors


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_a_stack_holds_what_it_was_filled_with(group: int | None, zeros: bool, scales: torch.dtype) -> None:
    make = torch.Generator().manual_seed(1)
    hidden, width = (256, 128) if group else (200, 72)
    stack = empty(2, hidden, width, group, scales, zeros, "cpu")
    for expert in range(2):
        gate, up = (random_weights(width, hidden, group, zeros and i == 0, make, scales) for i in range(2))
        expected = gate, up, random_weights(hidden, width, group, zeros, make, scales)
        fill(stack, expert, *expected)
        for weight, other in zip([*gate_up_of(stack, expert), down_of(stack, expert)], expected, strict=True):
            assert torch.equal(weight.words, other.words)
            assert torch.equal(weight.scales, other.scales)
            if zeros:
                assert torch.equal(
                    weight.zeros, torch.full_like(weight.zeros, 8) if other.zeros is None else other.zeros
                )
            assert (weight.rows, weight.columns) == (other.rows, other.columns)


def test_the_twin_is_the_sum_of_its_matrices() -> None:
    stack = random_experts(4, 96, 64, 32, zeros=True)
    weights, chosen = random_choice(3, 4, 2)
    x = torch.randn(3, 96).double()
    expected = torch.empty(3, 2, 96)
    for token in range(3):
        for i, expert in enumerate(chosen[token].tolist()):
            gate, up = (linear_int4(x[token], weight) for weight in gate_up_of(stack, expert))
            h = gate * gate.sigmoid() * up
            expected[token, i] = linear_int4(h, down_of(stack, expert)) * weights[token, i]
    routes = sort_pairs(chosen, 4, 16)
    out = down_int4(gate_up_int4(x, routes, 2, stack), weights, routes, stack)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("kernel", "tokens", "group", "config"), COMPILED)
def test_compiled_for_hopper(kernel: str, tokens: int, group: int, config: Config, tmp_path: Path) -> None:
    """wgmma with weights in registers, loads on their way while the last are used or all asked for before any is,
    nothing in local memory."""
    made = int4_experts_compiled.compiled(kernel, config, tokens, group, tmp_path / "k.cubin")
    loads = [i for i, name in enumerate(made.instructions) if name.startswith("ld.global")]
    waited = sum(i < made.instructions.index("griddepcontrol.wait") for i in loads)
    if kernel == "down" and config.held > 1:
        assert waited > config.held  # routes and words; x is what the kernel before this one makes
        assert len(loads) - waited > config.held
    else:
        assert waited == 0
    products = [i for i, name in enumerate(made.instructions) if name.startswith("wgmma.mma_async")]
    assert not any(name.startswith(("mma.sync", "ldmatrix")) for name in made.instructions[: products[-1]])
    if config.held > 1:
        assert sum(i < products[0] for i in loads) > 2 * config.held  # words and x
        assert not any(products[0] < i < products[-1] for i in loads)
    else:
        assert any(name.startswith("cp.async.c") for name in made.instructions)
        assert group < 128 or "cp.async.cg.shared.global" in made.instructions  # of 16 bytes
    assert made.resources["LOCAL"] == made.resources["STACK"] == 0
    assert made.shared <= 227 << 10


@pytest.mark.parametrize("scales", ["*bf16", "*fp16"])
@pytest.mark.parametrize("kernel", ["gate_up", "down"])
def test_scales_and_zeros_are_loaded_ahead(kernel: str, scales: str, tmp_path: Path) -> None:
    """With a group in each step of the loop, none of its loads waits for memory: all are `cp.async`. What remains are
    the tile's own: where, pairs, weights."""
    made = int4_experts_compiled.compiled(kernel, Config(64, 1, 4, 3), 16, 128, tmp_path / "k.cubin", True, scales)
    assert "ld.global.b16" not in made.instructions
    assert made.resources["LOCAL"] == made.resources["STACK"] == 0


@pytest.mark.parametrize("model", [(64, 2048, 1408, 6), (160, 5120, 1536, 6), (16, 256, 128, 4)])
def test_chosen_configurations_fit(model: tuple[int, int, int, int]) -> None:
    """No program without columns; K is split for `down` alone, and there only where few programs run; many of them
    don't hold what they load."""
    experts, hidden, width, k = model
    stack = empty(experts, hidden, width, 128, device="meta")
    for tokens in (1, 4, 16, 64, 1024):
        for block in (16, 32, 64, 128):
            tiles = tiles_needed(tokens * k, experts, block)
            up, down_ = choose(tiles, stack, block)
            assert up.split == 1
            assert down_.split <= max(1, width // 128)
            assert down_.split == 1 or tiles * -(-hidden // 64) <= 264
            assert up.held == 1 or (block <= 32 and tiles * width <= 5 * 132 * 32)


def test_chosen_for_one_token_and_more() -> None:
    lite, v2 = (empty(1, *shape, 128, device="meta") for shape in ((2048, 1408), (5120, 1536)))
    assert choose(6, lite, 16) == (UP, SPLIT)
    assert choose(6, v2, 16) == (UP, DOWN)
    assert choose(12, lite, 16) == (FEW_UP, FEW_DOWN)
    assert choose(24, lite, 16) == (MORE, MORE)
    assert choose(200, v2, 64) == (MANY_UP, MANY_DOWN)


def test_weights_that_do_not_fit_are_refused() -> None:
    make = torch.Generator().manual_seed(0)
    stack = empty(1, 64, 96, 32, torch.float16, device="cpu")
    gate, up = (random_weights(96, 64, 32, False, make, torch.float16) for _ in range(2))
    down_ = random_weights(64, 96, 32, False, make, torch.float16)
    fill(stack, 0, gate, up, down_)
    with pytest.raises(ValueError, match="up has columns ordered by activation: not supported for experts"):
        fill(stack, 0, gate, up._replace(order=torch.arange(64)), down_)
    with pytest.raises(ValueError, match="down is 96 by 64 in 2 groups, not 64 by 96 in 3"):
        fill(stack, 0, gate, up, gate)
    with pytest.raises(ValueError, match="gate is 96 by 64 in 1 groups, not 96 by 64 in 2"):
        fill(stack, 0, random_weights(96, 64, 64, False, make), up, down_)
    with pytest.raises(ValueError, match="gate has zeros; the stack has no room for them"):
        fill(stack, 0, random_weights(96, 64, 32, True, make), up, down_)
    with pytest.raises(ValueError, match=r"gate has scales that torch\.float16 does not hold"):
        fill(stack, 0, pack(torch.zeros(96, 64, dtype=torch.uint8), torch.full((2, 96), 1 / 3)), up, down_)
    with pytest.raises(ValueError, match="96 columns are not whole groups of 64"):
        empty(1, 64, 96, 64, device="cpu")
    with pytest.raises(ValueError, match=r"scales are of torch\.bfloat16 or torch\.float16, not torch\.float32"):
        empty(1, 64, 96, 32, torch.float32, device="cpu")


def test_arguments_that_do_not_fit_are_refused() -> None:
    stack = random_experts(3, 64, 96, 32)
    weights, chosen = random_choice(2, 3, 2)
    routes = sort_pairs(chosen, 3, 16)
    with pytest.raises(ValueError, match="gate_up does not split K"):
        gate_up(torch.zeros(2, 64).bfloat16(), routes, 2, stack, Config(64, 2, 4, 4))
    with pytest.raises(ValueError, match=r"x must be contiguous, of shape \(2, 64\) and one of torch\.bfloat16"):
        gate_up(torch.zeros(2, 96).bfloat16(), routes, 2, stack)
    with pytest.raises(ValueError, match="the routes are of 4 pairs, not 2"):
        gate_up(torch.zeros(2, 64).bfloat16(), routes, 1, stack)
    with pytest.raises(ValueError, match=r"h must be contiguous, of shape \(4, 96\)"):
        down(torch.zeros(2, 96).bfloat16(), weights, routes, stack)
    with pytest.raises(ValueError, match="weights must be contiguous float32"):
        down(torch.zeros(4, 96).bfloat16(), weights.half(), routes, stack)


def test_no_tokens_give_no_rows() -> None:
    stack = random_experts(3, 64, 96, 32)
    routes = sort_pairs(torch.zeros(0, 2, dtype=torch.int64), 3, 16)
    h = gate_up(torch.zeros(0, 64).bfloat16(), routes, 2, stack)
    assert h.shape == (0, 96)
    assert down(h, torch.zeros(0, 2), routes, stack).shape == (0, 2, 64)
