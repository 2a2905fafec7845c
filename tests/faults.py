"""Faults of artifacts, each made in a copy: what a damaged converter, or an engine that misreads, would come to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

EXPERT = "model.layers.1.mlp.experts."


def copy(artifact: Path, out: Path, tensors: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The artifact in another folder with its tensors changed in place, and without a manifest that would tell."""
    shutil.copytree(artifact, out, ignore=shutil.ignore_patterns("dsv2quant*.json"))
    path = out / "model.safetensors"
    held = load_file(path)
    tensors(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, path, metadata={"format": "pt"})
    return out


def scales_permuted(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if "scale" in name and held[name].numel() > 1]:
        held[name] = held[name].flatten().flip(0).view_as(held[name])


def zero_point_dropped(held: dict[str, torch.Tensor]) -> None:
    """Codes that count from 0, not from −8: one that holds 8 in each nibble is what −8 + 8 is."""
    for name in [name for name in held if name.endswith("weight_packed")]:
        held[name] = held[name] ^ torch.tensor(0x88888888 - (1 << 32), dtype=torch.int32)


def expert_swapped(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if name.startswith(f"{EXPERT}0.")]:
        other = name.replace(f"{EXPERT}0.", f"{EXPERT}1.")
        held[name], held[other] = held[other], held[name]


def cache_scales_halved(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if name.endswith((".k_scale", ".v_scale"))]:
        held[name] = held[name] / 2


def nothing(held: dict[str, torch.Tensor]) -> None:
    """A copy that is right."""


def without_bos(artifact: Path, out: Path) -> Path:
    """A copy whose tokenizer begins no text with BOS."""
    copy(artifact, out, nothing)
    for name, key in (("tokenizer_config.json", "add_bos_token"), ("tokenizer.json", "post_processor")):
        path = out / name
        raw = json.loads(path.read_text())
        path.write_text(json.dumps(raw | {key: False if key == "add_bos_token" else None}))
    return out


def other_end(artifact: Path, out: Path) -> Path:
    """A copy that ends texts with another token."""
    copy(artifact, out, nothing)
    for name in ("config.json", "generation_config.json"):
        path = out / name
        raw = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(raw | {"eos_token_id": 5}))
    return out
