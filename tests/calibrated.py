"""What the tests of calibrated conversions share: tokens, plans, and what a finished folder holds."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import tiny
import torch
from test_convert import KILLER

from dsv2quant.calib import layerwise
from dsv2quant.calib.calibration import Calibration, needs_calibration
from dsv2quant.calib.hidden import Stream
from dsv2quant.calib.layer import Job
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.model.layers import Linear, Served
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import Plan, make_plan
from dsv2quant.report.calibration import Conversion
from dsv2quant.storage.durable import MANIFEST_FILE

WINDOWS, CTX = 17, 30  # window 8 is held out


def aside(windows: int = WINDOWS, ctx: int = CTX) -> torch.Tensor:
    """[windows · ctx], true for tokens that are held out: one window in 16, or the last 16th of fewer windows."""
    window, position = torch.arange(windows)[:, None], torch.arange(ctx)
    kept = (
        (window % 16 == 8).expand(windows, ctx) if windows >= 16 else (position >= ctx - ctx // 16).expand(windows, ctx)
    )
    return kept.flatten()


def calibration(count: int = WINDOWS, ctx: int = CTX, seed: int = 0) -> Calibration:
    """Random tokens."""
    ids = np.random.default_rng(seed).integers(0, tiny.GROUPED["vocab_size"], (count, ctx))
    return Calibration(ids, "random tokens", f"{seed:064x}", seed, [])


def rules(text: str) -> recipe.Recipe:
    return recipe.parse(f"name: x\nrules: [{text}]", "x")


def planned(model: Path, name: str | recipe.Recipe = "int4-pure", method: str | None = None, **options: Any) -> Plan:
    """A plan of a built-in recipe, or of one's own, in groups of 32."""
    chosen = recipe.builtin(name, method=method, group_size=32) if isinstance(name, str) else name
    return make_plan(open_checkpoint(model), chosen, for_targets=["transformers"], **options)


def run(plan: Plan, out: Path, using: Calibration | None = None, **options: Any) -> Conversion:
    calibrated = (using or calibration()) if needs_calibration(plan) else None
    return convert(plan, out, command="", calibration=calibrated, **options)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def files(folder: Path) -> dict[str, bytes]:
    """Contents of a folder that may be unfinished, and hold folders."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / MANIFEST_FILE).read_text())


def linears(layer: Any, at: str) -> dict[int, str]:
    """{id: name} of a layer's linears, those of the routed experts aside."""
    found = {}
    for field in fields(layer):
        value = getattr(layer, field.name)
        if isinstance(value, Linear):
            found[id(value)] = f"{at}.{field.name}"
        elif is_dataclass(value):
            found |= linears(value, f"{at}.{field.name}")
    return found


def inputs(folder: Path, using: Calibration) -> tuple[dict[str, torch.Tensor], Model]:
    """What every linear is applied to, [tokens, columns] in float64, in the runtime's forward pass; routed experts
    aside: these see rows of `N.ffn`."""
    seen: dict[str, torch.Tensor] = {}
    model = Model(open_checkpoint(folder), LoadOptions(weight_only=True))
    names: dict[int, str] = {}
    for i, layer in enumerate(model.layers()):
        names |= linears(layer, str(i))
    call = Linear.__call__

    def record(self: Linear, x: torch.Tensor | Served) -> torch.Tensor:
        if id(self) in names:
            seen[names[id(self)]] = (x.x if isinstance(x, Served) else x).flatten(0, -2).double()
        return call(self, x)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(Linear, "__call__", record)
        model.forward(torch.from_numpy(using.ids))
    return seen, model


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """{module: weight in float32} of a checkpoint's matrices."""
    opened = open_checkpoint(folder)
    return {w.spec.module: opened.decode(w, torch.float32) for w in opened.weights if len(w.spec.shape) == 2}


def recorded(m: pytest.MonkeyPatch) -> dict[tuple[int, str], torch.Tensor]:
    """Hidden states in front of each layer, and within the last, on each side, as they will be: [tokens, hidden]."""
    found, original = {}, layerwise.quantize_layer

    def quantize_layer(job: Job, streams: Sequence[Stream], added: Stream) -> None:
        index = layer_of(job)
        for number in (index, index + 1):
            for side, stream in zip(("real", "ideal"), streams, strict=True):
                found[number, side] = stream[:].clone()
            if number == index:
                original(job, streams, added)

    m.setattr(layerwise, "quantize_layer", quantize_layer)
    return found


def layer_of(job: Job) -> int:
    """Which of the model's layers a job of GPTQ is."""
    return int(job.layers[0].attention.o_proj.module.split(".")[2])


def interrupt(*args: object) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def killer() -> Iterator[Callable[..., list[int]]]:
    """`run(n, …)` runs the command and kills it at its n-th change to the file system: [its exit status], after the
    number of changes where n is 0."""
    serve, pipe = [sys.executable, str(KILLER), "serve"], subprocess.PIPE
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(serve, stdin=pipe, stdout=pipe, text=True, env=environment) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(n: int, *args: str) -> list[int]:
            print(json.dumps([n, *args]), file=server.stdin, flush=True)
            return [int(server.stdout.readline()) for _ in range(1 if n else 2)]

        yield run


@contextmanager
def files_no_larger_than(nbytes: int) -> Iterator[None]:
    """The kernel lets no file grow further (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
