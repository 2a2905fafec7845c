"""MLA decoding compiled for sm_90, where no device is needed, as the wrapper launches it: a program of its own, so that
Triton's cache may be elsewhere.

Prints one JSON object: of each choice of blocks_of the bytes of stack, local and shared memory and its matrix unit.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

from triton_tools import compile_for_hopper

from dsv2quant.kernels.decoding import padded
from dsv2quant.kernels.mla_decode import _split_kernel, blocks_of

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
    made = compile_for_hopper(_split_kernel, types, constants, cubin, ("heads", "capacity"), **options)
    found = {name.lower(): value for name, value in made.resources.items()}
    instructions = {name: made.ptx.count(name) for name in ("wgmma.mma_async", "mma.sync.aligned", "cp.async")}
    return found | instructions | {"shared": made.shared}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cases = itertools.product((16, 128), CACHES)
        print(json.dumps({f"{heads} heads, {cache}": compiled(heads, cache, cubin) for heads, cache in cases}))


if __name__ == "__main__":
    main()
