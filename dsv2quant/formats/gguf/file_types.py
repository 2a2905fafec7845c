"""The names that `--gguf` takes: llama-quantize's mixes, and our presets. --help needs them: no heavy imports here."""

from __future__ import annotations

from typing import NamedTuple


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
    "IQ3_M": FileType(27, "IQ3_S"), "IQ3_S": FileType(26, "IQ3_S"), "IQ3_XS": FileType(22, "IQ3_S"),
    "IQ3_XXS": FileType(23, "IQ3_XXS"),
    "Q2_K": FileType(10, "Q2_K"), "Q2_K_S": FileType(21, "Q2_K"),
    "IQ2_M": FileType(29, "IQ2_S"), "IQ2_S": FileType(28, "IQ2_XS"), "IQ2_XS": FileType(20, "IQ2_XS"),
    "IQ2_XXS": FileType(19, "IQ2_XXS"), "IQ1_M": FileType(31, "IQ1_M"), "IQ1_S": FileType(24, "IQ1_S"),
    "TQ2_0": FileType(37, "TQ2_0"), "TQ1_0": FileType(36, "TQ1_0"), "MXFP4_MOE": FileType(38, "MXFP4"),
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # tools/quantize/quantize.cpp
NOT_WRITTEN = ("Q1_0", "Q2_0", "COPY")  # what else llama-quantize offers there
# Presets, and the stock mix whose bytes each spends (planning/gguf_presets.py).
PRESETS = {
    f"DSV2_{stock}": stock
    for stock in ("IQ2_XXS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_M", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M")
}
NAMES = (*FILE_TYPES, *PRESETS)  # all that can be written
