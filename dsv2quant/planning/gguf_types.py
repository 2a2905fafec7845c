"""Which type each tensor gets: llama-quantize's choice (src/llama-quant.cpp: llama_tensor_get_type; gguf_mixes.py)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.spec import GgufTensor
from dsv2quant.planning.gguf_mixes import Mix, category
from dsv2quant.storage.gguf import SIZES

# The type of blocks of 32 that stands in where a row is not whole blocks of 256 (tensor_type_fallback).
_FALLBACKS = {
    "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
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
    mix = Mix(file_type, config, has_imatrix, tied)
    decided: Counter[str] = Counter()  # by category: an override leaves a tensor out of llama-quantize's count
    choices: list[Choice] = []
    for tensor in tensors:
        choice = overrides.of(tensor, tied=tied) if quantizable(tensor) else ("F32", None)
        if choice is None:
            choice = fall_back(tensor, mix.type_of(tensor, decided[category(tensor)]))
            decided[category(tensor)] += 1
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
