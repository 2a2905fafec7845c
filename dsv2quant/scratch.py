"""Memory that a thread keeps between jobs: touching fresh pages costs more than filling them."""

from __future__ import annotations

import threading

import numpy as np


class Scratch(threading.local):
    """One buffer per thread."""

    _buffer = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """`nbytes` bytes, valid until this thread's next call."""
        if self._buffer.nbytes < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes]
