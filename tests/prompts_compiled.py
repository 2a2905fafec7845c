"""A prompt's kernels compiled for sm_90, where no device is needed, as the wrappers launch them for V2-Lite and V2: a
program of its own, so that Triton's cache may be elsewhere.

Prints one JSON object: of each kernel the bytes of stack and local memory, registers, and instructions that matter.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton_tools import compile_for_hopper

from dsv2quant.kernels import router, sorting
from dsv2quant.kernels.activations import MANY, _add_norm_kernel, _quantize_kernel, share
from dsv2quant.kernels.prompts import HEADS, _keys_kernel, _prompt_kernel
from dsv2quant.kernels.router import _logits_kernel
from dsv2quant.kernels.sorting import _count_kernel, _place_kernel

FOUND = ("wgmma.mma_async", "cp.async", "st.global.v4", "cvt.rn.satfinite.e4m3x2.f32", "div.rn.f32")
ALIGNED = ("x_stride", "addend_stride", "q_stride", "kv_stride", "values_stride", "heads", "capacity", "K", "EXPERTS")


def kernels() -> Iterator[tuple[str, Any, dict, dict, dict]]:
    """Name, kernel, types, constants, options."""
    no_fusion = {"enable_fp_fusion": False}
    types = dict.fromkeys(("q", "kv", "weight", "latents", "keys"), "*bf16") | {"table": "*fp32", "eps": "fp32"}
    types |= {"codes": "*fp8e4nv", "scales": "*fp32", "cache_scale": "*fp32"}
    for stored in ("bf16", "fp8e4nv", None):
        for granularity in ("group128", None):
            constants = {
                "NOPE": 128, "RANK": 512, "ROPE": 64, "GROUPS": 4, "HALF": 32, "HALVES": False, "HEADS": HEADS,
                "GRANULARITY": granularity, "LARGEST": 448.0 if stored == "fp8e4nv" else None, "ROUND": False,
            }  # fmt: skip
            constants |= {} if granularity else {"codes": None, "scales": None}
            constants |= {} if stored == "fp8e4nv" else {"cache_scale": None}
            constants |= {} if stored else {"cache": None}
            given = types | ({"cache": f"*{stored}"} if stored else {})
            yield f"prompt {stored} {granularity}", _prompt_kernel, given, constants, {"num_warps": 4} | no_fusion
    yield "prompt without queries", _prompt_kernel, given, constants | {"q": None}, {"num_warps": 4} | no_fusion
    constants = {"NOPE": 128, "HEAD": 256, "ROPE": 64, "HEADS": HEADS, "WIDE": 128, "NARROW": 64}
    types = dict.fromkeys(("values", "keys", "out"), "*bf16")
    yield "keys", _keys_kernel, types, constants, {"num_warps": 4}
    for tokens, experts, columns in ((2048, 64, 2048), (65536, 64, 2048), (65536, 160, 5120)):
        for parts in (1, 3):
            wide, rows, warps, stages = router.choose(tokens, experts, parts)
            constants = {"COLUMNS": columns, "PARTS": parts, "TOKENS": wide, "ROWS": rows, "DEPTH": router.DEPTH}
            constants |= {"STEPS": router.STEPS}
            types = {"x": "*bf16", "parts": "*bf16", "logits": "*fp32"}
            options = {"num_warps": warps, "num_stages": stages}
            yield f"logits {tokens} {experts} {parts}", _logits_kernel, types, constants, options
    types = dict.fromkeys(("chosen", "counts", "pairs", "tile_experts", "begins", "ends"), "*i32")
    for experts in (64, 160):
        bins = triton.next_power_of_2(experts + 1)
        constants = {"EXPERTS": experts, "BINS": bins}
        yield f"count {experts}", _count_kernel, types, constants | {"PIECE": sorting.PIECE}, {"num_warps": 4}
        constants |= {"BLOCK": 128, "SLICE": sorting.SLICE, "ROWS": sorting.ROWS}
        yield f"place {experts}", _place_kernel, types, constants, {"num_warps": 8}
    floats = dict.fromkeys(("x", "addend", "weight", "residual", "normed"), "*bf16")
    coded = {"codes": "*fp8e4nv", "scales": "*fp32", "eps": "fp32"}
    for width, groups in ((2048, 16), (5120, 64)):
        for pairs in (0, 6):
            warps, held = share(MANY + 1, groups)
            constants = {"WIDTH": width, "PAIRS": pairs, "HELD": held, "GROUPS": groups, "GRANULARITY": "group128"}
            constants |= {"ROUND": False} | ({} if pairs else {"pairs": None})
            options = {"num_warps": warps} | no_fusion
            yield f"add_norm {width} {pairs}", _add_norm_kernel, floats | coded | {"pairs": "*fp32"}, constants, options
    constants = {"GIVEN": False, "ROUND": False, "ROWS": 32, "WIDTH": 128}
    yield "quantize", _quantize_kernel, {"x": "*bf16"} | coded, constants, {"num_warps": 4} | no_fusion


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kernel, types, constants, options in kernels():
            made = compile_for_hopper(kernel, types, constants, Path(folder) / "kernel.cubin", ALIGNED, **options)
            counts = {what: made.ptx.count(what) for what in FOUND}
            found[name] = {key.lower(): n for key, n in made.resources.items()} | {"shared": made.shared} | counts
    print(json.dumps(found))


if __name__ == "__main__":
    main()
