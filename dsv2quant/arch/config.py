"""The typed DeepSeek-V2 configuration, read from every spelling of `config.json` in the wild.

Keys and defaults are those of DeepSeek's own `configuration_deepseek.py` (published with the V2 checkpoints), not of
transformers, whose class has other defaults. A value that this tool would have to guess at is an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from dsv2quant.errors import InputError

CAUSAL_LM = "DeepseekV2ForCausalLM"
SEQUENCE_CLASSIFICATION = "DeepseekV2ForSequenceClassification"
DTYPES = ("bfloat16", "float16", "float32")

MAX_EXPERTS = 1 << 16  # of all layers: the largest models have some 25,000, and each is listed
_LARGEST = {"num_hidden_layers": 1024, "n_routed_experts": 4096}


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension as DeepSeek uses it (arXiv:2309.00071; `DeepseekV2YarnRotaryEmbedding`)."""

    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


_YARN_KEYS = {"type", "rope_type", "rope_theta", *(field.name for field in fields(Yarn))}


@dataclass(frozen=True)
class ModelConfig:
    """What the shapes and the arithmetic of a DeepSeek-V2 model depend on. Absent experts are 0, absent groups 1.

    What has a default here is read as it stands: a key that is missing has the default.
    """

    architecture: str
    q_lora_rank: int | None
    n_group: int
    topk_group: int
    rope_theta: float
    yarn: Yarn | None
    num_labels: int
    dtype: str | None
    quantization: Mapping[str, Any] | None
    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    tie_word_embeddings: bool = False

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def trained_context(self) -> int:
        """The longest sequence of the pre-YaRN training, in tokens."""
        return self.yarn.original_max_position_embeddings if self.yarn else self.max_position_embeddings

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's FFN is routed experts (`DeepseekV2DecoderLayer.__init__`)."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: object) -> ModelConfig:
        """Build from a parsed `config.json`; `where` names it in errors.

        Raises InputError for another architecture, a value of the wrong type or range, or an unknown RoPE key.
        """
        read = _Reader(raw, where)
        architecture = _architecture(read)
        if not read.boolean("use_mla", True):
            what = "use_mla is false: the model has plain multi-head attention"
            raise InputError(what, where=where, fix="not supported yet, only multi-head latent attention is")
        plain = {field.name: read.plain(field.name, field.default) for field in fields(cls) if field.default != MISSING}
        layers, n_routed = plain["num_hidden_layers"], plain["n_routed_experts"]
        if layers * n_routed > MAX_EXPERTS:
            what = f"num_hidden_layers × n_routed_experts is {layers:,} × {n_routed:,}"
            raise InputError(what, where=where, fix=f"no model has more than {MAX_EXPERTS:,} experts")
        n_group, topk_group = _groups(read, n_routed)
        yarn, theta = _rope(read)
        config = cls(
            architecture=architecture,
            q_lora_rank=read.integer("q_lora_rank", None if "q_lora_rank" in raw else 1536) or None,
            n_group=n_group,
            topk_group=topk_group,
            rope_theta=theta,
            yarn=yarn,
            num_labels=len(read.mapping("id2label") or ()) or read.integer("num_labels", 2),
            dtype=_dtype(read),
            quantization=read.mapping("quantization_config"),
            **plain,
        )
        _check(config, read)
        return config


class _Reader:
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


def _check(config: ModelConfig, read: _Reader) -> None:
    """Raise InputError where the arithmetic is another than DeepSeek-V2's, or numbers don't go together."""
    read.require("hidden_act", "silu", ("silu",))
    read.require("scoring_func", "softmax", ("softmax",))
    if read.boolean("mlp_bias", False):
        raise read.error("mlp_bias", "true", "DeepSeek-V2 has no FFN biases")
    if config.qk_rope_head_dim % 2:
        raise read.error("qk_rope_head_dim", config.qk_rope_head_dim, "RoPE rotates pairs: it must be even")
    reachable, chosen = config.n_routed_experts // config.n_group * config.topk_group, config.num_experts_per_tok
    if config.n_routed_experts and not 1 <= chosen <= reachable:
        raise read.error("num_experts_per_tok", chosen, f"it must be 1 to {reachable}, the experts in reach")


def _shown(value: object) -> str:
    """A value as an error shows it, whatever its size."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists within lists
        return "a value too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _architecture(read: _Reader) -> str:
    names = read.raw.get("architectures")
    if names is None and read.raw.get("model_type") == "deepseek_v2":
        return CAUSAL_LM
    if not isinstance(names, list) or len(names) != 1 or names[0] not in (CAUSAL_LM, SEQUENCE_CLASSIFICATION):
        within = next((key for key in ("language_config", "text_config") if isinstance(read.raw.get(key), dict)), None)
        alone = f"; take the language model of {within} out, as a checkpoint of its own" if within else ""
        raise read.error("architectures", names, f"supported: {CAUSAL_LM}, {SEQUENCE_CLASSIFICATION}{alone}")
    read.require("model_type", "deepseek_v2", ("deepseek_v2",))
    return str(names[0])


def _groups(read: _Reader, n_routed: int) -> tuple[int, int]:
    # 'gready' is the default's spelling in DeepSeek's configuration class.
    method = read.require("topk_method", "greedy", ("greedy", "gready", "group_limited_greedy"))
    if method != "group_limited_greedy" or not n_routed:
        return 1, 1
    n_group = read.integer("n_group", None)
    topk_group = read.integer("topk_group", None)
    if n_group is None or n_routed % n_group:
        raise read.error("n_group", n_group, f"it must divide the {n_routed} routed experts")
    if topk_group is None or topk_group > n_group:
        raise read.error("topk_group", topk_group, f"it must be 1 to n_group, {n_group}")
    return n_group, topk_group


def _rope(read: _Reader) -> tuple[Yarn | None, float]:
    """(YaRN or None, theta) from `rope_scaling` + `rope_theta`, or from transformers 5's `rope_parameters`."""
    rope = dict(read.mapping("rope_parameters") or {})
    rope.update(read.mapping("rope_scaling") or {})
    theta = read.number("rope_theta", read.number("rope_theta", 10000.0), raw=rope)
    if theta <= 1:
        raise read.error("rope_theta", theta, "it must be greater than 1")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None, theta
    if kind != "yarn":
        raise read.error("rope type", kind, "supported: yarn, default")
    unknown = sorted(key for key, value in rope.items() if key not in _YARN_KEYS and value is not None)
    if unknown:
        raise read.error("rope key", unknown[0], f"supported: {', '.join(sorted(_YARN_KEYS))}")
    original = rope.get("original_max_position_embeddings", Yarn.original_max_position_embeddings)
    factor = read.number("factor", Yarn.factor, raw=rope)
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        raise read.error("original_max_position_embeddings", original, "it must be a positive integer")
    if factor < 1:
        raise read.error("factor", factor, "YaRN's factor must be at least 1")
    others = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    numbers = {key: read.number(key, getattr(Yarn, key), raw=rope) for key in others}
    return Yarn(factor, original, **numbers), theta


def _dtype(read: _Reader) -> str | None:
    value = read.raw.get("dtype") or read.raw.get("torch_dtype")
    name = str(value).removeprefix("torch.") if value is not None else None
    if name is not None and name not in DTYPES:
        raise read.error("dtype", value, f"supported: {', '.join(DTYPES)}")
    return name
