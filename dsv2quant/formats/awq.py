"""INT4 in AutoAWQ's layout, `version: gemm`: codes with zero points, ours all 8, and float16 scales.

    weight'[n, k] = (u − zero[g, n]) × scale[g, n]      g = k // group size; u = code + 8, zero = 8

Everything is transposed, and packed along the output: `qweight` [in, out / 8], `qzeros` [groups, out / 8], `scales`
[groups, out]. Nibble i of a word holds the column `ORDER[i]` of its eight (AutoAWQ, modules/linear/gemm.py; vLLM
0.33, auto_awq.py, and SGLang 0.5.23, moe_wna16.py, have the inverse order). The layout can be had with every method
that INT4 has, not just `awq`. Per-row scales don't exist in it: vLLM and SGLang divide by the group size for experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from dsv2quant.formats.gptq import Transposed
from dsv2quant.formats.int4 import OFFSET, PER_WORD, pack_words, unpack_words
from dsv2quant.formats.part import Part

if TYPE_CHECKING:
    import torch

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(int(i) for i in np.argsort(ORDER))
_ZEROS = np.uint32(0x88888888).view(np.int32)


class Awq(Transposed):
    """The codec of `awq-g128`, `awq-g64` and `awq-g32`."""

    family = "awq"
    quant_method = "awq"

    def layout(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, cols = shape
        groups = cols // (self.group_size or cols)
        return (
            Part("qweight", "I32", (cols, rows // PER_WORD)),
            Part("qzeros", "I32", (groups, rows // PER_WORD)),
            Part("scales", "F16", (groups, rows)),
        )

    def pack(self, codes: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
        nibbles = (codes.T + np.int8(OFFSET)).view(np.uint8)  # [in, out]
        ordered = nibbles.reshape(len(nibbles), -1, PER_WORD)[:, :, ORDER]
        words = pack_words(ordered.reshape(nibbles.shape))
        return {
            "qweight": words,
            "qzeros": np.full((scales.shape[1], words.shape[1]), _ZEROS),
            "scales": np.ascontiguousarray(scales.T.astype(np.float16)),
        }

    def decode(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype, scale_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """(u − zero) × scale in float32, rounded once to `dtype`, with zero points as stored."""
        scales = parts["scales"]
        if scale_dtype is not None:
            scales = scales.to(scale_dtype)
        codes, zeros = (unpack_words(parts[name], _INVERSE).float() for name in ("qweight", "qzeros"))
        groups = codes.unflatten(0, (len(scales), -1))  # [groups, group size, out]
        return groups.sub_(zeros[:, None]).mul_(scales.float()[:, None]).flatten(0, 1).to(dtype).T.contiguous()
