"""What a driver and the process that started it leave for each other in a folder.

To the driver: request.json, `Request`'s fields; windows.npy, int64 [windows, ctx]; bench.npy where speed is asked for.
From it, of n windows and s scored positions each:

- logprobs.npy, float32 [n, s, vocabulary], natural logarithms
- decoded.npy, int64 [n, s], where tokens were decoded behind the windows
- generated.json, one object for each prompt; report.json; bench.json
- progress, a byte for each window and prompt that is done
- reason, a line, where the driver fails
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

TEMPLATE = 256  # tokens that a chat template may add to a prompt
SAME = 1e-3  # nats between an engine's log-probabilities and those of its logits: both are made in float32


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

    def longest(self) -> int:
        """Tokens of the longest window or prompt with what is to follow it. A prompt has at most as many tokens as
        bytes."""
        windows = self.windows.shape[1] + self.decode if len(self.windows) else 0
        new = int(self.request["max_new_tokens"])
        return max([windows, *(len(_written(prompt).encode()) + TEMPLATE + new for prompt in self.prompts)])

    def each_window(
        self, score: Callable[[int, list[int]], object], decode: Callable[[int, list[int]], list[int]] | None = None
    ) -> None:
        """Have every window scored, or with `decode`, where the engine can be asked to, tokens decoded behind it, which
        are kept; either takes a window's number and tokens."""
        decoded = []
        for window, ids in enumerate(self.windows.tolist()):
            if self.decode and decode is not None:
                decoded.append(decode(window, ids))
            else:
                score(window, ids)
            self.advance()
        if decoded:
            self.put_decoded(decoded)

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

    def timed(self, seconds: Callable[[list[list[int]], int], float]) -> Iterator[dict[str, Any]]:
        """Rates of prompts and of decoding, in tokens a second of the whole batch, at each batch and context: the best
        of two after a warm-up. `seconds` says how long prompts take, and so many tokens behind each."""
        bench, tokens = self.request["bench"], np.load(self.folder / "bench.npy")
        for batch in bench["batches"]:
            for context in bench["contexts"]:
                prompts, new = tokens[:batch, :context].tolist(), int(bench["new_tokens"])
                seconds(prompts, 4)
                first, whole = (min(seconds(prompts, count) for _ in range(2)) for count in (1, new))
                step = (whole - first) / (new - 1)
                yield {
                    "batch": batch, "context": context, "prefill_tokens_s": batch * context / first,
                    "decode_tokens_s": batch / step, "step_ms": 1e3 * step,
                }  # fmt: skip


def _written(prompt: dict[str, Any]) -> str:
    return str(prompt["text"]) if "text" in prompt else "".join(m["role"] + m["content"] for m in prompt["messages"])


def check(found: Sequence[float] | np.ndarray, said: Sequence[float]) -> None:
    """Raise ValueError where what an engine says of some tokens is not what its logits say, both in nats."""
    furthest = float(np.abs(np.asarray(found) - np.asarray(said)).max())
    if not furthest < SAME:
        raise ValueError(f"the log-probabilities are {furthest:.3g} nats from those of the logits, not below {SAME}")


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Write an error to stderr, and to the folder why: what an engine prints while it ends comes behind it. An error
    without words is told by its line."""
    traceback.print_exception(kind, error, trace)
    said = " ".join(str(error).split()) or (traceback.extract_tb(trace)[-1].line if trace else "")
    (Path(sys.argv[1]) / "reason").write_text(f"{kind.__name__}: {said}")


def run(main: Callable[[], object]) -> None:
    """Run a driver, and tell what ends it. Not by sys.excepthook, for which torch.distributed has a function of its
    own."""
    try:
        main()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is the reason
        tell(type(error), error, error.__traceback__)
        os._exit(1)


def clocked(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
