"""llama-quantize's mixes: the type of a tensor by its role and layer (src/llama-quant.cpp: llama_tensor_get_type_impl).

What is there for other architectures is left out. The order of the rules is llama.cpp's.
"""

from __future__ import annotations

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.spec import GgufTensor
from dsv2quant.formats.gguf.file_types import FILE_TYPES
from dsv2quant.storage.gguf import SIZES

PLAIN = ("F32", "F16", "BF16")
# Mixes of 2 bits and less have rules of their own. What two of them raise a tensor to is IQ3_S, the others Q2_K.
_TWO_BITS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")
_TWO_AND_A_HALF = ("IQ2_S", "IQ2_M")
_ONE_BIT = ("IQ1_S", "IQ1_M")
_TERNARY = ("TQ1_0", "TQ2_0")
_RAISED_OUTPUT = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}  # o_proj
# The same in a model of 8 experts, whose attention is taken for a Mixtral's.
_RAISED_OF_8 = (
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS",
)  # fmt: skip
_LOWERED = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}  # q_proj and k_proj


def category(tensor: GgufTensor) -> str:
    """What its rules go by, and what llama-quantize counts: the role, of an FFN's matrices alike wherever they are
    (tensor_get_category)."""
    return tensor.role.rpartition(".")[2]


class Mix:
    """The standard logic of a file type for one model."""

    def __init__(self, file_type: str, config: ModelConfig, has_imatrix: bool, tied: bool) -> None:
        self.name, self.default = file_type, FILE_TYPES[file_type].default
        self.layers, self.experts = config.num_hidden_layers, config.n_routed_experts
        self.queries_per_key = config.num_attention_heads // config.num_key_value_heads
        self.has_imatrix, self.tied = has_imatrix, tied

    def type_of(self, tensor: GgufTensor, number: int) -> str:
        """`number` counts the tensors of its category that came before."""
        role = category(tensor)
        if self.default in PLAIN:
            return self.default
        if role == "lm_head" or (role == "embed" and self.tied):
            return self._output(tensor.shape[-1])
        if self.name == "MXFP4_MOE":
            return "MXFP4" if tensor.matrices > 1 else "Q8_0"
        if role == "embed":
            return self._embedding()
        if self.name in _TWO_BITS:
            return self._of_two_bits(role, number)
        layer = tensor.layer if self.experts > 1 else number
        match role:
            case "down_proj":
                assert layer is not None
                return self._down(layer)
            case "gate_proj" | "up_proj" if self.name == "IQ3_XS":
                assert layer is not None
                return "IQ3_XXS" if self.layers // 8 <= layer < 7 * self.layers // 8 else self.default
            case "v_proj":
                return "Q8_0" if self.experts == 8 else self._values(number)
            case "k_proj" if self.experts == 8:
                return "Q8_0"
            case "q_proj" | "k_proj":
                return _LOWERED.get(self.name, self.default)
            case "o_proj" if self.experts == 8:
                return "Q5_K" if self.name in _RAISED_OF_8 else self.default
            case "o_proj":
                return _RAISED_OUTPUT.get(self.name, self.default)
        return self.default

    def _output(self, columns: int) -> str:
        if self.name in ("Q8_0", "MXFP4_MOE") or columns % SIZES[self.default].values:
            return "Q8_0"
        return "Q5_K" if self.name in (*_TWO_BITS, "IQ3_XXS") else "Q6_K"

    def _embedding(self) -> str:
        if self.name in (*_TWO_AND_A_HALF, "IQ3_XXS"):
            return "IQ3_S"
        if self.name in _TERNARY:
            return "Q4_K"
        return "Q2_K" if self.name in _TWO_BITS else self.default

    def _of_two_bits(self, role: str, number: int) -> str:
        raised = "IQ3_S" if self.name in _TWO_AND_A_HALF else "Q2_K"
        match role:
            case "v_proj":
                return "Q4_K" if self.queries_per_key >= 4 or self.experts >= 4 else raised
            case "k_proj" if self.experts == 8:
                return "Q4_K"
            case "down_proj" if number < self.layers // 8:  # of all FFNs in the file's order, not by layer
                return raised
            case "o_proj" if self.experts == 8:
                return "Q5_K"
            case "o_proj" if self.name in _ONE_BIT:
                return "IQ2_XXS"
            case "o_proj" if self.name in _TWO_AND_A_HALF:
                return "IQ3_S"
        return self.default

    def _values(self, layer: int) -> str:
        is_small = self.queries_per_key >= 4
        found = self.default
        match self.name:
            case "Q2_K":
                found = "Q4_K" if is_small else "Q3_K"
            case "Q2_K_S" | "IQ3_XS" | "IQ3_S" if is_small:
                found = "Q4_K"
            case "IQ3_XXS":
                found = "Q4_K" if is_small else "IQ3_XXS" if self.has_imatrix else "IQ3_S"
            case "IQ3_M":
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
            case "IQ3_XXS" if not self.has_imatrix:
                return "Q4_K" if eighth else "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if layer < self.layers // 16 else "Q4_K"
            case "IQ3_M" if eighth or (self.experts == 8 and self._more_bits(layer)):
                return "Q4_K"
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
