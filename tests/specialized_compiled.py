"""The kernels of many tokens, whose warps are of two kinds, compiled for sm_90 without a device."""

from __future__ import annotations

from pathlib import Path

import torch
from triton.experimental.gluon import language as gl
from triton_tools import Compiled, compile_for_hopper

from dsv2quant.kernels import fp8_experts_prefill, fp8_prefill, int4_prefill, tiles

ROUTES = {"pairs": "*i32", "experts": "*i32", "begins": "*i32", "ends": "*i32", "weights": "*fp32"}


def _tile(kind: str, layout: object, *block: int) -> str:
    return f"tensordesc<{kind}{list(block)},{layout!r}>"


def fp8(share: fp8_prefill.Share, file: Path) -> Compiled:
    def tile(kind: str, dtype: torch.dtype, *block: int) -> str:
        return _tile(kind, tiles.layout(dtype, *block), *block)

    e4m3 = "fp8e4nv", torch.float8_e4m3fn
    types = {
        "x": tile(*e4m3, 64, 128), "w": tile(*e4m3, 128, 128), "y": tile("bf16", torch.bfloat16, 64, 128),
        "x_scale": tile("fp32", torch.float32, 64), "w_scale": "*fp32",
    }  # fmt: skip
    constants = {"GROUPS": share.groups, "STAGES": share.stages, "ws_k": 1}
    return compile_for_hopper(fp8_prefill._kernel, types, constants, file, num_warps=4)


def fp8_experts(gated: bool, share: fp8_experts_prefill.Share, file: Path) -> Compiled:
    def tile(*block: int) -> str:
        return _tile("fp8e4nv", tiles.layout(torch.float8_e4m3fn, *block), *block)

    types = {"x": tile(64, 128), "w": tile(128, 128), "x_scale": "*fp32", "w_scale": "*fp32", "out_scale": "*fp32"}
    constants = {"DTYPE": gl.bfloat16 if gated else None, "PARTS": share.parts, "STAGES": share.stages}
    constants |= {"weights": None} if gated else {"out_scale": None, "xs_m": 1}
    types |= ROUTES | {"out": "*fp8e4nv" if gated else "*fp32"}
    return compile_for_hopper(fp8_experts_prefill._kernel, types, constants, file, num_warps=4)


def int4_experts(gated: bool, tokens: int, share: int4_prefill.Share, file: Path) -> Compiled:
    def tile(kind: str, dtype: torch.dtype, *block: int) -> str:
        return _tile(kind, tiles.layout(dtype, *block), *block)

    types = ROUTES | {
        "x": tile("bf16", torch.bfloat16, tokens, 128), "words": tile("i32", torch.int32, 32, 32),
        "scales": tile("i32", torch.int32, 32), "out": "*bf16" if gated else "*fp32",
    }  # fmt: skip
    constants = {"GATED": gated, "TOKENS": tokens, "NARROW": share.narrow, "PARTS": share.parts}
    constants |= {"STAGES": share.stages} | ({"weights": None} if gated else {})
    return compile_for_hopper(int4_prefill._kernel, types, constants, file, ("N",), num_warps=4)
