"""What stands between the products of a decode step compiled for sm_90, where no device is needed, as the wrappers
launch it for V2-Lite and V2: a program of its own, so that Triton's cache may be elsewhere.

Prints one JSON object: of each kernel the bytes of stack and local memory, registers, and instructions that matter.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triton_tools import compile_for_hopper

from dsv2quant.kernels.activations import GROUPS, _add_norm_kernel, _silu_mul_kernel
from dsv2quant.kernels.activations import share as norm_share
from dsv2quant.kernels.latents import HEADS, _latents_kernel, _per_head_kernel, choose

FOUND = (
    "wgmma.mma_async", "mma.sync.aligned", "cp.async", "ld.global.v4", "cvt.rn.satfinite.e4m3x2.f32",
    "cvt.rn.satfinite.e5m2x2.f32",
)  # fmt: skip


def kernels() -> Iterator[tuple[str, Any, dict, dict, dict]]:
    """Name, kernel, types, constants, options."""
    floats = dict.fromkeys(("x", "addend", "weight", "residual", "normed"), "*bf16")
    coded = {"codes": "*fp8e4nv", "scales": "*fp32", "eps": "fp32"}
    for width, groups in ((2048, 16), (5120, 64)):
        for granularity in ("group128", "token"):
            constants = {
                "WIDTH": width, "PAIRS": 6, "HELD": norm_share(1, groups)[1], "GROUPS": groups,
                "GRANULARITY": granularity, "ROUND": False,
            }  # fmt: skip
            options = {"num_warps": groups // 2}
            yield (
                f"add_norm {width} {granularity}",
                _add_norm_kernel,
                floats | coded | {"pairs": "*fp32"},
                constants,
                options,
            )
    for width, granularity, groups in ((10944, "group128", GROUPS), (12288, "token", 128)):
        constants = {"WIDTH": width, "GROUPS": groups, "GRANULARITY": granularity, "ROUND": False, "out": None}
        options = {"num_warps": min(groups // 2, 32)}
        yield (
            f"silu_mul {width} {granularity}",
            _silu_mul_kernel,
            {"gate": "*bf16", "up": "*bf16"} | coded,
            constants,
            options,
        )
    for stored, largest in (("fp8e4nv", 448.0), ("fp8e5", 57344.0), ("bf16", None)):
        types = dict.fromkeys(("q", "kv", "weight", "q_out"), "*bf16") | {"table": "*fp32", "positions": "*i32"}
        types |= {"cache": f"*{stored}", "cache_scale": "*fp32", "eps": "fp32"}
        constants = {
            "NOPE": 128, "RANK": 512, "ROPE": 64, "LATENTS": 512, "HALF": 32, "HALVES": False, "HEADS": HEADS,
            "LARGEST": largest, "ROUND": False,
        }  # fmt: skip
        yield f"latents {stored}", _latents_kernel, types, constants, {"num_warps": 4}
    for heads in (16, 128):
        for tokens in (1, 8, 64):
            for name, depth, columns in (("k", 128, 512), ("v", 512, 128)):
                share = choose(tokens, heads, depth, columns)
                types = {"x": "*fp32" if name == "v" else "*bf16", "w": "*bf16", "out": "*bf16"}
                constants = {
                    "K": depth, "C": columns, "COLUMNS": share.columns, "TOKENS": share.tokens, "DEPTH": share.depth,
                    "w_c" if name == "k" else "w_k": 1,
                }  # fmt: skip
                options = {"num_warps": share.warps, "num_stages": share.stages}
                yield f"absorb {name} {heads} heads {tokens} tokens", _per_head_kernel, types, constants, options


ALIGNED = (
    "x_stride", "addend_stride", "gate_stride", "up_stride", "q_stride", "kv_stride", "heads", "capacity",
    "x_t", "x_h", "w_h", "w_k", "w_c", "out_t", "out_h",
)  # fmt: skip


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kernel, types, constants, options in kernels():
            made = compile_for_hopper(kernel, types, constants, Path(folder) / "kernel.cubin", ALIGNED, **options)
            counts = {what: made.ptx.count(what) for what in FOUND}
            found[name] = (
                {key.lower(): value for key, value in made.resources.items()} | {"shared": made.shared} | counts
            )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
