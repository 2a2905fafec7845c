"""The INT4 experts' kernels compiled for sm_90 without a device: what the compiled code holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from triton_tools import compile_for_hopper

from dsv2quant.kernels import int4_experts
from dsv2quant.kernels.int4_experts import Config
from dsv2quant.kernels.int4_held import MAGIC

TYPES = {
    "x": "*bf16", "h": "*bf16", "weights": "*fp32", "pairs": "*i32", "experts": "*i32", "begins": "*i32",
    "ends": "*i32", "words": "*i32", "zeros": "*i16",
}  # fmt: skip


class Compiled(NamedTuple):
    instructions: list[str]  # of PTX, in order
    resources: dict[str, int]  # REG, STACK, LOCAL
    shared: int  # bytes


def compiled(
    name: str, config: Config, tokens: int, group: int, file: Path, zeros: bool = False, scales: str = "*bf16"
) -> Compiled:
    """The kernel of `gate_up` or `down` with tiles of so many tokens."""
    block, steps = min(group, 128), 2 if group == 32 else 4
    constants = {
        "GROUPED": group <= 128, "EVEN": True, "TILES": config.rows // 64,
        "SPANS": block // (16 * steps), "STEPS": steps, "TOKENS": tokens, "STAGES": config.stages,
        "HELD": config.held, "MAGIC": MAGIC[torch.bfloat16], "ASM": True,
    }  # fmt: skip
    constants |= {} if zeros else {"zeros": None}
    constants |= {"SPLIT": config.split} if name == "down" else {}
    types = TYPES | {"scales": scales, "out": "*bf16" if name == "gate_up" else "*fp32"}
    kernel = getattr(int4_experts, f"_{name}_kernel")
    made = compile_for_hopper(kernel, types, constants, file, num_warps=config.warps)
    instructions = re.findall(r"^\s+(?:@%p\d+ )?([a-z][\w.:]+)[\s;]", made.ptx, re.M)
    return Compiled(instructions, made.resources, made.shared)
