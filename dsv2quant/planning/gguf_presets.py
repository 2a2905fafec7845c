"""Mixes of our own: no more bytes than llama-quantize's, spent first on what every token passes through.

llama-quantize's mixes were made for models without latent attention. They leave attn_kv_a_mqa, which makes all that is
cached of a token, at the default type, and give routed ffn_down, a third of the model, the extra bits; where its rows
are not multiples of 256 (DeepSeek-V2-Lite) these become the wider types of 32. A preset gives every tensor the default
type, with IQ4_NL where rows don't fit, and then raises tensors in the order of `_steps` as long as the file is not
larger than the stock mix's. Any llama.cpp loads the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.spec import GgufTensor
from dsv2quant.formats.gguf import blocks
from dsv2quant.formats.gguf.file_types import FILE_TYPES, PRESETS
from dsv2quant.planning import gguf_types as types
from dsv2quant.planning.gguf_types import Choice, Overrides, quantizable
from dsv2quant.storage.gguf import padded

_LATENT = ("attn_kv_a_mqa", "attn_q_a", "attn_v_b", "attn_k_b")
_SHARED = (
    "attn_output", "attn_q", "attn_q_b", "ffn_down", "ffn_gate", "ffn_up", "ffn_down_shexp", "ffn_gate_shexp",
    "ffn_up_shexp",
)  # fmt: skip
_ROUTED = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_FALLBACKS = {"Q3_K": "IQ4_NL", "Q4_K": "IQ4_NL", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def choose(
    tensors: Sequence[GgufTensor],
    preset: str,
    config: ModelConfig,
    overrides: Overrides = Overrides(),  # noqa: B008
) -> list[Choice]:
    """(type, reason) of every tensor, as `types.choose` gives them; `overrides` are not counted in the file's size."""
    stock, raised = PRESETS[preset]
    default = FILE_TYPES[stock].default
    chosen = {tensor.name: _fit(tensor, "Q6_K" if tensor.role == "lm_head" else default) for tensor in tensors}
    room = sum(map(_nbytes, tensors, types.choose(tensors, stock, config)))
    room -= sum(_nbytes(tensor, chosen[tensor.name]) for tensor in tensors)
    for members, wished in _steps(tensors, raised):
        extra = sum(_nbytes(tensor, _fit(tensor, wished)) - _nbytes(tensor, chosen[tensor.name]) for tensor in members)
        if extra <= room:
            room -= extra
            chosen |= {tensor.name: _fit(tensor, wished) for tensor in members}
    tied = types.is_tied(tensors)
    return [(quantizable(t) and overrides.of(t, tied=tied)) or chosen[t.name] for t in tensors]


def _steps(tensors: Sequence[GgufTensor], raised: str) -> Iterator[tuple[list[GgufTensor], str]]:
    """What to raise, and to what, in order: the latents' projections, then all else that is not routed, kind by kind;
    then routed experts, layer by layer."""
    kinds: dict[str, list[GgufTensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.kind, []).append(tensor)
    for kind in _LATENT:
        yield kinds.get(kind, []), "Q8_0"
    for wished, last in ((raised, ("token_embd",)), ("Q8_0", ("output", "token_embd"))):
        for kind in (*_SHARED, *last):
            yield kinds.get(kind, []), wished
    for kind in _ROUTED:
        for tensor in kinds.get(kind, []):
            yield [tensor], raised


def _fit(tensor: GgufTensor, wished: str) -> Choice:
    return types.fall_back(tensor, wished, _FALLBACKS) if quantizable(tensor) else ("F32", None)


def _nbytes(tensor: GgufTensor, choice: Choice) -> int:
    return padded(blocks.nbytes(choice[0], tensor.shape))
