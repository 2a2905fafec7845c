"""llama.cpp on a GGUF file, by its own programs: llama-perplexity scores a text, llama-server continues prompts.

They are those on PATH, as users run them; options and messages are those of llama.cpp 0c1e57098.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from dsv2quant.engines.answers import Answer, Generated, Report, Request, Scores
from dsv2quant.engines.http import Server
from dsv2quant.engines.llama_logits import LogitsFile, windows_written
from dsv2quant.engines.llama_server import LlamaServer
from dsv2quant.engines.process import POLL, started, wait
from dsv2quant.errors import InputError, UsageError, listing
from dsv2quant.progress import Progress
from dsv2quant.storage.processors import processors
from dsv2quant.text.tokenizer import Windows

CONTEXT = 4096  # of the server: prompts and what follows them fit into it
# The cache and attention in float32, so that the weights and what meets them alone differ from the runtime's; and a log
# that says where weights lie, and which types they have.
OPTIONS = ("-ctk", "f32", "-ctv", "f32", "-fa", "off", "-lv", "4")


def ask(model: Path, text: str, request: Request, progress: Progress) -> Answer:
    """Have llama.cpp cut a text into as many windows as long as those of the request, score these, and continue its
    prompts. The answer's windows are llama.cpp's.

    Raises UsageError where a program is missing, and InputError where one fails, with what it says.
    """
    with tempfile.TemporaryDirectory(prefix="dsv2quant-llama.cpp-") as name:
        folder = Path(name)
        windows, scores = score(model, text, request, folder, progress)
        generated = generate(model, request, folder, progress) if request.prompts else []
        return Answer(windows, scores, report(folder / "perplexity.log"), generated)


def check_length(tokens: int, ctx: int, where: str) -> None:
    """Raise InputError for a text that llama-perplexity refuses (tools/perplexity/perplexity.cpp), whose reason its log
    may lack."""
    if tokens < 2 * ctx:
        what = f"has {tokens} tokens, and llama-perplexity wants twice a window, {2 * ctx}"
        raise InputError(what, where=where, fix="give a longer text or a smaller --ctx")


def command(name: str, model: Path, *words: object) -> list[str]:
    """A program's command line. Raises UsageError where PATH has none of this name."""
    found = shutil.which(name)
    if found is None:
        fix = "get llama.cpp, of github.com/ggml-org/llama.cpp/releases or a package manager, and put it on PATH"
        raise UsageError(f"{name} is not on PATH", where="--engine llama.cpp", fix=fix)
    return [found, "-m", str(model), "-t", str(processors()), *OPTIONS, *map(str, words)]


def score(model: Path, text: str, request: Request, folder: Path, progress: Progress) -> tuple[Windows, Scores]:
    """Run llama-perplexity, whose 16 bits a token become float32 [windows, scored, vocabulary], mapped in `folder`."""
    given, logits, log = folder / "text.txt", folder / "logits.bin", folder / "perplexity.log"
    given.write_text(text + "\n", encoding="utf-8")  # it takes one line break off
    count, ctx = request.windows.ids.shape
    words = command(
        "llama-perplexity", model, "-f", given, "-c", ctx, "--chunks", count, "--kl-divergence-base", logits
    )
    with progress(count, "windows", "llama-perplexity") as advance, started(words, log) as process:
        wait(process, lambda: windows_written(logits), advance)
    if process.returncode or not windows_written(logits):
        raise failed("llama-perplexity", process.returncode, log)
    found = LogitsFile.opened(logits)
    if found.vocabulary != request.vocabulary:
        what = f"llama.cpp finds {found.vocabulary} tokens in it, not {request.vocabulary}"
        raise InputError(what, where=model, fix="it is damaged: convert it again")
    shape, error = (len(found.ids), found.scored, found.vocabulary), 0.0
    logprobs = np.lib.format.open_memmap(folder / "logprobs.npy", mode="w+", dtype=np.float32, shape=shape)
    for window in range(len(found.ids)):
        logprobs[window], rounding = found.window(window)
        error = max(error, rounding)
    if not np.isfinite(error):
        raise InputError("llama.cpp's log-probabilities are NaN", where=model, fix="it is damaged: convert it again")
    return Windows(begun(found.ids, request.windows.ids), found.first), Scores(logprobs, error=error)


def begun(ids: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """A text's ids [windows, ctx] with the BOS that llama.cpp puts in place of each window's first token where it adds
    one: it is then the text's first, too."""
    first = ids[0, 0]
    return np.concatenate([np.full((len(ids), 1), first), ids[:, 1:]], 1) if (asked[:, 0] == first).all() else ids


def generate(model: Path, request: Request, folder: Path, progress: Progress) -> list[Generated]:
    """Continue each prompt greedily with llama-server."""
    log = folder / "server.log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = command("llama-server", model, "-c", CONTEXT, "-np", 1, "--host", "127.0.0.1", "--port", port)
    with progress(len(request.prompts), "prompts", "llama-server") as advance, started(words, log) as process:
        server = LlamaServer(Server("llama.cpp", f"http://127.0.0.1:{port}"))
        while not server.is_ready():
            if process.poll() is not None:
                raise failed("llama-server", process.returncode, log)
            time.sleep(POLL)
        found = []
        for prompt in request.prompts:
            found.append(server.complete(prompt, request.max_new_tokens, request.vocabulary))
            advance(1)
    return found


def failed(name: str, code: int, log: Path) -> InputError:
    """The error to raise for a program that failed: what it says is wrong, or else its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [match[1] for line in lines if (match := re.match(r"[\d.]+ E (.+)", line))] or lines[-1:]
    return InputError(f"{name} ended with exit code {code}: {listing(said)}")


def report(log: Path) -> Report:
    """What llama-perplexity's log says: types of weights and how many have each, and the buffers that they lie in. Of
    CPU_REPACK, blocks are in another order, for kernels of their own."""
    done = subprocess.run([shutil.which("llama-perplexity") or "", "--version"], capture_output=True, encoding="utf-8")
    version = re.search(r"version: (.+)", done.stdout + done.stderr)
    said = log.read_text(encoding="utf-8", errors="replace")
    types = {f"{kind} weights": int(count) for kind, count in re.findall(r"- type +(\S+): +(\d+) tensors", said)}
    buffers = dict(re.findall(r"(\S+) model buffer size = +([\d.]+) MiB", said))
    flash, cache = re.search(r"flash_attn += (\w+)", said), re.search(r"K \((\w+)\)", said)
    return Report(
        versions={"llama.cpp": version[1] if version else "unknown"},
        kernels=types | {f"MiB in {name}": round(float(size)) for name, size in buffers.items()},
        attention=f"flash attention {flash[1]}" if flash else None,
        kv_cache=cache[1] if cache else None,
        device=", ".join(sorted({name.split("_")[0] for name in buffers})) or "unknown",
    )
