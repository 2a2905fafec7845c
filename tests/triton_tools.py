"""Triton's kernels without a device: run by its interpreter, and compiled for Hopper."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parent


class Compiled(NamedTuple):
    ptx: str
    resources: dict[str, int]  # REG, STACK, LOCAL, as cuobjdump reads them in the binary
    shared: int  # bytes


def printed(script: str, **environment: str) -> Any:
    """The JSON that a script of this folder prints, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    ran = subprocess.run([sys.executable, TESTS / script], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def interpreted(script: str) -> Any:
    """The same under Triton's interpreter, which must be chosen before Triton is imported."""
    return printed(script, TRITON_INTERPRET="1")


def compile_for_hopper(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    cubin: Path,
    aligned: Collection[str] = ("N", "K"),
    **options: int | None,
) -> Compiled:
    """`kernel` for sm_90, with FP fusion unless an option says otherwise. Arguments that have no type are int32;
    pointers and `aligned` are multiples of 16, as Triton finds at a launch: without that it makes other code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = (GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource)(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*") or (name in aligned and signature[name] != "constexpr")
        },
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True} | options)
    cubin.write_bytes(made.asm["cubin"])
    usage = _run("cuobjdump", "-res-usage", cubin)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert len(resources) == 3, usage
    return Compiled(made.asm["ptx"], resources, made.metadata.shared)


def sass(cubin: Path) -> list[str]:
    """The names of the machine's instructions, in order."""
    code = _run("nvdisasm", "-c", cubin)
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code)


def _run(tool: str, *arguments: str | Path) -> str:
    """What a tool that comes with Triton prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
