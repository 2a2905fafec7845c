"""Plain attention's decoding compiled for sm_90, where no device is needed, as the wrappers launch it: a program of its
own, so that Triton's cache may be elsewhere.

Prints one JSON object: of each kernel the bytes of stack, local and shared memory, and instructions that matter.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

from triton_tools import Compiled, compile_for_hopper

from dsv2quant.kernels.append_keys import HEADS, _append_kernel
from dsv2quant.kernels.decoding import padded
from dsv2quant.kernels.gqa_decode import MAX_GROUP, _split_kernel, blocks_of

CACHES = {"*bf16": None, "*fp8e4nv": 448.0, "*fp8e5": 57344.0}
FOUND = ("mma.sync.aligned", "cp.async", "cvt.rn.satfinite.e4m3x2.f32", "cvt.rn.satfinite.e5m2x2.f32")


def decoding(heads: int, groups: int, width: int, cache: str, cubin: Path) -> Compiled:
    cut = blocks_of(64, groups, width, 4096, 132)
    constants = {
        "GROUP": heads // groups, "WIDTH": width, "COLUMNS": padded(width), "ROWS": MAX_GROUP, "TOKENS": cut.tokens,
        "FP8": cache != "*bf16",
    }  # fmt: skip
    types = {"q": "*bf16", "cache": cache, "lengths": "*i32", "out": "*fp32", "lse": "*fp32", "scale": "fp32"}
    types |= {"cache_scale": "*fp32"}
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return compile_for_hopper(_split_kernel, types, constants, cubin, ("capacity",), **options)


def appending(cache: str, cubin: Path) -> Compiled:
    types = dict.fromkeys(("q", "k", "v", "q_out"), "*bf16")
    types |= {"cache": cache, "table": "*fp32", "positions": "*i32", "cache_scale": "*fp32"}
    constants = {"HALF": 64, "PAIRS": 64, "HEADS": HEADS, "LARGEST": CACHES[cache], "ROUND": False}
    aligned = ("q_stride", "k_stride", "v_stride", "capacity")
    return compile_for_hopper(_append_kernel, types, constants, cubin, aligned, num_warps=4)


def main() -> None:
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        for sizes, cache in itertools.product(((64, 8, 128), (16, 16, 256)), CACHES):
            made[f"decoding {sizes} {cache}"] = decoding(*sizes, cache, cubin)
        for cache in CACHES:
            made[f"appending {cache}"] = appending(cache, cubin)
    print(
        json.dumps(
            {
                name: {key.lower(): value for key, value in one.resources.items()}
                | {"shared": one.shared}
                | {what: one.ptx.count(what) for what in FOUND}
                for name, one in made.items()
            }
        )
    )


if __name__ == "__main__":
    main()
