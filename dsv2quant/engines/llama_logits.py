"""The file that `llama-perplexity --kl-divergence-base` writes: token ids, and the whole distribution of every position
that is scored, in 16 bits a token.

llama.cpp 0c1e57098, tools/perplexity/perplexity.cpp (`perplexity`, `process_logits`, `log_softmax`), little-endian:
"_logits_", then int32 n_ctx, n_vocab, n_chunk and the ids [n_chunk, n_ctx]; then of each chunk, of each position i from
n_ctx / 2 to n_ctx − 2, float32 scale and minimum, and a uint16 code for each token, one more where their number is odd.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv2quant.errors import InputError

MAGIC = b"_logits_"
AGAIN = "the program that writes it was stopped, or the disk is full: run it again"
HEAD = 4  # uint16 before the codes: the two float32


@dataclass(frozen=True)
class LogitsFile:
    """`ids`, int64 [windows, ctx], are the text's: where llama.cpp puts BOS, it is not in them. Position i of a window
    predicts i + 1 for i from `first` to ctx − 2."""

    path: Path
    ids: np.ndarray
    vocabulary: int

    @property
    def first(self) -> int:
        return int(self.ids.shape[1]) // 2

    @property
    def scored(self) -> int:
        return int(self.ids.shape[1]) - 1 - self.first

    def window(self, index: int) -> tuple[np.ndarray, float]:
        """ln p of a window, float32 [scored, vocabulary], and how far a rounded one may be from what the program had.

        ln p = scale · code + minimum, of scale = range / 65535, is rounded by half a scale at most: 16 / 65535 / 2 =
        1.2e-4 nats. What was rounded is made to sum to 1 again: a mean KLD then has the errors in the second order.
        A token of code 0 gets the minimum, and is as likely as that or less: the sum of the others is known as far as
        that of these goes, and a mean KLD is too low by what they have less (1.6e-5 nats on dsv2-mini).
        """
        width = HEAD + self.vocabulary + self.vocabulary % 2
        begin = _before(*self.ids.shape) + index * _window_bytes(self.ids.shape[1], self.vocabulary)
        rows = np.fromfile(self.path, "<u2", self.scored * width, offset=begin).reshape(self.scored, width)
        head = rows[:, :HEAD].copy().view("<f4").astype(np.float64)
        scale, minimum = head[:, :1], head[:, 1:]
        codes = rows[:, HEAD : HEAD + self.vocabulary]
        logp, above = scale * codes + minimum, codes > 0
        known = np.where(above, np.exp(logp), 0).sum(1, keepdims=True)
        others = (~above).sum(1, keepdims=True) * np.exp(minimum)  # at most
        right = np.where(known > 0, np.clip(known, 1 - others, 1), 1)  # all of code 0: a distribution that is even
        shift = np.log(right / np.where(known > 0, known, 1))
        return (logp + above * shift).astype(np.float32), float(scale.max()) / 2

    @classmethod
    def opened(cls, path: Path) -> LogitsFile:
        """Read the ids, once the file's size is what its header says. Raises InputError for a file that is cut, or is
        none of these."""
        found = _header(path)
        if found is None:
            raise InputError("is no file of log-probabilities", where=path, fix=AGAIN)
        ctx, vocabulary, windows = found
        if path.stat().st_size != _before(windows, ctx) + windows * _window_bytes(ctx, vocabulary):
            what = (
                f"of {path.stat().st_size} bytes can't be {windows} windows of {ctx} and a vocabulary of {vocabulary}"
            )
            raise InputError(what, where=path, fix=AGAIN)
        ids = np.fromfile(path, "<i4", windows * ctx, offset=_before(0, ctx)).reshape(windows, ctx)
        return cls(path, ids.astype(np.int64), vocabulary)


def windows_written(path: Path) -> int:
    """Whole windows of a file that may still grow, or not be there."""
    found = _header(path)
    if found is None:
        return 0
    ctx, vocabulary, windows = found
    return max(0, (path.stat().st_size - _before(windows, ctx)) // _window_bytes(ctx, vocabulary))


def _header(path: Path) -> tuple[int, int, int] | None:
    """n_ctx, n_vocab and n_chunk, or None of a file that has no such beginning, or is not there."""
    try:
        with path.open("rb") as file:
            start = file.read(_before(0, 0))
    except OSError:
        return None
    if len(start) < _before(0, 0) or not start.startswith(MAGIC):
        return None
    ctx, vocabulary, windows = (int(n) for n in np.frombuffer(start, "<i4", 3, len(MAGIC)))
    return (ctx, vocabulary, windows) if ctx >= 4 and vocabulary >= 1 and windows >= 0 else None


def _before(windows: int, ctx: int) -> int:
    """The bytes before the distributions: the header, and the ids."""
    return len(MAGIC) + 12 + 4 * windows * ctx


def _window_bytes(ctx: int, vocabulary: int) -> int:
    return 2 * (ctx - 1 - ctx // 2) * (HEAD + vocabulary + vocabulary % 2)
