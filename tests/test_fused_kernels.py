"""What stands between the products of a decode step: by Triton's interpreter against its references, and as code for
Hopper. tests/gpu has the same on a device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from triton_tools import interpreted, printed

from dsv2quant.kernels.activations import add_norm, silu_mul, silu_mul_codes
from dsv2quant.kernels.latents import absorb_k, absorb_v, append_latents


@pytest.fixture(scope="module")
def results() -> dict:
    return interpreted("fused_interpreted.py")


@pytest.mark.parametrize(("operation", "cases"), [("add_norm", 32), ("silu_mul", 24), ("latents", 12), ("absorb", 8)])
def test_interpreted_kernels_compute_what_their_twins_do(operation: str, cases: int, results: dict) -> None:
    found = results["faults"][operation]
    assert len(found) == cases
    assert not any(found.values()), {case: faults for case, faults in found.items() if faults}


def test_the_interpreter_refuses_bfloat16(results: dict) -> None:
    assert results["refusal"] == "Triton's interpreter has no bfloat16"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    return printed("fused_compiled.py", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


def test_compiled_kernels_spill_nothing(compiled: dict) -> None:
    for name, used in compiled.items():
        assert (used["stack"], used["local"]) == (0, 0), (name, used)
        assert used["shared"] <= 232448, (name, used)  # of a block on sm_90


def test_compiled_kernels_use_wide_loads_and_one_instruction_per_cast(compiled: dict) -> None:
    for name, used in compiled.items():
        if name.startswith(("add_norm", "silu_mul")):
            assert used["ld.global.v4"] > 0, (name, used)
            assert used["cvt.rn.satfinite.e4m3x2.f32"] > 0, (name, used)
    assert compiled["latents fp8e4nv"]["cvt.rn.satfinite.e4m3x2.f32"] > 0
    assert compiled["latents fp8e5"]["cvt.rn.satfinite.e5m2x2.f32"] > 0


def test_products_use_the_matrix_unit(compiled: dict) -> None:
    """Of 64 columns or more Hopper's own; these kernels are bound by memory, and fewer let all multiprocessors read.
    One token's sums over 512 latents are the vector units'."""
    by_matrix = {name: used for name, used in compiled.items() if "tokens" in name and not name.endswith(" 1 tokens")}
    by_matrix |= {name: used for name, used in compiled.items() if name.startswith("absorb k")}
    assert len(by_matrix) == 10
    for name, used in by_matrix.items():
        own = not name.startswith("absorb v 16 heads")
        assert used["wgmma.mma_async" if own else "mma.sync.aligned"] > 0, (name, used)
        assert (used["cp.async"] > 0) == (" v " in name), (name, used)  # K's halves are read in one step


HALF, ONE = torch.zeros(3, 256, dtype=torch.float16), torch.ones(1)


def latents(**changed: torch.Tensor | None) -> None:
    given: dict = {
        "q": torch.zeros(2, 3 * 24).half(), "kv": torch.zeros(2, 40).half(), "norm_weight": torch.zeros(32).half(),
        "eps": 1e-6, "table": torch.zeros(9, 4, 2), "positions": torch.zeros(2, dtype=torch.int32),
        "cache": torch.zeros(2, 7, 40).half(), "cache_scale": None, "q_out": torch.zeros(2, 3, 40).half(),
    }  # fmt: skip
    append_latents(**given | changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add_norm(HALF[0], HALF[0], 1e-6), r"x has shape \(256,\); need \(any, any\)"),
        (lambda: add_norm(HALF, HALF[0, :128], 1e-6), r"weight has shape \(128,\); need \(256\)"),
        (lambda: add_norm(HALF, HALF[0].float(), 1e-6), "weight is torch.float32; need torch.float16"),
        (lambda: add_norm(HALF.double(), HALF[0], 1e-6), "x is torch.float64; need bfloat16, float16 or float32"),
        (lambda: add_norm(HALF.T, HALF[0, :3], 1e-6), r"x has strides \(1, 256\)"),
        (lambda: add_norm(HALF, HALF[0], 1e-6, addend=HALF[:2]), r"addend has shape \(2, 256\); need \(3, 256\)"),
        (lambda: add_norm(HALF, HALF[0], 1e-6, pairs=HALF[:, None]), "pairs is torch.float16; need torch.float32"),
        (
            lambda: add_norm(HALF, HALF[0], 1e-6, pairs=HALF.float()[:, None].expand(3, 2, 256)),
            "pairs must be contiguous",
        ),
        (lambda: add_norm(HALF, HALF[0], 1e-6, quantize="group64"), "no activations are quantized by 'group64'"),
        (lambda: add_norm(HALF, HALF[0], 1e-6, quantize="static"), "static quantization takes one scale"),
        (lambda: add_norm(torch.zeros(1, 16385), torch.zeros(16385), 1e-6), "at most 16384"),
        (lambda: silu_mul(HALF, HALF[:, :129]), r"up has shape \(\d+, 129\); need"),
        (lambda: silu_mul(HALF, HALF.float()), "up is torch.float32; need torch.float16"),
        (lambda: silu_mul_codes(*torch.zeros(2, 1, 20000), "token"), "at most 16384"),
        (lambda: latents(kv=torch.zeros(2, 39).half()), "of kv's 39 columns 32 are latents"),
        (lambda: latents(q=torch.zeros(2, 73).half()), "q has 73 columns, which are not 3 heads of 8 or more"),
        (lambda: latents(positions=torch.zeros(2, dtype=torch.int64)), "positions is torch.int64; need torch.int32"),
        (lambda: latents(table=torch.zeros(9, 5, 2)), r"table has shape \(9, 5, 2\); need \(any, 4, 2\)"),
        (lambda: latents(cache=torch.zeros(3, 7, 40).half()), r"cache has shape \(3, 7, 40\); need \(2, any, 40\)"),
        (lambda: latents(cache=torch.zeros(2, 9, 40).half()[:, :7]), "q_out, cache and table must be contiguous"),
        (lambda: latents(cache_scale=ONE), "a float8 cache, and no other, takes a cache_scale"),
        (
            lambda: latents(cache=torch.zeros(2, 7, 40).to(torch.float8_e5m2), cache_scale=torch.ones(2)),
            r"cache_scale is torch.float32 \(2,\); it must be float32 \(1,\)",
        ),
        (
            lambda: absorb_k(torch.zeros(2, 3, 8), torch.zeros(3, 9, 16), torch.zeros(2, 3, 20)),
            r"q_nope has shape \(2, 3, 8\); need \(any, 3, 9\)",
        ),
        (
            lambda: absorb_k(torch.zeros(2, 3, 8), torch.zeros(3, 8, 16), torch.zeros(2, 3, 12)),
            "q_out has 12 columns, fewer than the latents' 16",
        ),
        (lambda: absorb_v(torch.zeros(2, 3, 16), torch.zeros(3, 8, 16).half().mT), "w_v has strides"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_no_tokens_give_no_rows() -> None:
    found = add_norm(HALF[:0], HALF[0], 1e-6, addend=HALF[:0], quantize="group128")
    assert (found.residual.shape, found.scales.shape) == ((0, 256), (0, 2))
    assert silu_mul(HALF[:0], HALF[:0]).shape == (0, 256)
    assert absorb_v(torch.zeros(0, 3, 16), torch.zeros(3, 8, 16)).shape == (0, 24)
