"""The FP8 kernels: by Triton's interpreter against their torch references, and as code for Hopper. tests/gpu has the
same on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fp8_cases import E4M3, operands
from triton_tools import compile_for_hopper, interpreted

from dsv2quant.kernels import activations, fp8_gemm, fp8_vector
from dsv2quant.kernels.fp8_gemm import Decode, Prefill, choose, matmul
from dsv2quant.kernels.fp8_vector import Vector


@pytest.fixture(scope="module")
def results() -> dict:
    return interpreted("fp8_interpreted.py")


def test_codes_made_in_the_product_are_those_of_a_launch_of_its_own(results: dict) -> None:
    assert results["own codes"] == []


@pytest.mark.parametrize("granularity", ["token", "group128", "static"])
def test_activations_have_the_twins_bytes(granularity: str, results: dict) -> None:
    assert results["quantized"][granularity] == []


def test_the_interpreter_refuses_bfloat16(results: dict) -> None:
    assert results["refusal"] == "Triton's interpreter has no bfloat16"


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
def test_products_are_those_of_float64(scheme: str, results: dict) -> None:
    errors = {case: error for case, error in results["products"].items() if f" {scheme} " in case}
    assert len(errors) == 34
    assert max(errors.values()) < 1, errors


CONSTANT = {"xs_m": 1, "ws_k": 1}


def compiled(kernel, constants: dict, types: dict[str, str], warps: int, stages: int, folder: Path) -> str:
    """The PTX of `kernel` for sm_90, as launched with N and K that are multiples of 16; it uses no stack or local
    memory."""
    constants = constants | {name: value for name, value in CONSTANT.items() if name in kernel.arg_names}
    options = {"num_warps": warps, "num_stages": stages}
    made = compile_for_hopper(kernel, types, constants, folder / "kernel.cubin", ("N", "K", "x_m"), **options)
    assert (made.resources["STACK"], made.resources["LOCAL"]) == (0, 0)
    return made.ptx


POINTERS = {"x_scale": "*fp32", "w_scale": "*fp32"}


WEIGHTS = ((576, 5120), (24576, 1536), (32768, 512))


@pytest.mark.parametrize("share", sorted({choose(M, *weight) for M in (16, 64) for weight in WEIGHTS}))
@pytest.mark.parametrize("whole", [True, False])
def test_few_tokens_use_hoppers_units(share: Decode, whole: bool, tmp_path: Path) -> None:
    constants = {"GROUPED": True, "WHOLE": whole, "ROWS": share.rows, "TOKENS": share.tokens}
    types = POINTERS | {"x": "*fp8e4nv", "w": "*fp8e4nv", "y": "*bf16"}
    ptx = compiled(fp8_gemm._decode_kernel, constants, types, share.rows // 16, share.stages, tmp_path)
    assert f"wgmma.mma_async.sync.aligned.m64n{share.tokens}k32.f32.e4m3.e4m3" in ptx
    assert "cp.async.cg.shared.global" in ptx


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("N", "K"), [(2048, 2048), (2048, 2816), (2112, 5120), (5120, 16384)])
def test_very_few_tokens_are_asked_for_at_once(N: int, K: int, tokens: int, grouped: bool, tmp_path: Path) -> None:
    """All of 16 bytes a thread, before the first is used, which is behind a barrier; a code costs half a conversion to
    float16, one to float32, and one addition of a product for each token."""
    share = choose(tokens, N, K)
    assert isinstance(share, Vector)
    constants = {"K": K, "GROUPED": grouped, "ROWS": share.rows, "TOKENS": tokens, "WIDE": 512 * share.warps}
    types = POINTERS | {"x": "*fp8e4nv", "w": "*fp8e4nv", "y": "*bf16"}
    constants |= {"HELD": share.held, "ROUND": False}
    ptx = compiled(fp8_vector._vector_kernel, constants, types, share.warps, 1, tmp_path)
    asked, used = ptx.split("bar.sync", 1)
    weights, activations = asked.split("griddepcontrol.wait", 1)
    assert weights.count("v4.b32") == share.rows * share.held
    assert activations.count("v4.b32") == tokens * share.held
    assert "ld.global" not in used.split("bra", 1)[0]
    assert used.count("cvt.rn.f16x2.e4m3x2") == 8 * (share.rows + tokens) * share.held
    assert "e4m3x2" not in asked


@pytest.mark.parametrize("tokens", [1, 2])
def test_codes_of_tokens_are_made_of_all_that_is_held(tokens: int, tmp_path: Path) -> None:
    constants = {"K": 3072, "GROUPED": False, "ROWS": 2, "TOKENS": tokens, "WIDE": 1024, "HELD": 3, "ROUND": False}
    types = POINTERS | {"x": "*bf16", "w": "*fp8e4nv", "y": "*bf16"}
    ptx = compiled(fp8_vector._vector_kernel, constants | {"x_scale": None}, types, 2, 1, tmp_path)
    assert ptx.count("cvt.rn.satfinite.e4m3x2.f32") == 3 * 8 * tokens


def test_codes_are_made_where_they_are_used(tmp_path: Path) -> None:
    """All is asked for before the barrier, and what becomes codes behind it stays in registers."""
    constants = {"K": 2048, "GROUPED": True, "ROWS": 2, "TOKENS": 1, "WIDE": 2048, "HELD": 1, "ROUND": False}
    types = POINTERS | {"x": "*bf16", "w": "*fp8e4nv", "y": "*bf16"}
    ptx = compiled(fp8_vector._vector_kernel, constants | {"x_scale": None}, types, 4, 1, tmp_path)
    asked, used = ptx.split("bar.sync", 1)
    assert [part.count("v4.b32") for part in asked.split("griddepcontrol.wait", 1)] == [2, 2]
    assert "ld.global" not in used
    codes, sums = used.split("cvt.rn.f16x2.e4m3x2", 1)
    assert codes.count("cvt.rn.satfinite.e4m3x2.f32") == 8
    assert "st.shared" not in codes
    assert "satfinite" not in sums


@pytest.mark.parametrize("share", sorted({choose(M, *weight) for M in (256, 1024, 4096) for weight in WEIGHTS}))
@pytest.mark.parametrize("grouped", [True, False])
def test_many_tokens_use_hoppers_units_and_tma(share: Prefill, grouped: bool, tmp_path: Path) -> None:
    constants = {"GROUPED": grouped, "TOKENS": share.tokens, "ROWS": share.rows}
    tiles = {"x": f"tensordesc<fp8e4nv[{share.tokens}, 128]>", "w": f"tensordesc<fp8e4nv[{share.rows}, 128]>"}
    types = POINTERS | tiles | {"y": "*bf16"}
    ptx = compiled(fp8_gemm._prefill_kernel, constants, types, share.tokens // 16, share.stages, tmp_path)
    assert f"wgmma.mma_async.sync.aligned.m64n{share.rows}k32.f32.e4m3.e4m3" in ptx
    assert "cp.async.bulk.tensor.2d" in ptx


def test_activations_are_cast_by_one_instruction(tmp_path: Path) -> None:
    constants = {"GIVEN": False, "ROUND": False, "ROWS": 32, "WIDTH": 128}
    types = {"x": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32"}
    ptx = compiled(activations._quantize_kernel, constants, types, 4, 3, tmp_path)
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(128), "need \\[M, K\\] of contiguous rows"),
        (torch.zeros(128, 4).T, "need \\[M, K\\] of contiguous rows"),
        (torch.zeros(4, 128, dtype=torch.float64), "activations are torch.float64"),
        (torch.zeros(1, 65537), "at most 65536"),
    ],
)
def test_other_activations_are_refused(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        activations.quantize_activation(x, "token")


def test_other_operands_are_refused() -> None:
    x, x_scales, w, w_scales = operands(3, 160, 256, "block", "cpu")
    odd = torch.zeros(3, 40, dtype=E4M3)
    for given, message in (
        ((x, x_scales, w[:, :128], w_scales), "need \\[M, K\\] and \\[N, K\\]"),
        ((x.float(), x_scales, w, w_scales), "x is torch.float32"),
        ((x, x_scales, w.T.contiguous().T, w_scales), "w is torch.float8_e4m3fn, strides \\(1, 160\\)"),
        ((odd, x_scales[:, :1], torch.zeros(8, 40, dtype=E4M3), w_scales[:1, :1]), "K a multiple of 16"),
        ((x, x_scales.double(), w, w_scales), "need float32"),
        ((x, x_scales, w, w_scales[:1]), "fit no scheme"),
        ((x, x_scales[:, :1], w, w_scales), "fit no scheme"),
    ):
        with pytest.raises(ValueError, match=message):
            matmul(*given)


def test_vectors_hold_no_columns_beyond_the_last() -> None:
    given = operands(1, 160, 1024, "block", "cpu")
    with pytest.raises(ValueError, match="3 times 512 columns are held, of 1024"):
        fp8_gemm.matmul_into(torch.empty(1, 160), *given, Vector(4, 1, 3))


def test_no_tokens_give_no_rows() -> None:
    x, x_scales, w, w_scales = operands(3, 160, 256, "block", "cpu")
    assert matmul(x[:0], x_scales[:0], w, w_scales).shape == (0, 160)
    codes, scales = activations.quantize_activation(torch.zeros(0, 256), "group128")
    assert codes.shape == (0, 256)
    assert scales.shape == (0, 2)
