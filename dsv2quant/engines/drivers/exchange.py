"""What a driver and the process that started it leave for each other in a folder.

To the driver: request.json, `Request`'s fields; windows.npy, int64 [windows, ctx]; bench.npy where speed is asked for.
From it, of n windows and s scored positions each:

- logprobs.npy, float32 [n, s, vocabulary], natural logarithms; or where an engine gives only the likeliest k,
  top_ids.npy, int32 [n, s, k], top_logprobs.npy, float32 [n, s, k], and target_logprobs.npy, float32 [n, s]
- decoded.npy, int64 [n, s], where tokens were decoded behind the windows
- generated.json, one object for each prompt; report.json; bench.json
- progress, a byte for each window and prompt that is done
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


class Exchange:
    """The driver's side. `decode` tokens are decoded greedily behind each window, which is then a prompt; without,
    position i of a window predicts token i + 1, for i from `first` to ctx − 2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.request: dict[str, Any] = json.loads((folder / "request.json").read_text())
        self.windows: np.ndarray = np.load(folder / "windows.npy")
        self.model: str = self.request["model"]
        self.prompts: list[dict[str, Any]] = self.request["prompts"]
        self.decode, self.first = int(self.request["decode"]), int(self.request["first"])
        self.scored = self.decode or self.windows.shape[1] - 1 - self.first
        self.vocabulary = int(self.request["vocab_size"])
        self._logprobs: np.ndarray | None = None

    @classmethod
    def opened(cls) -> Exchange:
        """The folder that the command line names."""
        return cls(Path(sys.argv[1]))

    def put_logits(self, window: int, logits: Any) -> None:
        """Keep a window's logits [scored, at least vocabulary], a torch tensor, as log-probabilities of the whole
        vocabulary; rows of padding are cut off."""
        found = logits[:, : self.vocabulary].float().log_softmax(-1).cpu().numpy()
        if found.shape != (self.scored, self.vocabulary):
            raise ValueError(f"logits of shape {found.shape}, not {(self.scored, self.vocabulary)}")
        if self._logprobs is None:
            shape = (len(self.windows), *found.shape)
            path = self.folder / "logprobs.npy"
            self._logprobs = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        self._logprobs[window] = found

    def put_tops(self, ids: np.ndarray, logprobs: np.ndarray, targets: np.ndarray) -> None:
        """Keep the likeliest k [windows, scored, k] and the true tokens' log-probabilities [windows, scored]."""
        np.save(self.folder / "top_ids.npy", ids.astype(np.int32))
        np.save(self.folder / "top_logprobs.npy", logprobs.astype(np.float32))
        np.save(self.folder / "target_logprobs.npy", targets.astype(np.float32))

    def put_decoded(self, tokens: Any) -> None:
        """Keep the tokens decoded behind each window, [windows, decode]."""
        np.save(self.folder / "decoded.npy", np.asarray(tokens, np.int64))

    def put(self, name: str, value: Any) -> None:
        """Write generated.json, report.json or bench.json."""
        (self.folder / f"{name}.json").write_text(json.dumps(value))

    def advance(self) -> None:
        """Say that one more window or prompt is done."""
        with (self.folder / "progress").open("ab") as file:
            file.write(b".")
