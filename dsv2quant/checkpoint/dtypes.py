"""Names of dtypes: safetensors' and torch's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

    from dsv2quant.storage.safetensors import Part

_TORCH = {
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "I8": "int8", "I32": "int32", "I64": "int64",
}  # fmt: skip


def torch_dtype(dtype: str) -> torch.dtype:
    """Safetensors' name of a dtype ('BF16') → torch's."""
    import torch

    found: torch.dtype = getattr(torch, _TORCH[dtype])
    return found


def tensors_of(
    layout: Iterable[Part], arrays: Mapping[str, np.ndarray], device: torch.device | str
) -> dict[str, torch.Tensor]:
    """What is stored of a weight, by suffix, as tensors of the dtypes that its layout says."""
    import torch

    return {
        part.suffix: torch.from_numpy(arrays[part.suffix]).view(torch_dtype(part.dtype)).to(device) for part in layout
    }
