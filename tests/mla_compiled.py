"""MLA decoding compiled for sm_90, where no device is needed, as the wrapper launches it: a program of its own, so that
Triton's cache may be elsewhere.

Prints one JSON object: of each choice of blocks_of the bytes of stack, local and shared memory and its matrix unit.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsv2quant.kernels.mla_decode import _split_kernel, blocks_of, padded

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {
    "lengths": "*i32", "cache_scale": "*fp32", "out": "*fp32", "lse": "*fp32", "heads": "i32", "capacity": "i32",
    "splits": "i32", "scale": "fp32",
}  # fmt: skip
CACHES = ("*bf16", "*fp8e4nv", "*fp8e5")


def compiled(heads: int, cache: str, cubin: Path) -> dict:
    cut = blocks_of(64, heads, 4096, 132)
    constants = {
        "RANK": 512, "ROPE": 64, "LATENTS": padded(512), "TURNED": padded(64), "HEADS": cut.heads, "TOKENS": cut.tokens,
        "FP8": cache != "*bf16",
    }  # fmt: skip
    types = {"q": "*bf16", "cache": cache} | TYPES | dict.fromkeys(constants, "constexpr")
    names = _split_kernel.arg_names
    signature = {name: types[name] for name in names}
    # As Triton finds at a launch: without it other code is made, which copies nothing asynchronously.
    aligned = [i for i, name in enumerate(names) if types[name][0] == "*" or name in ("heads", "capacity")]
    source = ASTSource(
        _split_kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": cut.warps, "num_stages": cut.stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin.write_bytes(kernel.asm["cubin"])
    used = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    found = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", used)}
    instructions = {name: kernel.asm["ptx"].count(name) for name in ("wgmma.mma_async", "mma.sync.aligned", "cp.async")}
    return found | instructions | {"shared": kernel.metadata.shared}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cases = itertools.product((16, 128), CACHES)
        print(json.dumps({f"{heads} heads, {cache}": compiled(heads, cache, cubin) for heads, cache in cases}))


if __name__ == "__main__":
    main()
