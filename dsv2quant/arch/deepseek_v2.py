"""Tensor name ⇄ (layer, role, expert): the complete list of tensors that a configuration implies.

Names are those of the published checkpoints (`model.layers.N.mlp.experts.E.gate_proj.weight`); transformers 5 fuses
experts in memory only and saves the same names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsv2quant.arch.config import SEQUENCE_CLASSIFICATION, ModelConfig

ATTENTION_ROLES = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
FFN_ROLES = tuple(f"{ffn}.{p}" for ffn in ("dense", "shared", "routed") for p in ("gate_proj", "up_proj", "down_proj"))
LINEAR_ROLES = ATTENTION_ROLES + FFN_ROLES
OTHER_ROLES = ("embed", "lm_head", "score", "router", "norm", "bias")
ROLES = LINEAR_ROLES + OTHER_ROLES


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the unquantized model. `layer` and `expert` are None where there is none."""

    name: str
    role: str
    shape: tuple[int, ...]
    layer: int | None = None
    expert: int | None = None

    @property
    def module(self) -> str:
        """The module that holds the tensor: the name without `.weight` or `.bias`."""
        return self.name.rpartition(".")[0]

    @property
    def size(self) -> int:
        """Number of elements."""
        n = 1
        for dim in self.shape:
            n *= dim
        return n


def model_specs(config: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the model in reading order: embedding, layers, final norm, head."""
    specs = [TensorSpec("model.embed_tokens.weight", "embed", (config.vocab_size, config.hidden_size))]
    for layer in range(config.num_hidden_layers):
        specs += layer_specs(config, layer)
    specs.append(TensorSpec("model.norm.weight", "norm", (config.hidden_size,)))
    if config.architecture == SEQUENCE_CLASSIFICATION:
        specs.append(TensorSpec("score.weight", "score", (config.num_labels, config.hidden_size)))
    elif not config.tie_word_embeddings:
        specs.append(TensorSpec("lm_head.weight", "lm_head", (config.vocab_size, config.hidden_size)))
    return specs


def layer_specs(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """The tensors of one decoder layer, attention first. Weights are [out_features, in_features]."""
    return [*_attention(config, layer), *_ffn(config, layer)]


def _attention(c: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    at = f"model.layers.{layer}.self_attn"
    heads = c.num_attention_heads

    def norm(name: str, size: int) -> TensorSpec:
        return TensorSpec(f"{name}.weight", "norm", (size,), layer)

    def linear(role: str, rows: int, cols: int, bias: bool = False) -> Iterator[TensorSpec]:
        yield TensorSpec(f"{at}.{role}.weight", role, (rows, cols), layer)
        if bias:
            yield TensorSpec(f"{at}.{role}.bias", "bias", (rows,), layer)

    yield norm(f"model.layers.{layer}.input_layernorm", c.hidden_size)
    if c.q_lora_rank is None:
        yield from linear("q_proj", heads * c.qk_head_dim, c.hidden_size)
    else:
        yield from linear("q_a_proj", c.q_lora_rank, c.hidden_size, c.attention_bias)
        yield norm(f"{at}.q_a_layernorm", c.q_lora_rank)
        yield from linear("q_b_proj", heads * c.qk_head_dim, c.q_lora_rank)
    yield from linear("kv_a_proj_with_mqa", c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size, c.attention_bias)
    yield norm(f"{at}.kv_a_layernorm", c.kv_lora_rank)
    yield from linear("kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
    yield from linear("o_proj", c.hidden_size, heads * c.v_head_dim, c.attention_bias)
    yield norm(f"model.layers.{layer}.post_attention_layernorm", c.hidden_size)


def _ffn(c: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    at = f"model.layers.{layer}.mlp"

    def mlp(ffn: str, prefix: str, width: int, expert: int | None = None) -> Iterator[TensorSpec]:
        for name in ("gate_proj", "up_proj"):
            yield TensorSpec(f"{prefix}.{name}.weight", f"{ffn}.{name}", (width, c.hidden_size), layer, expert)
        yield TensorSpec(f"{prefix}.down_proj.weight", f"{ffn}.down_proj", (c.hidden_size, width), layer, expert)

    if not c.is_moe(layer):
        yield from mlp("dense", at, c.intermediate_size)
        return
    yield TensorSpec(f"{at}.gate.weight", "router", (c.n_routed_experts, c.hidden_size), layer)
    for expert in range(c.n_routed_experts):
        yield from mlp("routed", f"{at}.experts.{expert}", c.moe_intermediate_size, expert)
    if c.n_shared_experts:
        yield from mlp("shared", f"{at}.shared_experts", c.n_shared_experts * c.moe_intermediate_size)
