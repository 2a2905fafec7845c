"""Which type each tensor gets: llama-quantize's choice (src/llama-quant.cpp: llama_tensor_get_type and _impl).

What is there for other architectures is left out. The order of the rules is llama.cpp's.

And presets, mixes of our own: no more bytes than llama-quantize's, spent first on what every token passes through.
Its mixes were made for models without latent attention. They leave attn_kv_a_mqa, which makes all that is cached of a
token, at the default type, and give routed ffn_down, a third of the model, the extra bits; where its rows are not
multiples of 256 (DeepSeek-V2-Lite) these become the wider types of 32. A preset gives every tensor the default type,
with IQ4_NL where rows don't fit, and then raises tensors in the order of `_steps` as long as the file is not larger
than the stock mix's. Any llama.cpp loads the result.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.spec import GgufTensor
from dsv2quant.errors import UsageError
from dsv2quant.formats.gguf import blocks
from dsv2quant.formats.gguf.file_types import FILE_TYPES, PRESETS
from dsv2quant.storage.gguf import SIZES, padded

PLAIN = ("F32", "F16", "BF16")
# The type of blocks of 32 that stands in where a row is not whole blocks of 256 (tensor_type_fallback).
_FALLBACKS = {
    "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
_RAISED_OUTPUT = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}  # o_proj
# The same in a model of 8 experts, whose attention is taken for a Mixtral's.
_RAISED_OF_8 = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ4_XS")
Choice = tuple[str, str | None]


@dataclass(frozen=True)
class Overrides:
    """Types that the user asks for, as llama-quantize takes them.

    `tensor_types` are (regular expression, type): the first that is found in a tensor's name decides, before the
    fallback of widths. `output_type` and `token_embedding_type` decide for those two, and have no fallback. Where the
    embedding is the output, too, `output_type` is the embedding's, after all others and with the fallback.
    """

    tensor_types: Sequence[tuple[str, str]] = ()
    output_type: str | None = None
    token_embedding_type: str | None = None

    def pattern(self, tensor: GgufTensor) -> int | None:
        """Which of `tensor_types` decides, if any."""
        if self._fixed(tensor) is not None:
            return None
        found = (i for i, (pattern, _) in enumerate(self.tensor_types) if re.search(pattern.lower(), tensor.name))
        return next(found, None)

    def of(self, tensor: GgufTensor, *, tied: bool) -> Choice | None:
        """The type asked for, if any; `tied` says that the embedding is the output."""
        fixed, at = self._fixed(tensor), self.pattern(tensor)
        if fixed is not None:
            return fixed, None
        if at is not None:
            return fall_back(tensor, self.tensor_types[at][1])
        if tied and tensor.role == "embed" and self.output_type is not None:
            return fall_back(tensor, self.output_type)
        return None

    def _fixed(self, tensor: GgufTensor) -> str | None:
        return {"embed": self.token_embedding_type, "lm_head": self.output_type}.get(tensor.role)


def choose(
    tensors: Sequence[GgufTensor],
    file_type: str,
    config: ModelConfig,
    *,
    has_imatrix: bool = False,
    overrides: Overrides = Overrides(),
) -> list[Choice]:
    """(type, reason) of every tensor; the reason says why a type is not the one wished for."""
    tied = is_tied(tensors)
    mix = _Mix(file_type, config, has_imatrix, tied)
    decided: Counter[str] = Counter()  # by role: an override leaves a tensor out of llama-quantize's count
    choices: list[Choice] = []
    for tensor in tensors:
        choice = overrides.of(tensor, tied=tied) if quantizable(tensor) else ("F32", None)
        if choice is None:
            choice = fall_back(tensor, mix.type_of(tensor, decided[tensor.role]))
            decided[tensor.role] += 1
        choices.append(choice)
    return choices


def is_tied(tensors: Sequence[GgufTensor]) -> bool:
    """Whether the embedding is the output, too."""
    return all(tensor.role != "lm_head" for tensor in tensors)


def quantizable(tensor: GgufTensor) -> bool:
    """Whether llama-quantize touches it; norms, biases and routers stay F32 (tensor_allows_quantization)."""
    return len(tensor.shape) > 1 and tensor.role != "router"


def fall_back(tensor: GgufTensor, wished: str, fallbacks: Mapping[str, str] = _FALLBACKS) -> Choice:
    """The type that the tensor's rows fit (tensor_type_fallback)."""
    columns = tensor.shape[-1]
    if columns % _block(wished) == 0:
        return wished, None
    instead = fallbacks.get(wished, wished)
    if columns % _block(instead):
        instead = "F16"
    return instead, f"rows of {columns} are not whole blocks of {_block(wished)}, as {wished} has"


def _block(name: str) -> int:
    return SIZES[name].values


class _Mix:
    """The standard logic of a file type (llama_tensor_get_type_impl)."""

    def __init__(self, file_type: str, config: ModelConfig, has_imatrix: bool, tied: bool) -> None:
        self.name, self.default = file_type, FILE_TYPES[file_type].default
        self.layers, self.experts = config.num_hidden_layers, config.n_routed_experts
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads
        self.has_imatrix, self.tied = has_imatrix, tied

    def type_of(self, tensor: GgufTensor, number: int) -> str:
        """`number` counts the tensors of its role that came before."""
        role = tensor.role
        if self.default in PLAIN:
            return self.default
        if role == "lm_head" or (role == "embed" and self.tied):
            return self._output(tensor.shape[-1])
        if role.endswith("down_proj"):
            assert tensor.layer is not None
            return self._down(tensor.layer if self.experts > 1 else number)
        if role == "v_proj":
            return "Q8_0" if self.experts == 8 else self._values(number)
        if role == "k_proj" and self.experts == 8:
            return "Q8_0"
        if role == "o_proj":
            if self.experts == 8:
                return "Q5_K" if self.name in _RAISED_OF_8 else self.default
            return _RAISED_OUTPUT.get(self.name, self.default)
        return self.default

    def _output(self, columns: int) -> str:
        if self.name == "Q8_0" or columns % _block(self.default):
            return "Q8_0"
        return "Q6_K"

    def _values(self, layer: int) -> str:
        is_small = self.queries_per_key >= 4
        found = self.default
        match self.name:
            case "Q2_K":
                found = "Q4_K" if is_small else "Q3_K"
            case "Q2_K_S" if is_small:
                found = "Q4_K"
            case "Q3_K_M":
                found = "Q5_K" if layer < 2 else "Q4_K"
            case "Q3_K_L":
                found = "Q5_K"
            case "IQ4_NL" | "IQ4_XS" if is_small:
                found = "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if self._more_bits(layer):
                found = "Q6_K"
            case "Q4_K_S" if layer < 4:
                found = "Q5_K"
        is_70b = self.layers == 80 and self.queries_per_key > 1 and not self.experts  # Llama 2's, by its depth
        return "Q5_K" if is_70b and found in ("Q3_K", "Q4_K") else found

    def _down(self, layer: int) -> str:
        eighth = layer < self.layers // 8
        match self.name:
            case "Q2_K":
                return "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if layer < self.layers // 16 else "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if self._more_bits(layer):
                return "Q6_K"
            case "Q4_K_S" if eighth:
                return "Q5_K"
            case "Q2_K_S" if eighth:
                return "Q4_K"
            case "IQ4_NL" | "IQ4_XS" if eighth and not self.has_imatrix:
                return "Q5_K"
            case "Q4_0" | "Q5_0" if eighth and self.has_imatrix:
                return f"Q{self.name[1]}_1"
        return self.default

    def _more_bits(self, layer: int) -> bool:
        """The first and last eighth of the layers, and every third between."""
        n = self.layers
        return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


# Of presets: kinds of tensors in the order in which they are raised.
_LATENT = ("attn_kv_a_mqa", "attn_q_a", "attn_v_b", "attn_k_b")
_SHARED = (
    "attn_output", "attn_q", "attn_q_b", "ffn_down", "ffn_gate", "ffn_up", "ffn_down_shexp", "ffn_gate_shexp",
    "ffn_up_shexp",
)  # fmt: skip
_ROUTED = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_PRESET_FALLBACKS = {"Q3_K": "IQ4_NL", "Q4_K": "IQ4_NL", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def choose_preset(
    tensors: Sequence[GgufTensor], preset: str, config: ModelConfig, overrides: Overrides
) -> list[Choice]:
    """The same of a preset; `overrides` are not counted in the file's size.

    Raises UsageError for a model without latent attention or experts, for which presets are not made.
    """
    stock, raised = PRESETS[preset]
    if not config.is_mla or not config.n_routed_experts:
        what = f"{preset} is a mix for latent attention and routed experts, and the model lacks one of them"
        raise UsageError(what, fix=f"give {stock}")
    default = FILE_TYPES[stock].default
    chosen = {tensor.name: _fit(tensor, "Q6_K" if tensor.role == "lm_head" else default) for tensor in tensors}
    room = sum(map(_nbytes, tensors, choose(tensors, stock, config)))
    room -= sum(_nbytes(tensor, chosen[tensor.name]) for tensor in tensors)
    for members, wished in _steps(tensors, raised):
        extra = sum(_nbytes(tensor, _fit(tensor, wished)) - _nbytes(tensor, chosen[tensor.name]) for tensor in members)
        if extra <= room:
            room -= extra
            chosen |= {tensor.name: _fit(tensor, wished) for tensor in members}
    tied = is_tied(tensors)
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
    return fall_back(tensor, wished, _PRESET_FALLBACKS) if quantizable(tensor) else ("F32", None)


def _nbytes(tensor: GgufTensor, choice: Choice) -> int:
    return padded(blocks.nbytes(choice[0], tensor.shape))
