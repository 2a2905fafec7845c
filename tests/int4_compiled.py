"""The INT4 kernels compiled for sm_90 without a device: what the compiled code holds."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from triton_tools import compile_for_hopper

from dsv2quant.kernels import int4_gemm
from dsv2quant.kernels.int4_gemm import Config
from dsv2quant.kernels.int4_held import MAGIC, Held, held_kernel, steps_of

TYPES = {
    "x": "*bf16", "words": "*i32", "scales": "*fp32", "zeros": "*i32", "out": "*bf16", "partial": "*fp32",
    "arrivals": "*i32",
}  # fmt: skip


class Compiled(NamedTuple):
    instructions: Counter[str]  # of PTX
    resources: dict[str, int]  # REG, STACK, LOCAL
    shared: int  # bytes


def compiled(kernel: Any, warps: int, file: Path, constants: dict[str, Any]) -> Compiled:
    made = compile_for_hopper(kernel, TYPES, constants, file, num_warps=warps)
    instructions = re.findall(r"^\s+(?:@%p\d+ )?([a-z][\w.:]+)\s", made.ptx, re.M)
    return Compiled(Counter(instructions), made.resources, made.shared)


def gemm(share: Config | Held, group: int, file: Path, zeros: bool = False, asm: bool = True) -> Compiled:
    """Of 5120 columns."""
    block, steps = min(group, 128), 2 if group == 32 else 4
    constants = {
        "GROUPED": group <= 128, "EVEN": True, "SPANS": block // (16 * steps), "STEPS": steps, "TOKENS": share.tokens,
        "SPLIT": share.split, "MAGIC": MAGIC[int4_gemm.torch.bfloat16], "ASM": asm,
    }  # fmt: skip
    constants |= {} if zeros else {"zeros": None}
    constants |= {} if share.split > 1 else {"partial": None}
    if isinstance(share, Held):
        part, held = steps_of(share, 5120, block)
        constants |= {"PART": part, "HELD": held}
        return compiled(held_kernel, 4, file, constants)
    constants |= {"TILES": share.rows // 64, "STAGES": share.stages}
    return compiled(int4_gemm._gemm_kernel, share.warps, file, constants)


def dequantize(group: int, file: Path) -> Compiled:
    block, steps = min(group, 128), 2 if group == 32 else 4
    constants = {
        "GROUPED": group <= 128, "TILES": 1, "SPANS": block // (16 * steps), "STEPS": steps,
        "DTYPE": int4_gemm.tl.bfloat16, "MAGIC": MAGIC[int4_gemm.torch.bfloat16], "ASM": True, "zeros": None,
    }  # fmt: skip
    return compiled(int4_gemm._dequantize_kernel, 4, file, constants)
