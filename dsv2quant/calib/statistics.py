"""Statistics: what calibration measured of a model's activations, in one file that serves many conversions.

A safetensors file. Linears that share an input share its statistics, under the name of one of them
(`TensorSpec.site`); for each input of K channels:

    <site>.amax              float32 [K]   largest magnitude of each channel
    <site>.square            float32 [K]   Σ x² over tokens
    <site>.weighted_square   float32 [K]   Σ g² x², g the routing weight; routed experts alone
    <layer>.self_attn.k_pe_radius  float32 [heads · qk_rope_head_dim / 2]   largest radius of each pair that is rotated,
                                   of each head of keys; a latent cache has one
    <layer>.self_attn.v_amax       float32 [heads · width]   largest magnitude of each channel of values, in plain
                                   attention

and, where asked for, of kv_b_proj's halves, which absorbed attention applies to inputs of their own, head by head:

    <layer>.self_attn.kv_b_proj.k.square  float32 [heads · qk_nope_head_dim]   Σ x²
    <layer>.self_attn.kv_b_proj.v.square  float32 [heads · kv_lora_rank]       Σ x²

`__metadata__.statistics` is JSON: the model (weights and configuration, as `checkpoint/identity.py` tells them apart),
the calibration text and tokens, tokens per site, and a digest of all this and the vectors.

The scales of an FP8 KV cache.

Plain attention has one for keys and one for values. An MLA cache holds one row per token: the normalised latent, then
the rotated RoPE key, k_pe. vLLM stores both under one scale, k_scale (csrc/cache_kernels.cu, concat_and_cache_mla), so
it must cover both; transformers with compressed-tensors takes k_scale for the latent and v_scale for k_pe
(compressed_tensors/modeling/kvcache.py). One value for both serves either. llm-compressor calibrates k_scale on the
latent alone, and k_pe may then be clipped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.spec import TensorSpec
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.identity import configured, sampled
from dsv2quant.errors import InputError, listing
from dsv2quant.formats.e4m3 import scale_of
from dsv2quant.storage.files import check_pointer
from dsv2quant.storage.safetensors import read_header

FAMILY = "dsv2quant.statistics/"
SCHEMA = FAMILY + "2"
K_HALF, V_HALF = "kv_b_proj.k", "kv_b_proj.v"


_ROUNDING, _TINY = 1e-5, 1e-30


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _is_model(value: object) -> bool:
    keys = ("name", "identity", "config")
    return isinstance(value, dict) and "revision" in value and all(isinstance(value.get(key), str) for key in keys)


def _is_calibration(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("source"), str):
        return False
    return all(_is_count(value.get(key)) and value[key] for key in ("windows", "ctx"))


_HEADER: dict[str, Callable[[Any], bool]] = {  # key → whether its value is what it must be
    "dsv2quant": lambda value: isinstance(value, str),
    "model": _is_model,
    "calibration": _is_calibration,
    "halves": lambda value: isinstance(value, bool),
    "counts": lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
    "fingerprint": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "digest": lambda value: isinstance(value, str),
}


def inputs(config: ModelConfig) -> Iterator[tuple[str, int, bool]]:
    """(site, channels, whether it is a routed expert's) of everything that is measured, layer by layer."""
    for layer in range(config.num_hidden_layers):
        specs = architecture(config).layer(layer)
        yield from dict.fromkeys((s.site, s.shape[1], s.expert is not None) for s in specs if s.site is not None)


def vectors(config: ModelConfig, halves: bool) -> dict[str, int]:
    """{name: length} of all vectors of a statistics file."""
    found = {}
    for name, columns, routed in inputs(config):
        for suffix in ("amax", "square", *(("weighted_square",) if routed else ())):
            found[f"{name}.{suffix}"] = columns
    for layer in range(config.num_hidden_layers):
        at, heads = f"model.layers.{layer}.self_attn", config.num_attention_heads
        key_heads = 1 if config.is_mla else config.num_key_value_heads
        found[f"{at}.k_pe_radius"] = key_heads * config.qk_rope_head_dim // 2
        if not config.is_mla:
            found[f"{at}.v_amax"] = config.cached_widths[1]
        elif halves:
            found[f"{at}.{K_HALF}.square"] = heads * config.qk_nope_head_dim
            found[f"{at}.{V_HALF}.square"] = heads * config.kv_lora_rank
    return found


def digest_of(about: Mapping[str, Any], arrays: Iterable[tuple[str, np.ndarray]]) -> str:
    """sha256 of what a file says, its own digest aside, and of its vectors by name."""
    found = hashlib.sha256(json.dumps({k: v for k, v in about.items() if k != "digest"}, sort_keys=True).encode())
    for name, array in arrays:
        found.update(f"\0{name}\0".encode())
        found.update(array.data)
    return found.hexdigest()


def read_about(path: Path) -> dict[str, Any]:
    """What the header of a statistics file says, of whichever version. Raises InputError where it is none of ours, or
    damaged."""
    fix = "give the file that `dsv2quant calibrate` made"
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise InputError(what, where=path, fix=fix)
    with path.open("rb") as file:
        check_pointer(file.read(64), path)
    try:
        read_header(path)
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get("statistics", ""))
    except (InputError, OSError, SafetensorError, ValueError, RecursionError) as error:
        what = str(error).removeprefix(f"{path}: ").partition(" (")[0]
        raise InputError(f"not a statistics file: {what}", where=path, fix=fix) from None
    if not isinstance(about, dict) or not str(about.get("schema")).startswith(FAMILY):
        raise InputError("not a statistics file: its header is another", where=path, fix=fix)
    return about


class Statistics:
    """An opened statistics file; arrays are read when asked for. `counts` are tokens by site, `tokens` those of the
    text, `source` its name; `halves` says whether kv_b_proj's halves were measured."""

    def __init__(self, path: Path) -> None:
        """Raises InputError where the file is missing, damaged or none of ours. `check` says whether it is true."""
        self.path = path
        self.about = read_about(path)
        if self.about["schema"] != SCHEMA:
            what = f"has schema {self.about['schema']!r}, not {SCHEMA}"
            raise InputError(what, where=path, fix="calibrate again with this version")
        lacking = [key for key, is_right in _HEADER.items() if not is_right(self.about.get(key))]
        if lacking:
            raise InputError(f"its header is incomplete: {listing(lacking)}", where=path, fix="calibrate again")
        self.counts: Mapping[str, int] = self.about["counts"]
        self.windows, self.ctx = (int(self.about["calibration"][key]) for key in ("windows", "ctx"))
        self.source = str(self.about["calibration"]["source"])
        self.tokens = self.windows * self.ctx
        self.halves = bool(self.about["halves"])
        self._file: Any = safe_open(path, "np")
        self._names = set(self._file.keys())

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise InputError where the statistics are of another model or configuration, or are not what was measured.
        Reads the whole file: V2's 0.8 GB take some ten seconds."""
        self.check_identity(checkpoint, sampled(checkpoint))
        self.check_values(checkpoint)

    def check_identity(self, checkpoint: Checkpoint, identity: str) -> None:
        """Raise InputError where the statistics are of other weights than those of this `identity`."""
        model = self.about["model"]
        if model["identity"] != identity:
            fix = f"calibrate {checkpoint.model}"
            raise InputError(f"statistics of another model, {model['name']}", where=self.path, fix=fix)

    def check_values(self, checkpoint: Checkpoint) -> None:
        """The rest of `check`, which needs no weights."""
        model, config = self.about["model"], checkpoint.config
        fix = f"calibrate {checkpoint.model}"
        if model["config"] != configured(config):
            what = f"statistics of {model['name']} with another config.json"
            raise InputError(what, where=self.path, fix=fix)
        wanted, fix = vectors(config, self.halves), "calibrate again"
        for what, names in (("holds no", wanted.keys() - self._names), ("holds unknown", self._names - wanted.keys())):
            if names:
                raise InputError(f"{what} {listing(sorted(names))}", where=self.path, fix=fix)
        for name, columns, routed in inputs(config):
            self._check_input(name, columns, routed)
        self._check_counts(config)
        if self.about["digest"] != digest_of(self.about, ((n, self._read(n, wanted[n])) for n in sorted(wanted))):
            raise InputError("was changed: its digest is another", where=self.path, fix=fix)

    def _check_input(self, name: str, columns: int, routed: bool) -> None:
        """Raise InputError where an input's vectors can't be true: Σ x² of each channel lies between its largest x²
        and as many times that as there are tokens. Only experts may see nothing but zeros, which pruned ones do."""
        count = self.counts.get(name)
        if count is None:
            raise InputError(f"holds no count of {name}", where=self.path, fix="calibrate again")
        amax, square = (self._read(f"{name}.{suffix}", columns).astype(np.float64) for suffix in ("amax", "square"))
        largest = amax**2
        # The square of a tiny input is 0 in float32; sums are rounded once.
        possible = (square <= largest * count * (1 + _ROUNDING)) & (square >= largest * (1 - _ROUNDING) - _TINY)
        if not possible.all():
            what = f"{name}.square and .amax can't be of the same {count:,} tokens at channel {int(possible.argmin())}"
            raise InputError(what, where=self.path, fix="calibrate again")
        if not (routed or amax.any()):
            raise InputError(f"{name}.amax is all zeros", where=self.path, fix="calibrate again")

    def _check_counts(self, config: ModelConfig) -> None:
        """Raise InputError unless every token came by everywhere, and by as many experts as it has."""
        experts: dict[str, int] = defaultdict(int)
        known = {}
        for name, _, routed in inputs(config):
            known[name] = self.counts[name]
            if routed:
                experts[re.sub(r"\d+\.(\w+)$", r"*.\1", name)] += self.counts[name]
            elif self.counts[name] != self.tokens:
                what = f"{name} was measured on {self.counts[name]:,} of {self.tokens:,} tokens"
                raise InputError(what, where=self.path, fix="calibrate again")
        chosen = self.tokens * config.num_experts_per_tok
        odd = next((name for name, total in experts.items() if total != chosen), None)
        if odd is not None or known != self.counts:
            what = f"tokens of {odd or listing(sorted(self.counts.keys() - known.keys()))} don't add up"
            raise InputError(what, where=self.path, fix="calibrate again")

    def count(self, spec: TensorSpec) -> int:
        """Tokens that the tensor's input was measured on."""
        return self.counts.get(str(spec.site), 0)

    def amax(self, spec: TensorSpec) -> np.ndarray:
        """Largest magnitude of each input channel, float32 [K]; zeros where no token came by."""
        return self._read(f"{spec.site}.amax", spec.shape[1])

    def mean_square(self, spec: TensorSpec) -> np.ndarray:
        """Mean square of each input channel, float32 [K], weighted with the squared routing weight before `down_proj`.

        An expert's own is drawn toward its layer's, as if by K tokens of it: for gate and up that of all tokens, scaled
        to the same sum; for down, whose channels are its own, a flat one. Without any token it is all there is.
        """
        name, columns = spec.site, spec.shape[1]
        if spec.expert is None:
            return self._read(f"{name}.square", columns) / np.float32(max(1, self.count(spec)))
        if spec.role == "routed.down_proj":
            own, prior = self._read(f"{name}.weighted_square", columns), np.ones(columns, np.float32)
        else:
            own = self._read(f"{name}.square", columns)
            prior = self._read(f"model.layers.{spec.layer}.mlp.gate.square", columns)
        if not own.any():
            return prior
        count = np.float32(self.count(spec))
        share = count / (count + columns)
        blended: np.ndarray = (share * own + (1 - share) * prior * (own.sum() / prior.sum())) / count
        return blended

    def squares(self, spec: TensorSpec) -> np.ndarray:
        """Σ x² of each input channel over tokens, float32 [K]; zeros where no token came by."""
        return self._read(f"{spec.site}.square", spec.shape[1])

    def half_squares(self, layer: int, half: str) -> np.ndarray:
        """Σ x² over tokens of what absorbed attention applies a half of kv_b_proj to, `K_HALF` or `V_HALF`: float32
        [heads · columns]."""
        return self._read(f"model.layers.{layer}.self_attn.{half}.square")

    def kv_ranges(self, layer: int) -> tuple[float, float]:
        """(largest magnitude of the cached latent, or of values; largest radius of pairs of keys) of a layer."""
        at = f"model.layers.{layer}.self_attn"
        values = f"{at}.v_amax" if f"{at}.v_amax" in self._names else f"{at}.kv_b_proj.amax"
        return float(self._read(values).max()), float(self._read(f"{at}.k_pe_radius").max())

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
        if not (np.isfinite(found).all() and (found >= 0).all()):
            raise InputError(f"{name} is not finite, or negative", where=self.path, fix=fix)
        return found


def kv_scales(amax: float, k_pe_radius: float, *, is_mla: bool) -> tuple[np.float32, np.float32]:
    """The KV-cache scales of a layer, of keys and of values: the longest RoPE pair / 448, and the largest magnitude of
    values / 448. A latent cache has one for both: that of the larger of its latent's largest magnitude and that pair.

    The latent is `kv_a_layernorm`'s output; `k_pe_radius` is max √(a² + b²) over the pairs of keys as cached, that is
    after YaRN's magnitude where that is not 1. Raises ValueError where either is NaN or beyond float32.
    """
    if not is_mla:
        return scale_of(k_pe_radius), scale_of(amax)
    scale = scale_of(float(np.maximum(amax, k_pe_radius)))  # unlike max(), keeps a NaN
    return scale, scale
