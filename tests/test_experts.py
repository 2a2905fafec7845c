"""The FP8 experts' kernels: by Triton's interpreter against their torch references, and as code for Hopper. tests/gpu
has the same on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from experts_cases import Layer, given
from triton_tools import compile_for_hopper, interpreted

from dsv2quant.kernels import fp8_experts, reference
from dsv2quant.kernels.fp8_experts import FEW, Share, choose_down, choose_gate_up
from dsv2quant.kernels.reference import sort_pairs

# float32: rounding of 2^-24 in each of up to 400 / 128 scaled sums, of a scale, of SiLU and of two products.
LIMIT = 10 * 2.0**-24
BLOCKS = (16, 32, 64, 128)


@pytest.fixture(scope="module")
def results() -> dict:
    return interpreted("experts_interpreted.py")


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
def test_products_are_the_twins(scheme: str, results: dict) -> None:
    cases = {case: found for case, found in results["kernels"].items() if case.endswith(scheme)}
    assert len(cases) == 5
    for case, found in cases.items():
        errors = {name: error for name, error in found.items() if not name.startswith("quantized")}
        assert len(errors) == 4
        assert max(errors.values()) < LIMIT, (case, errors)


def test_quantized_within_gate_up_are_the_bytes_of_after_it(results: dict) -> None:
    found = [found for case, found in results["kernels"].items() if case.endswith("block")]
    differ = [count for each in found for name, count in each.items() if name.startswith("quantized")]
    assert differ == [0] * 20


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
def test_kernels_one_after_the_other_are_the_twins(scheme: str, results: dict) -> None:
    assert results["whole"][scheme] < LIMIT


TYPES = {
    "x": "*fp8e4nv", "w": "*fp8e4nv", "x_scale": "*fp32", "w_scale": "*fp32", "h": "*bf16", "h_scale": "*fp32",
    "pairs": "*i32", "experts": "*i32", "begins": "*i32", "ends": "*i32", "routed": "*fp32", "out": "*fp32",
}  # fmt: skip


def check_compiled(kernel: Any, types: dict[str, str], constants: dict, block: int, share: Share, folder: Path) -> None:
    """It uses Hopper's units, of 64 rows of weights or of pairs, asynchronous copies, no stack and no local memory, and
    no more registers and shared memory than there are."""
    few = block <= FEW
    constants |= {"ROWS": share.rows, "TOKENS": block, "FEW": few, "STAGES": share.stages}
    made = compile_for_hopper(kernel, types, constants, folder / "k.cubin", ("INNER", "HIDDEN"), num_warps=share.warps)
    columns = block if few else 128
    assert f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.e4m3.e4m3" in made.ptx
    assert "mma.sync" not in made.ptx
    assert "cp.async.cg.shared.global" in made.ptx
    assert made.resources["STACK"] == made.resources["LOCAL"] == 0
    assert made.shared <= 227 << 10


@pytest.mark.parametrize(("grouped", "whole"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("block", BLOCKS)
def test_gate_up_uses_hoppers_units(block: int, grouped: bool, whole: bool, tmp_path: Path) -> None:
    share = choose_gate_up(block)
    constants = {"GROUPED": grouped, "WHOLE": whole, "DTYPE": tl.bfloat16, "ROUND": False, "xs_m": 1}
    if grouped and share.rows == 256:
        types = TYPES | {"h": "*fp8e4nv"}
        constants |= {"QUANTIZED": True}
    else:
        types = TYPES
        constants |= {"QUANTIZED": False, "h_scale": None}
    check_compiled(fp8_experts._gate_up_kernel, types, constants, block, share, tmp_path)


@pytest.mark.parametrize(("grouped", "whole"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("block", BLOCKS)
def test_down_uses_hoppers_units(block: int, grouped: bool, whole: bool, tmp_path: Path) -> None:
    constants = {"GROUPED": grouped, "WHOLE": whole, "xs_m": 1}
    check_compiled(fp8_experts._down_kernel, TYPES, constants, block, choose_down(block), tmp_path)


def operands() -> tuple:
    x, weights, chosen, stack, granularity, _ = given(Layer(3, 2, 4, 144, 208), "block", "cpu", torch.float32)
    codes, scales = reference.quantize_activation(x, granularity)
    return codes.contiguous(), scales, sort_pairs(chosen, 4, 16), stack, weights


def test_other_operands_are_refused() -> None:
    x, scales, routes, stack, _ = operands()
    odd = stack._replace(gate_up=stack.gate_up[:, :, :40].contiguous())
    for changed, message in (
        ((x[:2], scales, routes, 2, stack), r"activations are \(2, 208\); need \(3, 208\)"),
        ((x.float(), scales, routes, 2, stack), "activations are torch.float32"),
        ((x, scales, routes, 2, stack._replace(gate_up=stack.gate_up.float())), "weights are torch.float32"),
        ((x, scales, routes, 2, odd), "multiples of 16"),
        ((x, scales.double(), routes, 2, stack), "need float32"),
        ((x, scales[:, :1], routes, 2, stack), "fit no scheme"),
        ((x, scales, routes, 2, stack._replace(gate_up_scales=stack.gate_up_scales[:, :, :1].contiguous())), "fit no"),
    ):
        with pytest.raises(ValueError, match=message):
            fp8_experts.gate_up(*changed)
    with pytest.raises(ValueError, match="128 rows in a program: need 256, of a whole group"):
        fp8_experts.gate_up_quantized(x, scales, routes, 2, stack, share=Share(128, 4, 4))


def test_other_operands_of_down_are_refused() -> None:
    _, _, routes, stack, weights = operands()
    h, scales = reference.quantize_activation(torch.ones(6, 144), "group128")
    h = h.contiguous()
    for changed, message in (
        ((h[:5].contiguous(), scales, weights, routes, stack), r"activations are \(5, 144\); need \(6, 144\)"),
        ((h, scales, weights.double(), routes, stack), "weights are torch.float64"),
        ((h, scales, weights[:2], routes, stack), "need contiguous float32"),
    ):
        with pytest.raises(ValueError, match=message):
            fp8_experts.down(*changed)


def test_no_tokens_give_no_rows() -> None:
    x, scales, _, stack, weights = operands()
    routes = sort_pairs(torch.zeros(0, 2, dtype=torch.int64), 4, 16)
    h, h_scales = fp8_experts.gate_up_quantized(x[:0], scales[:0], routes, 2, stack)
    assert h.shape == (0, 144)
    assert h_scales.shape == (0, 2)
    assert fp8_experts.down(h, h_scales, weights[:0], routes, stack).shape == (0, 2, 208)
