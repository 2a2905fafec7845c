"""The order of a head's rows in matrices that make what RoPE turns: llama.cpp turns neighbours, Llama row i and row
i + half. Source: llama.cpp conversion/llama.py (LlamaModel.permute)."""

from __future__ import annotations

import numpy as np


def as_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads · width, …] in the model's order → in a GGUF file's."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def as_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """The other way round."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
