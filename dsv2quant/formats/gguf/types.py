"""Which type each tensor gets: llama-quantize's choice (src/llama-quant.cpp: llama_tensor_get_type and _impl).

What is there for other architectures or for models without experts is left out. The order of the rules is llama.cpp's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from dsv2quant.config import ModelConfig
from dsv2quant.formats.gguf.tensors import Tensor


class FileType(NamedTuple):
    """A mix: its number in `general.file_type` (enum llama_ftype), and the type that most tensors get."""

    number: int
    default: str


FILE_TYPES = {
    "F32": FileType(0, "F32"), "F16": FileType(1, "F16"), "BF16": FileType(32, "BF16"),
    "Q8_0": FileType(7, "Q8_0"), "Q6_K": FileType(18, "Q6_K"),
    "Q5_K_M": FileType(17, "Q5_K"), "Q5_K_S": FileType(16, "Q5_K"),
    "Q5_1": FileType(9, "Q5_1"), "Q5_0": FileType(8, "Q5_0"),
    "Q4_K_M": FileType(15, "Q4_K"), "Q4_K_S": FileType(14, "Q4_K"),
    "Q4_1": FileType(3, "Q4_1"), "Q4_0": FileType(2, "Q4_0"),
    "IQ4_NL": FileType(25, "IQ4_NL"), "IQ4_XS": FileType(30, "IQ4_XS"),
    "Q3_K_L": FileType(13, "Q3_K"), "Q3_K_M": FileType(12, "Q3_K"), "Q3_K_S": FileType(11, "Q3_K"),
    "Q2_K": FileType(10, "Q2_K"),
    "IQ3_M": FileType(27, "IQ3_S"), "IQ3_S": FileType(26, "IQ3_S"), "MXFP4_MOE": FileType(38, "MXFP4"),
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # tools/quantize/quantize.cpp
_PLAIN = ("F32", "F16", "BF16")
# The type of blocks of 32 that stands in where a row is not whole blocks of 256 (tensor_type_fallback).
_FALLBACKS = {
    "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}  # fmt: skip
_RAISED_OUTPUT = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}  # attn_output
# The same in a model of 8 experts, whose attention is taken for a Mixtral's.
_RAISED_OF_8 = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS")
Choice = tuple[str, str | None]


@dataclass(frozen=True)
class Overrides:
    """Types that the user asks for, as llama-quantize takes them.

    `tensor_types` are (regular expression, type): the first that is found in a tensor's name decides, before the
    fallback of widths. `output_type` and `token_embedding_type` decide for those two, and have no fallback.
    """

    tensor_types: Sequence[tuple[str, str]] = ()
    output_type: str | None = None
    token_embedding_type: str | None = None

    def of(self, tensor: Tensor) -> Choice | None:
        """The type asked for, if any."""
        chosen = {"token_embd": self.token_embedding_type, "output": self.output_type}.get(tensor.kind)
        if chosen is not None:
            return chosen, None
        patterns = (kind for pattern, kind in self.tensor_types if re.search(pattern.lower(), tensor.name))
        found = next(patterns, None)
        return None if found is None else fall_back(tensor, found)


def choose(
    tensors: Sequence[Tensor],
    file_type: str,
    config: ModelConfig,
    *,
    has_imatrix: bool = False,
    overrides: Overrides = Overrides(),
) -> list[Choice]:
    """(type, reason) of every tensor; the reason says why a type is not the one wished for."""
    mix = _Mix(file_type, config, has_imatrix, tied=all(tensor.kind != "output" for tensor in tensors))
    if mix.default in _PLAIN:
        overrides = replace(overrides, tensor_types=())
    return [
        (overrides.of(tensor) or fall_back(tensor, mix.type_of(tensor))) if quantizable(tensor) else ("F32", None)
        for tensor in tensors
    ]


def quantizable(tensor: Tensor) -> bool:
    """Whether llama-quantize touches it; norms, biases and routers stay F32 (tensor_allows_quantization)."""
    return len(tensor.shape) > 1 and tensor.kind != "ffn_gate_inp"


def fall_back(tensor: Tensor, wished: str, fallbacks: Mapping[str, str] = _FALLBACKS) -> Choice:
    """The type that the tensor's rows fit (tensor_type_fallback)."""
    columns = tensor.shape[-1]
    if columns % _block(wished) == 0:
        return wished, None
    instead = fallbacks.get(wished, wished)
    if columns % _block(instead):
        instead = "F16"
    return instead, f"rows of {columns} are not whole blocks of {_block(wished)}, as {wished} has"


def _block(name: str) -> int:
    return GGML_QUANT_SIZES[GGMLQuantizationType[name]][0]


class _Mix:
    """The standard logic of a file type (llama_tensor_get_type_impl)."""

    def __init__(self, file_type: str, config: ModelConfig, has_imatrix: bool, tied: bool) -> None:
        self.name, self.default = file_type, FILE_TYPES[file_type].default
        self.layers, self.experts = config.num_hidden_layers, config.n_routed_experts
        self.has_imatrix, self.tied = has_imatrix, tied

    def type_of(self, tensor: Tensor) -> str:
        kind = tensor.kind
        if self.default in _PLAIN:
            return self.default
        if kind == "output" or (kind == "token_embd" and self.tied):
            return self._output(tensor.shape[-1])
        if self.name == "MXFP4_MOE":
            return "MXFP4" if tensor.matrices > 1 else "Q8_0"  # attn_k_b and attn_v_b included
        if kind.startswith("ffn_down"):
            assert tensor.layer is not None
            return self._down(tensor.layer)
        if kind == "attn_output":
            if self.experts == 8:
                return "Q5_K" if self.name in _RAISED_OF_8 else self.default
            return _RAISED_OUTPUT.get(self.name, self.default)
        return self.default

    def _output(self, columns: int) -> str:
        if self.name in ("MXFP4_MOE", "Q8_0") or columns % _block(self.default):
            return "Q8_0"
        return "Q6_K"

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
            case "IQ3_M" if eighth or (self.experts == 8 and self._more_bits(layer)):
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
