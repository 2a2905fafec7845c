"""Matrices for the GGUF block types, the same on every machine: bits of PCG64 and exact float32 arithmetic only."""

from __future__ import annotations

import zlib

import numpy as np


def bell(shape: tuple[int, int], seed: int) -> np.ndarray:
    """float32 in (−1, 1), bell-shaped: sums of four 16-bit integers, exact."""
    raw = np.random.PCG64(seed).random_raw(shape[0] * shape[1])
    total = sum(((raw >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64) for i in range(4))
    return ((total - 131070).astype(np.float32) * np.float32(2.0**-17)).reshape(shape)


def matrices() -> dict[str, np.ndarray]:
    x = bell((3, 512), 3)
    coarse = np.rint(x * np.float32(8)) * np.float32(0.125)  # ties, equal magnitudes of both signs
    outlier = x.copy()
    outlier[:, ::97] *= np.float32(4096)
    sizes = np.exp2(np.arange(96, dtype=np.float32) % 31 - 24).reshape(3, 32)
    sparse = np.where(np.abs(x) > 0.5, x, np.float32(-0.0))
    return {
        "bell": bell((5, 768), 0),
        "more than a batch": bell((67, 256), 1),
        "rows of three blocks": bell((30, 768), 2),
        "coarse": coarse,
        "heavy tail": x * x * x * x * x,
        "outlier": outlier,
        "sizes": x * sizes.repeat(16, 1),
        "tiny": x * np.float32(2.0**-55),
        "subnormal": x * np.float32(2.0**-131),
        "large": x * np.float32(2.0**14),
        "zeros": np.zeros((2, 512), np.float32),
        "minus zeros": np.full((2, 512), -0.0, np.float32),
        "constant": x[:, ::32].repeat(32, 1),
        "nearly constant": np.float32(1) + x * np.float32(2.0**-18),
        "negative": -np.abs(x),
        "positive": np.abs(x) + np.float32(0.25),
        "signs": np.sign(x) * np.float32(0.03125),
        "sparse": sparse,
    }


def extreme_matrices() -> dict[str, np.ndarray]:
    """The same, and scales beyond float16's range or far below it."""
    found = matrices()
    return found | {"huge": found["bell"] * np.float32(1e8), "minute": found["bell"] * np.float32(1e-30)}


def importances(cols: int) -> list[np.ndarray | None]:
    """None; positive of many sizes; half of them zero."""
    u = np.abs(bell((2, cols), 4))
    return [None, u[0] * u[0] * u[0] + np.float32(2.0**-20), np.where(u[1] > 0.25, u[0], np.float32(0))]


def digest(data: np.ndarray) -> str:
    return f"{zlib.crc32(data.tobytes()):08x}"
