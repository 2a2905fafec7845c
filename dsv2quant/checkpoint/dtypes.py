"""Names of dtypes: safetensors' and torch's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_TORCH = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "I8": "int8", "I32": "int32", "I64": "int64",
}  # fmt: skip


def torch_dtype(dtype: str) -> torch.dtype:
    """Safetensors' name of a dtype ('BF16') → torch's."""
    import torch

    found: torch.dtype = getattr(torch, _TORCH[dtype])
    return found
