"""MLA decoding compiled for sm_90, where no device is needed, as the wrapper launches it: a program of its own, so that
Triton's cache may be elsewhere.

Prints one JSON object: of each choice of blocks_of, and of the kernels for Hopper alone, the bytes of stack, local and
shared memory and the matrix unit.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

from triton.experimental.gluon import language as gl
from triton_tools import Compiled, compile_for_hopper

from dsv2quant.kernels.decoding import padded
from dsv2quant.kernels.mla_decode import _split_kernel, blocks_of
from dsv2quant.kernels.mla_decode_fp8 import FETCHED, fp8_kernel
from dsv2quant.kernels.mla_decode_ws import ws_kernel
from dsv2quant.kernels.mla_prefill import KEYS, prefill_kernel

TYPES = {
    "lengths": "*i32", "cache_scale": "*fp32", "out": "*fp32", "lse": "*fp32", "scale": "fp32",
}  # fmt: skip
CACHES = ("*bf16", "*fp8e4nv", "*fp8e5")


def compiled(heads: int, cache: str, cubin: Path) -> dict:
    cut = blocks_of(64, heads, 4096, 132)
    constants = {
        "RANK": 512, "ROPE": 64, "LATENTS": padded(512), "TURNED": padded(64), "HEADS": cut.heads, "TOKENS": cut.tokens,
        "FP8": cache != "*bf16",
    }  # fmt: skip
    types = {"q": "*bf16", "cache": cache} | TYPES
    options = {"num_warps": cut.warps, "num_stages": cut.stages}
    return used(compile_for_hopper(_split_kernel, types, constants, cubin, ("heads", "capacity"), **options))


def described(kind: str, rows: int, columns: int) -> str:
    """The type of a descriptor as the wrappers make it."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], {"bf16": gl.bfloat16, "fp16": gl.float16}[kind])
    return f"tensordesc<{kind}[{rows},{columns}],{layout}>"


def specialized(cubin: Path) -> dict[str, dict]:
    made = {}
    for cache in ("*fp8e4nv", "*fp8e5"):
        words = f"tensordesc<i32[64,16],{FETCHED.value}>"
        types = {"q": "*bf16", "words": words, "cache": cache} | TYPES
        made[f"few heads, {cache}"] = compile_for_hopper(fp8_kernel, types, {}, cubin, ("heads", "capacity"))
    types = {"q": "*bf16", "latents": described("bf16", 64, 256), "turned": described("bf16", 64, 64)} | TYPES
    made["many heads"] = compile_for_hopper(ws_kernel, types, {}, cubin, ("heads", "capacity"))
    for kind in ("bf16", "fp16"):
        types = {
            "keys": described(kind, KEYS, 128), "shared_keys": described(kind, KEYS, 64), "q": f"*{kind}",
            "table": "*fp32", "out": f"*{kind}", "scale": "fp32",
        }  # fmt: skip
        constants = {"HALVES": kind == "fp16", "KEYS": KEYS}
        made[f"prompt, {kind}"] = compile_for_hopper(prefill_kernel, types, constants, cubin, ("q_batch", "q_token"))
    return {name: used(each) for name, each in made.items()}


def used(made: Compiled) -> dict:
    found = {name.lower(): value for name, value in made.resources.items()}
    names = ("wgmma.mma_async", "mma.sync.aligned", "cp.async", "cp.async.bulk", "setmaxnreg")
    return found | {name: made.ptx.count(name) for name in names} | {"shared": made.shared}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cases = itertools.product((16, 128), CACHES)
        plain = {f"{heads} heads, {cache}": compiled(heads, cache, cubin) for heads, cache in cases}
        print(json.dumps({"plain": plain, "specialized": specialized(cubin)}))


if __name__ == "__main__":
    main()
