"""Artifacts with static input scales, written shard by shard from a plan, with scales measured by the runtime."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from dsv2quant.calib.statistics import kv_scales
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.formats.codec import Inputs
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.layers import Linear, Served
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.consumers import input_group
from dsv2quant.planning.plan import Plan, make_plan
from dsv2quant.planning.recipe import Recipe

AUTOFP8 = recipe.parse(
    "name: autofp8\nrules:\n"
    "  - {roles: [embed, lm_head, score, router, norm, bias, kv_b_proj], scheme: bf16}\n"
    "  - {roles: ['*'], scheme: fp8-autofp8}\n",
    "recipe autofp8",
)
RECIPES: dict[str, Recipe] = {"fp8-static": recipe.builtin("fp8-static"), "fp8-autofp8": AUTOFP8}


class Watched(Linear):
    """A linear layer that remembers the largest magnitude it was given."""

    seen = 0.0

    def __call__(self, x: torch.Tensor | Served) -> torch.Tensor:
        self.seen = max(self.seen, float((x.x if isinstance(x, Served) else x).abs().max()))
        return super().__call__(x)


def watch(model: Model) -> dict[str, Watched]:
    """Every linear layer of a resident model, replaced by a watched one, under its checkpoint name."""
    found: dict[str, Watched] = {}

    def visit(part: object, name: str) -> None:
        for field in dataclasses.fields(part):  # type: ignore[arg-type]
            value, at = getattr(part, field.name), f"{name}.{field.name}"
            if isinstance(value, Linear):
                found[at] = Watched(value.weight, value.bias, value.activation, value.input_scale)
                setattr(part, field.name, found[at])
            elif field.name == "experts":
                for i, expert in enumerate(value):
                    visit(expert, f"{at}.{i}")
            elif dataclasses.is_dataclass(value) and field.name != "config":
                names = {"attention": "self_attn", "ffn": "mlp", "shared": "shared_experts"}
                visit(value, f"{name}.{names.get(field.name, field.name)}")

    for i, layer in enumerate(model.layers()):
        visit(layer, f"model.layers.{i}")
    return found


def write(source: Path, out: Path, scheme: str, kv: float | None = None, **options) -> Plan:
    """Quantize a checkpoint with scales from 64 random tokens; `kv` is every layer's KV-cache magnitude."""
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, RECIPES[scheme], kv_scales=kv is not None, **options)
    model = Model(checkpoint)
    watched = watch(model)
    model.forward(some_tokens(checkpoint, 2, 32))
    amax: dict[str, float] = defaultdict(float)
    groups = {line.spec: input_group(line.spec, plan.targets) for line in plan.entries}
    for spec, group in groups.items():
        if spec.module in watched:
            amax[group] = max(amax[group], watched[spec.module].seen)
    tensors: dict[str, np.ndarray] = {}
    for step in plan.steps:
        weights = [checkpoint.encodable(line.weight) for line in step.entries]
        inputs = [Inputs(np.ones(1, np.float32), amax[groups[line.spec]]) for line in step.entries]
        encoded = CODECS[step.entries[0].scheme].encode(weights, "cpu", "rtn", inputs)
        for line, parts in zip(step.entries, encoded, strict=True):
            arrays = list(parts.values())
            arrays += [
                np.full(o.shape, kv_scales(kv or 0, kv or 0, is_mla=True)[0]) for o in line.outputs[len(arrays) :]
            ]
            tensors |= {o.name: array for o, array in zip(line.outputs, arrays, strict=True)}
    out.mkdir(parents=True)
    for shard in plan.shards:
        (out / shard.file).write_bytes(shard.header + b"".join(tensors[o.name].tobytes() for o in shard.outputs))
        assert (out / shard.file).stat().st_size == shard.nbytes
    if (index := plan.index()) is not None:
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(plan.config))
    return plan


def some_tokens(checkpoint: Checkpoint, rows: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, checkpoint.config.vocab_size, (rows, length), generator=generator)
