"""Llama's architecture: DeepSeek-LLM, DeepSeek-Coder (V1) and the language models of DeepSeek-VL.

Plain attention, with as many heads of keys and values as of queries or fewer, and dense FFNs. Keys and defaults are
those of transformers' `LlamaConfig`.
"""

from __future__ import annotations

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.reading import Reader, common, plain_heads, rope

FAMILY = "llama"
CAUSAL_LM = "LlamaForCausalLM"
SEQUENCE_CLASSIFICATION = "LlamaForSequenceClassification"
MODEL_TYPES = ("llama",)
_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
}  # fmt: skip


def read(raw: Reader, architecture: str) -> ModelConfig:
    """The configuration. Raises InputError for a value of the wrong type or range, and for what is not supported."""
    fields = common(raw, _DEFAULTS) | rope(raw, ("linear",))
    fields |= plain_heads(raw, fields["hidden_size"], fields["num_attention_heads"])
    return ModelConfig(family=FAMILY, gguf="llama", architecture=architecture, **fields)
