"""Statistics: what calibration measured of a model's activations, in one file that serves many conversions.

A safetensors file. Linears that share an input share its statistics, under the name of one of them
(`site`); for each input of K channels:

    <site>.amax              float32 [K]   largest magnitude of each channel
    <site>.square            float32 [K]   Σ x² over tokens
    <site>.weighted_square   float32 [K]   Σ g² x², g the routing weight; routed experts alone
    <layer>.self_attn.k_pe_radius  float32 [qk_rope_head_dim / 2]   largest radius of each pair that RoPE rotates

and, where asked for, of kv_b_proj's halves, which absorbed attention applies to inputs of their own, head by head:

    <layer>.self_attn.kv_b_proj.k.square  float32 [heads · qk_nope_head_dim]   Σ x²
    <layer>.self_attn.kv_b_proj.v.square  float32 [heads · kv_lora_rank]       Σ x²

`__metadata__.statistics` is JSON: the model (`Checkpoint.identity`), the calibration text and tokens, tokens per site.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dsv2quant.checkpoint import Checkpoint
from dsv2quant.errors import InputError
from dsv2quant.files import check_pointer
from dsv2quant.names import Slot

SCHEMA = "dsv2quant.statistics/1"
K_HALF, V_HALF = "kv_b_proj.k", "kv_b_proj.v"


def site(slot: Slot) -> str:
    """The name under which a linear's or router's input is measured."""
    parent, _, leaf = slot.module.rpartition(".")
    if leaf in ("gate_proj", "up_proj") and parent.endswith("shared_experts"):
        return f"model.layers.{slot.layer}.mlp.gate"  # the router's own input
    if leaf == "up_proj":
        return f"{parent}.gate_proj"
    if leaf in ("q_proj", "q_a_proj"):
        return f"{parent}.kv_a_proj_with_mqa"
    return slot.module


class Statistics:
    """An opened statistics file; arrays are read when asked for. `counts` are tokens by site, `tokens` those of the
    text, `source` its name, `identity` is the model's; `halves` says whether kv_b_proj's halves were measured."""

    def __init__(self, path: Path) -> None:
        """Raises InputError where the file is missing, damaged or none of ours."""
        self.path = path
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise InputError(what, where=path, fix="give the file that `dsv2quant calibrate` made")
        with path.open("rb") as file:
            check_pointer(file.read(64), path)
        try:
            self._file: Any = safe_open(path, "np")
            self.about: dict[str, Any] = json.loads((self._file.metadata() or {}).get("statistics", ""))
        except (OSError, SafetensorError, ValueError) as error:
            fix = "give a file that `dsv2quant calibrate` made"
            raise InputError(f"not a statistics file: {error}", where=path, fix=fix) from None
        schema = self.about.get("schema") if isinstance(self.about, dict) else None
        if schema != SCHEMA:
            raise InputError(
                f"has schema {schema!r}, not {SCHEMA}", where=path, fix="calibrate again with this version"
            )
        try:
            self.counts: Mapping[str, int] = {str(name): int(count) for name, count in self.about["counts"].items()}
            self.identity = str(self.about["model"]["identity"])
            self.windows, self.ctx = (int(self.about["calibration"][key]) for key in ("windows", "ctx"))
            self.source = str(self.about["calibration"]["source"])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError("its header is incomplete", where=path, fix="calibrate again") from None
        self.tokens = self.windows * self.ctx
        self.halves = bool(self.about.get("halves"))
        self._names = set(self._file.keys())

    def check_model(self, checkpoint: Checkpoint) -> None:
        """Raise InputError where the statistics are of another model."""
        if self.identity != checkpoint.identity():
            what = f"statistics of another model, {self.about['model'].get('name')}"
            raise InputError(what, where=self.path, fix=f"calibrate {checkpoint.model}")

    def count(self, slot: Slot) -> int:
        """Tokens that the tensor's input was measured on."""
        return self.counts.get(site(slot), 0)

    def amax(self, slot: Slot) -> np.ndarray:
        """Largest magnitude of each input channel, float32 [K]; zeros where no token came by."""
        return self._read(f"{site(slot)}.amax", slot.shape[1])

    def mean_square(self, slot: Slot) -> np.ndarray:
        """Mean square of each input channel, float32 [K], weighted with the squared routing weight before `down_proj`.

        An expert's own is drawn toward its layer's, as if by K tokens of it: for gate and up that of all tokens, scaled
        to the same sum; for down, whose channels are its own, a flat one. Without any token it is all there is.
        """
        name, columns = site(slot), slot.shape[1]
        if slot.expert is None:
            return self._read(f"{name}.square", columns) / np.float32(max(1, self.count(slot)))
        if slot.role == "routed.down_proj":
            own, prior = self._read(f"{name}.weighted_square", columns), np.ones(columns, np.float32)
        else:
            own = self._read(f"{name}.square", columns)
            prior = self._read(f"model.layers.{slot.layer}.mlp.gate.square", columns)
        if not own.any():
            return prior
        count = np.float32(self.count(slot))
        share = count / (count + columns)
        blended: np.ndarray = (share * own + (1 - share) * prior * (own.sum() / prior.sum())) / count
        return blended

    def squares(self, slot: Slot) -> np.ndarray:
        """Σ x² of each input channel over tokens, float32 [K]; zeros where no token came by."""
        return self._read(f"{site(slot)}.square", slot.shape[1])

    def half_squares(self, layer: int, half: str) -> np.ndarray:
        """Σ x² over tokens of what absorbed attention applies a half of kv_b_proj to, `K_HALF` or `V_HALF`: float32
        [heads · columns]."""
        return self._read(f"model.layers.{layer}.self_attn.{half}.square")

    def kv_ranges(self, layer: int) -> tuple[float, float]:
        """(largest magnitude of the cached latent, largest radius of k_pe's pairs) of a layer."""
        at = f"model.layers.{layer}.self_attn"
        latent, radius = (self._read(f"{at}.{name}") for name in ("kv_b_proj.amax", "k_pe_radius"))
        return float(latent.max()), float(radius.max())

    def describe(self) -> dict[str, Any]:
        """What a manifest says of them."""
        return {key: value for key, value in self.about.items() if key not in ("schema", "counts", "fingerprint")}

    def _read(self, name: str, columns: int | None = None) -> np.ndarray:
        fix = "calibrate again"
        if name not in self._names:
            raise InputError(f"holds no {name}", where=self.path, fix=fix)
        found: np.ndarray = self._file.get_tensor(name)
        if found.dtype != np.float32 or found.ndim != 1 or (columns is not None and len(found) != columns):
            what = f"{name} is {found.dtype} {list(found.shape)}, not float32 [{columns or 'channels'}]"
            raise InputError(what, where=self.path, fix=fix)
        if not np.isfinite(found).all():
            raise InputError(f"{name} is not finite", where=self.path, fix=fix)
        return found
