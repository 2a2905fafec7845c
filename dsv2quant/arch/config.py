"""The typed configuration of a model: what its shapes and its arithmetic depend on, whatever its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

CLASSIFIER = "ForSequenceClassification"  # how the names of such classes end


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension as DeepSeek uses it (arXiv:2309.00071; `DeepseekV2YarnRotaryEmbedding`)."""

    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """What the shapes and the arithmetic of a model depend on. Absent experts are 0, absent groups 1. `gguf` is what
    llama.cpp calls the architecture.

    Latent attention has `kv_lora_rank` above 0. In plain attention, of `num_key_value_heads` heads of keys and values,
    it is 0 and every head's width is rotated: `qk_nope_head_dim` is 0, and `qk_rope_head_dim` and `v_head_dim` agree.
    `rope_halves` says that RoPE turns elements i and i + width / 2 together, otherwise 2i and 2i + 1; `rope_linear`
    divides positions. `group_score` and `router_bias` are `Router`'s; `num_nextn_predict_layers` layers behind the
    others predict tokens further on.
    """

    family: str
    gguf: str
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    yarn: Yarn | None
    num_labels: int
    dtype: str | None
    quantization: Mapping[str, Any] | None
    attention_bias: bool
    tie_word_embeddings: bool
    rope_halves: bool = False
    rope_linear: float = 1.0
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    n_group: int = 1
    topk_group: int = 1
    moe_intermediate_size: int = 0
    n_routed_experts: int = 0
    n_shared_experts: int = 0
    num_experts_per_tok: int = 0
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False
    scale_normalised: bool = False
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    group_score: Literal["max", "top2"] = "max"
    router_bias: bool = False
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    num_nextn_predict_layers: int = 0

    @property
    def is_mla(self) -> bool:
        """Whether attention is latent."""
        return self.kv_lora_rank > 0

    @property
    def is_classifier(self) -> bool:
        """Whether it gives scores of labels, and not of tokens."""
        return self.architecture.endswith(CLASSIFIER)

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cached_widths(self) -> tuple[int, int]:
        """The numbers that a layer caches of a token: of its latent and its rotated key, or of all heads' keys and
        values."""
        if self.is_mla:
            return self.kv_lora_rank, self.qk_rope_head_dim
        return self.num_key_value_heads * self.qk_head_dim, self.num_key_value_heads * self.v_head_dim

    @property
    def overflows_float16(self) -> bool:
        """Whether hidden states are known to leave float16's range (vLLM pull 13232: DeepSeek-V2's, not V3's)."""
        return self.family == "deepseek_v2"

    @property
    def trained_context(self) -> int:
        """The longest sequence of the pre-YaRN training, in tokens."""
        return self.yarn.original_max_position_embeddings if self.yarn else self.max_position_embeddings

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's FFN is routed experts (`DeepseekV2DecoderLayer.__init__`)."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0
