"""The INT4 kernels compiled for sm_90 without a device: what the compiled code holds."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsv2quant.kernels import int4_gemm
from dsv2quant.kernels.int4_gemm import MAGIC, Config

TYPES = {
    "x": "*bf16", "words": "*i32", "scales": "*fp32", "zeros": "*i32", "out": "*bf16", "partial": "*fp32",
    "arrivals": "*i32",
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Compiled(NamedTuple):
    instructions: Counter[str]  # of PTX
    resources: dict[str, int]  # REG, STACK, LOCAL
    shared: int  # bytes


def compile_for_hopper(kernel: Any, warps: int, file: Path, constants: dict[str, Any]) -> Compiled:
    """With every pointer and size a multiple of 16, as a launch would find them."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in ("N", "K")]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": warps, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    file.write_bytes(made.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"^\s+(?:@%p\d+ )?([a-z][\w.:]+)\s", made.asm["ptx"], re.M)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(Counter(instructions), resources, made.metadata.shared)


def gemm(config: Config, group: int, file: Path, zeros: bool = False, asm: bool = True) -> Compiled:
    block, steps = min(group, 128), 2 if group == 32 else 4
    constants = {
        "GROUPED": group <= 128, "EVEN": True, "TILES": config.rows // 64, "SPANS": block // (16 * steps),
        "STEPS": steps, "TOKENS": config.tokens, "SPLIT": config.split, "STAGES": config.stages,
        "MAGIC": MAGIC[int4_gemm.torch.bfloat16], "ASM": asm,
    }  # fmt: skip
    constants |= {} if zeros else {"zeros": None}
    constants |= {} if config.split > 1 else {"partial": None}
    return compile_for_hopper(int4_gemm._gemm_kernel, config.warps, file, constants)


def dequantize(group: int, file: Path) -> Compiled:
    block, steps = min(group, 128), 2 if group == 32 else 4
    constants = {
        "GROUPED": group <= 128, "TILES": 1, "SPANS": block // (16 * steps), "STEPS": steps,
        "DTYPE": int4_gemm.tl.bfloat16, "MAGIC": MAGIC[int4_gemm.torch.bfloat16], "ASM": True, "zeros": None,
    }  # fmt: skip
    return compile_for_hopper(int4_gemm._dequantize_kernel, 4, file, constants)
