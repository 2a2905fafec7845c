"""llama.cpp on a GGUF file, by its own programs: llama-perplexity scores a text, llama-server continues prompts.

They are those on PATH, as users run them; options and messages are those of llama.cpp 0c1e57098. What they find is left
in a folder as a driver of other engines leaves it (drivers/exchange.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv2quant.engines.llama_logits import LogitsFile, windows_written
from dsv2quant.engines.llama_server import LlamaServer
from dsv2quant.errors import InputError, UsageError, listing
from dsv2quant.progress import Progress

POLL = 0.2  # seconds between looks at how far a program is
CONTEXT = 4096  # of the server: prompts and what follows them fit into it
VERBOSE = ("-lv", "4")  # says where weights lie, and which types they have


@dataclass(frozen=True)
class Job:
    """What to run: at most `windows` windows of `ctx` tokens of the text, and each prompt, {"text"} or {"messages"},
    continued by at most `max_new_tokens`. `kv_cache` is a type by llama.cpp's name: 'f32' leaves the weights alone to
    differ; a quantized one takes flash attention."""

    model: Path
    text: str
    windows: int
    ctx: int
    prompts: Sequence[dict[str, Any]] = ()
    max_new_tokens: int = 32
    kv_cache: str = "f32"

    @property
    def options(self) -> list[str]:
        """Of both programs."""
        flash = "off" if self.kv_cache in ("f32", "f16", "bf16") else "on"
        cache = ["-ctk", self.kv_cache, "-ctv", self.kv_cache, "-fa", flash]
        return ["-m", str(self.model), *cache, "-t", str(os.cpu_count()), *VERBOSE]


@dataclass(frozen=True)
class Scores:
    """`ids`, int64 [windows, ctx], are llama.cpp's own of the text, whose position i predicts i + 1 from `first` on.
    `error` is how far a log-probability of logprobs.npy may be from what it computed, in nats: it writes 16 bits."""

    ids: np.ndarray
    first: int
    error: float


def run(job: Job, folder: Path, progress: Progress) -> Scores | None:
    """Leave logprobs.npy, generated.json, report.json and the programs' logs in `folder`. None: no window was asked.

    Raises UsageError where a program is missing, and InputError where one fails: with what it says.
    """
    scores = score(job, folder, progress) if job.windows else None
    if job.prompts:
        (folder / "generated.json").write_text(json.dumps(generate(job, folder, progress)))
    (folder / "report.json").write_text(json.dumps(report(folder)))
    return scores


def program(name: str) -> str:
    """Where it lies. Raises UsageError where PATH has none."""
    found = shutil.which(name)
    if found is None:
        fix = "get llama.cpp (brew install llama.cpp, or github.com/ggml-org/llama.cpp/releases) and put it on PATH"
        raise UsageError(f"{name} is not on PATH", where="--engine llama.cpp", fix=fix)
    return found


def score(job: Job, folder: Path, progress: Progress) -> Scores:
    """Run llama-perplexity, and write logprobs.npy, float32 [windows, scored, vocabulary]."""
    text, logits, log = folder / "text.txt", folder / "logits.bin", folder / "perplexity.log"
    text.write_text(job.text + "\n", encoding="utf-8")  # it takes one line break off
    words = [program("llama-perplexity"), *job.options, "-f", str(text), "-c", str(job.ctx), "--chunks",
             str(job.windows), "--kl-divergence-base", str(logits)]  # fmt: skip
    with progress(job.windows, "windows", "llama-perplexity") as advance, started(words, log) as process:
        done = 0
        while process.poll() is None:
            time.sleep(POLL)
            advance(-done + (done := windows_written(logits)))
    if process.returncode or not windows_written(logits):
        raise failed("llama-perplexity", process.returncode, log)
    found = LogitsFile.opened(logits)
    shape, error = (len(found.ids), found.scored, found.vocabulary), 0.0
    logprobs = np.lib.format.open_memmap(folder / "logprobs.npy", mode="w+", dtype=np.float32, shape=shape)
    for window in range(len(found.ids)):
        logprobs[window], rounding = found.window(window)
        error = max(error, rounding)
    logits.unlink()
    return Scores(found.ids, found.first, error)


def generate(job: Job, folder: Path, progress: Progress) -> list[dict[str, Any]]:
    """Continue each prompt greedily with llama-server, as generated.json has them."""
    log = folder / "server.log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [program("llama-server"), *job.options, "-c", str(max(job.ctx, CONTEXT)), "-np", "1",
             "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    with progress(len(job.prompts), "prompts", "llama-server") as advance, started(words, log) as process:
        server = LlamaServer(f"http://127.0.0.1:{port}")
        while not server.is_ready():
            if process.poll() is not None:
                raise failed("llama-server", process.returncode, log)
            time.sleep(POLL)
        found = []
        for prompt in job.prompts:
            found.append(server.complete(prompt, job.max_new_tokens))
            advance(1)
    return found


@contextmanager
def started(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program whose output goes to `log`, and which doesn't outlive the block."""
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def failed(name: str, code: int, log: Path) -> InputError:
    """The error to raise for a program that failed: what it says is wrong, or else its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [match[1] for line in lines if (match := re.match(r"[\d.]+ E (.+)", line))] or lines[-1:]
    return InputError(f"{name} ended with exit code {code}: {listing(said)}", where=log, fix="its log says more")


def report(folder: Path) -> dict[str, Any]:
    """What the programs' logs say: devices, types of weights and how many have each, and in which buffers they lie: of
    CPU_REPACK, blocks are in another order, for kernels of their own."""
    done = subprocess.run([program("llama-perplexity"), "--version"], capture_output=True, encoding="utf-8")
    version = re.search(r"version: (.+)", done.stdout + done.stderr)
    logs = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.log"))]
    log = logs[0] if logs else ""
    types = {f"{kind} weights": int(count) for kind, count in re.findall(r"- type +(\S+): +(\d+) tensors", log)}
    buffers = dict(re.findall(r"(\S+) model buffer size = +([\d.]+) MiB", log))
    flash = re.search(r"flash_attn += (\w+)", log)
    cache = re.search(r"K \((\w+)\)", log)
    return {
        "versions": {"llama.cpp": version[1] if version else "unknown"},
        "kernels": types | {f"MiB in {name}": round(float(size)) for name, size in buffers.items()},
        "attention": f"flash attention {flash[1]}" if flash else None,
        "kv_cache": cache[1] if cache else None,
        "device": ", ".join(sorted({name.split("_")[0] for name in buffers})) or "unknown",
    }
