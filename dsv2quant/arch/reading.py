"""What families read config.json with, in every spelling in the wild.

Which keys there are and what their defaults are each family says (deepseek_v2.py and its neighbours): those of the
code that the checkpoints were published with. A value that this tool would have to guess at is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from dsv2quant.arch.config import ModelConfig, Yarn
from dsv2quant.errors import InputError

DTYPES = ("bfloat16", "float16", "float32")
MAX_EXPERTS = 1 << 16  # of all layers: the largest models have some 25,000, and each is listed
_LARGEST = {"num_hidden_layers": 1024, "n_routed_experts": 4096, "num_nextn_predict_layers": 64}
# Of latent attention in DeepSeek's own classes.
LATENT = {
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
_LINEAR_KEYS = {"type", "rope_type", "rope_theta", "factor"}
_YARN_KEYS = {"type", "rope_type", "rope_theta", *(field.name for field in fields(Yarn))}
_CALLED = {"linear": "the linear scaling's", "yarn": "YaRN's"}


class Reader:
    """Typed access to the raw dictionary; null counts as absent, as in DeepSeek's configuration class."""

    def __init__(self, raw: Mapping[str, Any], where: object) -> None:
        self.raw, self.where = raw, where

    def error(self, key: str, value: object, rule: str) -> InputError:
        return InputError(f"{key} is {_shown(value)}", where=self.where, fix=rule)

    def plain(self, key: str, default: Any) -> Any:
        """A value of the default's type; a count may be 0 where its default is."""
        if isinstance(default, bool):
            return self.boolean(key, default)
        if isinstance(default, float):
            return self.number(key, default)
        return self.integer(key, default, min(default, 1), _LARGEST.get(key, 1 << 31))

    def integer(self, key: str, default: Any, minimum: int = 1, maximum: int = 1 << 31) -> Any:
        rule = f"it must be an integer from {minimum} to {maximum}"
        return self._checked(key, default, lambda value: type(value) is int and minimum <= value <= maximum, rule)

    def number(self, key: str, default: float, raw: Mapping[str, Any] | None = None) -> float:
        def fits(value: Any) -> bool:
            return type(value) in (int, float) and 0 <= value <= sys.float_info.max

        return float(self._checked(key, default, fits, "it must be a finite number, not negative", raw))

    def boolean(self, key: str, default: bool) -> bool:
        return bool(self._checked(key, default, lambda value: isinstance(value, bool), "it must be true or false"))

    def mapping(self, key: str) -> Any:
        return self._checked(key, None, lambda value: isinstance(value, dict), "it must be an object")

    def require(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        return str(self._checked(key, default, allowed.__contains__, f"supported: {', '.join(allowed)}"))

    def _checked(
        self, key: str, default: Any, fits: Callable[[Any], bool], rule: str, raw: Mapping[str, Any] | None = None
    ) -> Any:
        value = (self.raw if raw is None else raw).get(key)
        if value is None:
            return default
        if not fits(value):
            raise self.error(key, value, rule)
        return value


def _shown(value: object) -> str:
    """A value as an error shows it, whatever its size."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists within lists
        return "a value too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def common(read: Reader, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig of these names and defaults, and those that every family spells alike.

    Raises InputError where the arithmetic is another than every family's, or numbers don't go together.
    """
    read.require("hidden_act", "silu", ("silu",))
    if read.boolean("mlp_bias", False):
        raise read.error("mlp_bias", "true", "FFN biases are not supported")
    fields = {key: read.plain(key, default) for key, default in defaults.items()}
    layers = fields["num_hidden_layers"] + fields.get("num_nextn_predict_layers", 0)
    n_routed = fields.get("n_routed_experts", 0)
    if layers * n_routed > MAX_EXPERTS:
        what = f"layers × n_routed_experts is {layers:,} × {n_routed:,}"
        raise InputError(what, where=read.where, fix=f"no model has more than {MAX_EXPERTS:,} experts")
    return fields | {
        "num_labels": len(read.mapping("id2label") or ()) or read.integer("num_labels", 2),
        "dtype": _dtype(read),
        "quantization": read.mapping("quantization_config"),
        "attention_bias": read.boolean("attention_bias", False),
        "tie_word_embeddings": read.boolean("tie_word_embeddings", False),
    }


def plain_heads(read: Reader, hidden: int, heads: int) -> dict[str, Any]:
    """The fields of plain attention, as Llama's. Raises InputError where heads don't go together."""
    width, kv = read.integer("head_dim", None), read.integer("num_key_value_heads", heads)
    if heads % kv:
        raise read.error("num_key_value_heads", kv, f"it must divide num_attention_heads, {heads}")
    if width is None:
        if hidden % heads:
            raise read.error("hidden_size", hidden, f"it must be a multiple of num_attention_heads, {heads}")
        width = hidden // heads
    if width % 2:
        raise read.error("head_dim", width, "RoPE rotates pairs: it must be even")
    return {
        "num_key_value_heads": kv, "qk_nope_head_dim": 0, "qk_rope_head_dim": width, "v_head_dim": width,
        "rope_halves": True,
    }  # fmt: skip


def latent_heads(read: Reader, defaults: Mapping[str, int], heads: int) -> dict[str, Any]:
    """The fields of latent attention of these defaults. Raises InputError where its RoPE has no pairs."""
    fields = {key: read.plain(key, default) for key, default in defaults.items()}
    if fields["qk_rope_head_dim"] % 2:
        raise read.error("qk_rope_head_dim", fields["qk_rope_head_dim"], "RoPE rotates pairs: it must be even")
    q_rank = read.integer("q_lora_rank", None if "q_lora_rank" in read.raw else fields["q_lora_rank"]) or None
    halves = not read.boolean("rope_interleave", True)
    return fields | {"q_lora_rank": q_rank, "num_key_value_heads": heads, "rope_halves": halves}


def groups(read: Reader, n_routed: int, n_group: Any, topk_group: Any) -> dict[str, int]:
    """The groups of experts that a token's are chosen of. Raises InputError where they don't divide."""
    if n_group is None or n_routed % n_group:
        raise read.error("n_group", n_group, f"it must divide the {n_routed} routed experts")
    if topk_group is None or topk_group > n_group:
        raise read.error("topk_group", topk_group, f"it must be 1 to n_group, {n_group}")
    return {"n_group": n_group, "topk_group": topk_group}


def corrected_choice(read: Reader, n_routed: int, default: tuple[int, int]) -> dict[str, Any]:
    """How DeepSeek-V3's `MoEGate` chooses experts: by sigmoid scores with a correction bias, of the groups whose best
    two are best; `default` are n_group and topk_group. Raises InputError where the model chooses otherwise."""
    read.require("scoring_func", "sigmoid", ("sigmoid",))
    read.require("topk_method", "noaux_tc", ("noaux_tc",))
    found = groups(read, n_routed, read.integer("n_group", default[0]), read.integer("topk_group", default[1]))
    rules = {"scoring_func": "sigmoid", "group_score": "top2", "router_bias": True, "scale_normalised": True}
    return found | rules


def check_choice(config: ModelConfig, read: Reader) -> ModelConfig:
    """The configuration itself. Raises InputError where a token's experts are more than it can reach."""
    reachable, chosen = config.n_routed_experts // config.n_group * config.topk_group, config.num_experts_per_tok
    if config.n_routed_experts and not 1 <= chosen <= reachable:
        raise read.error("num_experts_per_tok", chosen, f"it must be 1 to {reachable}, the experts in reach")
    return config


def rope(read: Reader, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The fields of RoPE, from `rope_scaling` + `rope_theta`, or from transformers 5's `rope_parameters`; `kinds` are
    the scalings that the family knows, of 'linear' and 'yarn'. Raises InputError for what is unknown or out of range.
    """
    given = dict(read.mapping("rope_parameters") or {})
    given.update(read.mapping("rope_scaling") or {})
    theta = read.number("rope_theta", read.number("rope_theta", 10000.0), raw=given)
    if theta <= 1:
        raise read.error("rope_theta", theta, "it must be greater than 1")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind != "default" and kind not in kinds:
        raise read.error("rope type", kind, f"supported: {', '.join((*kinds, 'default'))}")
    known = {"default": given.keys(), "linear": _LINEAR_KEYS, "yarn": _YARN_KEYS}[kind]
    unknown = sorted(key for key, value in given.items() if key not in known and value is not None)
    if unknown:
        raise read.error("rope key", unknown[0], f"supported: {', '.join(sorted(known))}")
    factor = read.number("factor", Yarn.factor, raw=given) if kind != "default" else 1.0
    if factor < 1:
        raise read.error("factor", factor, f"{_CALLED[kind]} factor must be at least 1")
    yarn = _yarn(read, given, factor) if kind == "yarn" else None
    return {"rope_theta": theta, "yarn": yarn, "rope_linear": factor if kind == "linear" else 1.0}


def _yarn(read: Reader, given: Mapping[str, Any], factor: float) -> Yarn:
    original = given.get("original_max_position_embeddings", Yarn.original_max_position_embeddings)
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        raise read.error("original_max_position_embeddings", original, "it must be a positive integer")
    others = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    numbers = {key: read.number(key, getattr(Yarn, key), raw=given) for key in others}
    return Yarn(factor, original, **numbers)


def _dtype(read: Reader) -> str | None:
    value = read.raw.get("dtype") or read.raw.get("torch_dtype")
    name = str(value).removeprefix("torch.") if value is not None else None
    if name is not None and name not in DTYPES:
        raise read.error("dtype", value, f"supported: {', '.join(DTYPES)}")
    return name
