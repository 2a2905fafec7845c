"""Mixes of our own: no more bytes than llama-quantize's, spent first on what every token passes through.

llama-quantize's mixes were made for models without latent attention. They leave attn_kv_a_mqa, which makes all that is
cached of a token, at the default type, and give routed ffn_down, a third of the model, the extra bits; where its rows
are not multiples of 256 (DeepSeek-V2-Lite) these become the wider types of 32. A preset gives every tensor the default
type, with IQ4_NL where rows don't fit, and then raises kinds of tensors in the order below as long as the file is not
larger than the stock mix's. Any llama.cpp loads the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsv2quant.config import ModelConfig
from dsv2quant.formats.gguf import blocks, types
from dsv2quant.formats.gguf.container import padded
from dsv2quant.formats.gguf.tensors import Tensor
from dsv2quant.formats.gguf.types import Choice, Overrides, quantizable

# The stock mix whose bytes are spent, and the type between its default and Q8_0 that many tensors are raised to.
PRESETS = {
    "DSV2_Q3_K_M": ("Q3_K_M", "Q4_K"), "DSV2_Q4_K_S": ("Q4_K_S", "Q5_K"), "DSV2_Q4_K_M": ("Q4_K_M", "Q5_K"),
    "DSV2_Q5_K_M": ("Q5_K_M", "Q6_K"),
}  # fmt: skip
_LATENT = ("attn_kv_a_mqa", "attn_q_a", "attn_v_b", "attn_k_b")
_SHARED = (
    "attn_output", "attn_q", "attn_q_b", "ffn_down", "ffn_gate", "ffn_up", "ffn_down_shexp", "ffn_gate_shexp",
    "ffn_up_shexp",
)  # fmt: skip
_FALLBACKS = {"Q3_K": "IQ4_NL", "Q4_K": "IQ4_NL", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def choose(
    tensors: Sequence[Tensor],
    preset: str,
    config: ModelConfig,
    overrides: Overrides = Overrides(),  # noqa: B008
) -> list[Choice]:
    """(type, reason) of every tensor, as `types.choose` gives them; `overrides` are not counted in the file's size."""
    stock, raised = PRESETS[preset]
    default = types.FILE_TYPES[stock].default
    stock_choices = types.choose(tensors, stock, config)
    limit = sum(map(_nbytes, tensors, (kind for kind, _ in stock_choices)))
    wishes = {tensor.kind: "Q6_K" if tensor.kind == "output" else default for tensor in tensors}
    steps = [(kind, "Q8_0") for kind in _LATENT]
    steps += [(kind, raised) for kind in (*_SHARED, "token_embd")]
    steps += [(kind, "Q8_0") for kind in (*_SHARED, "output", "token_embd")]
    for kind, wished in steps:
        trial = wishes | {kind: wished}
        if sum(_nbytes(t, c) for t, (c, _) in zip(tensors, _fit(tensors, trial), strict=True)) <= limit:
            wishes = trial
    return [overrides.of(t) or c if quantizable(t) else c for t, c in zip(tensors, _fit(tensors, wishes), strict=True)]


def _fit(tensors: Sequence[Tensor], wishes: Mapping[str, str]) -> list[Choice]:
    return [
        types.fall_back(tensor, wishes[tensor.kind], _FALLBACKS) if quantizable(tensor) else ("F32", None)
        for tensor in tensors
    ]


def _nbytes(tensor: Tensor, kind: str) -> int:
    return padded(blocks.nbytes(kind, tensor.shape))
