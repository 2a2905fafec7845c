"""Symmetric integers of a few bits: their codes, and the scales that a search tries."""

from __future__ import annotations

import numpy as np

# Candidate scales in units of amax over the largest code. The first stays where no error tells candidates apart. Of few
# bits the code that has no counterpart counts: which side it is on is the scale's sign.
FACTORS = np.roll(np.linspace(0.45, 1.05, 61), 6).astype(np.float32)
_HALVES = {3: np.linspace(0.4, 1.02, 32), 2: np.linspace(0.2, 0.82, 32)}
_FEW = {bits: np.concatenate([half, -half]).astype(np.float32) for bits, half in _HALVES.items()}


def levels(bits: int) -> tuple[int, int]:
    """The least and the largest code of so many bits: −8 and 7 of 4."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def factors(bits: int) -> np.ndarray:
    """Candidate scales for codes of 4, 3 or 2 bits, float32, in units of amax over the largest code."""
    return _FEW.get(bits, FACTORS)
