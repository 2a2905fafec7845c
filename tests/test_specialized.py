"""Kernels of many tokens, whose warps are of two kinds: what they compile to for Hopper, and where they are chosen;
tests/gpu has them on a device, since Triton's interpreter has no Gluon."""

from __future__ import annotations

from pathlib import Path

import pytest
import specialized_compiled as compiled
import torch
from int4_experts_cases import random_experts
from triton_tools import Compiled

from dsv2quant.kernels import fp8_experts_prefill, fp8_gemm, fp8_prefill, int4_prefill
from dsv2quant.kernels.int4_layout import empty
from dsv2quant.kernels.routing import Routes, choose_block, tiles_needed

LITE, V2 = (64, 2048, 1408), (160, 5120, 1536)  # experts, hidden, width
SPILLED = 72  # bytes of a thread, outside of loops; the most of any share


def check(made: Compiled, wgmma: str) -> None:
    assert f"wgmma.mma_async.sync.aligned.{wgmma}" in made.ptx
    assert "cp.async.bulk.tensor.2d" in made.ptx
    assert "setmaxnreg.inc.sync.aligned.u32" in made.ptx
    assert made.resources["LOCAL"] == 0
    assert made.resources["STACK"] <= SPILLED
    assert made.shared <= 227 << 10


@pytest.mark.parametrize("share", [fp8_prefill.rule(1024, 2048), fp8_prefill.rule(4096, 2048)], ids=str)
def test_fp8_products(share: fp8_prefill.Share, tmp_path: Path) -> None:
    made = compiled.fp8(share, tmp_path / "k.cubin")
    check(made, "m64n128k32.f32.e4m3.e4m3")
    assert "cp.async.bulk.tensor.2d.global.shared::cta" in made.ptx  # so are results stored
    assert made.resources["STACK"] == 0


@pytest.mark.parametrize("gated", [True, False])
def test_fp8_experts(gated: bool, tmp_path: Path) -> None:
    share = fp8_experts_prefill.UP if gated else fp8_experts_prefill.DOWN
    check(compiled.fp8_experts(gated, share, tmp_path / "k.cubin"), "m64n128k32.f32.e4m3.e4m3")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("mean", [38, 96, 154, 384])
def test_int4_experts(mean: int, gated: bool, tmp_path: Path) -> None:
    block = choose_block(mean, 1, 1, wide=True)
    share = int4_prefill.rule(block, mean)[0 if gated else 1]
    made = compiled.int4_experts(gated, block, share, tmp_path / "k.cubin")
    check(made, f"m64n{block}k16.f32.bf16.bf16")
    assert not share.narrow or f"wgmma.mma_async.sync.aligned.m64n{share.narrow}k16" in made.ptx


@pytest.mark.parametrize(
    ("tokens", "rows", "groups"),
    [
        (1024, 2048, 2), (1024, 3648, 2), (1024, 4096, 2), (1024, 2112, 3), (1024, 5632, 3), (1024, 5120, 3),
        (4096, 2048, 3), (4096, 24576, 3),
    ],
)  # fmt: skip
def test_tokens_of_a_tile_are_those_of_least_time(tokens: int, rows: int, groups: int) -> None:
    """As measured on an H200."""
    assert fp8_prefill.rule(tokens, rows).groups == groups


def test_fp8_products_of_other_scales_and_fewer_tokens_are_fp8_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_prefill, "specialized", lambda: True)
    w, of_w = torch.empty(2048, 256, dtype=torch.float8_e4m3fn), torch.empty(16, 2)
    for tokens, scales, dtype, taken in (
        (1024, torch.empty(2, 1024).T, torch.bfloat16, True),
        (1023, torch.empty(2, 1024).T[:1023], torch.bfloat16, False),
        (1024, torch.empty(1024, 2), torch.bfloat16, False),
        (1024, torch.empty(2, 1024).T, torch.float32, False),
    ):
        x, out = torch.empty(tokens, 256, dtype=torch.float8_e4m3fn), torch.empty(tokens, 2048, dtype=dtype)
        assert isinstance(fp8_gemm.choose_grouped(out, x, scales, w, of_w), fp8_prefill.Share) == taken
    per_row = x, torch.empty(1024, 1), w, torch.empty(2048, 1)
    assert not isinstance(fp8_gemm.choose_grouped(out.bfloat16(), *per_row), fp8_prefill.Share)


def routes(tokens: int, experts: int, wide: bool = True) -> Routes:
    block = choose_block(tokens, 6, experts, wide)
    table = torch.empty(tiles_needed(tokens * 6, experts, block), device="meta")
    return Routes(torch.empty(tokens * 6, device="meta"), table, table, table, block)


def test_int4_experts_of_many_tokens_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_prefill, "fits", lambda stack: True)
    for (experts, hidden, width), least in ((LITE, 512), (V2, 1024)):
        stack = empty(experts, hidden, width, 128, device="meta")
        for tokens in (1, 64, 512, 1024, 4096):
            x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="meta")
            assert (int4_prefill.choose(x, routes(tokens, experts), stack) is not None) == (tokens >= least)
            assert int4_prefill.choose(x.half(), routes(tokens, experts), stack) is None


def test_int4_experts_of_other_groups_zeros_and_scales_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_prefill, "specialized", lambda: True)
    assert int4_prefill.fits(random_experts(1, 256, 128, 128))
    for group, zeros, scales in (
        (128, False, torch.float16),
        (128, True, torch.bfloat16),
        (64, False, torch.bfloat16),
        (None, False, torch.bfloat16),
    ):
        assert not int4_prefill.fits(random_experts(1, 256, 128, group, zeros, scales))


def test_tiles_are_wider_where_nothing_is_lost_by_it() -> None:
    assert [choose_block(t, 6, 64) for t in (128, 256, 512, 1024, 2048, 4096)] == [16, 32, 64, 64, 64, 128]
    assert [choose_block(t, 6, 64, wide=True) for t in (128, 256, 512, 1024, 2048)] == [16, 32, 64, 128, 128]
