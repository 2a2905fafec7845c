"""`dsv2quant bench model`: a model's speed on the GPU at hand, and the memory traffic that bounds it.

Prefill is of one prompt. Decoding takes the likeliest token of each sequence again and again behind a filled cache, the
whole step in one CUDA graph; the clock is the host's. A step's floor is the time in which the memory, at the rate it
reached in the same run, gives out what the step can't do without.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dsv2quant.arch.config import ModelConfig
from dsv2quant.bench.device import append, check_device, limits, measured_on
from dsv2quant.bench.subject import Subject, bytes_per_step
from dsv2quant.errors import UsageError
from dsv2quant.model.fused_model import FusedModel

PROMPT = 2048  # tokens
WINDOWS, STEPS = 5, 32  # of decoding: the median over windows of so many steps
GIB = 1 << 30
DEVICE = "cuda"


def run(
    subject: Subject, batches: Sequence[int], context: int, results: Path | None, say: Callable[[str], object]
) -> dict[str, Any]:
    """Measure prefill, and decoding of each batch; `say` gets a line, `results` a row for each.

    Raises UsageError without a Hopper GPU, where the model's context is shorter, or where its memory doesn't suffice.
    """
    check_device()
    if context + WINDOWS * STEPS + 1 > subject.config.max_position_embeddings:
        raise UsageError(f"--context {context} is more than the {subject.config.max_position_embeddings} tokens of "
                         f"{subject.name} leave room for", fix="take a shorter one")  # fmt: skip
    reached, where = limits(), measured_on()
    torch.cuda.empty_cache()
    started = time.perf_counter()
    try:
        model = subject.load()
    except torch.OutOfMemoryError as error:
        raise _too_large(subject.name, error) from None
    torch.cuda.synchronize()
    loaded, weights = time.perf_counter() - started, torch.cuda.memory_allocated()
    about = {"model": subject.name, "scheme": subject.scheme, "load s": round(loaded, 1), "weights GiB": _gib(weights)}
    say(f"{where['GPU']}, {reached}: {subject.name} {subject.scheme}, {_gib(weights)} GiB in {loaded:.1f} s")
    rows = []
    for batch in (None, *batches):
        torch.cuda.reset_peak_memory_stats()
        what = "prefill" if batch is None else f"batch {batch} at {context} tokens"
        try:
            found = prefill(model, subject) if batch is None else decode(model, subject, batch, context, reached.read)
        except torch.OutOfMemoryError as error:
            raise _too_large(f"{subject.name}, {what}", error) from None
        memory = {"memory GiB": _gib(torch.cuda.max_memory_allocated())}
        rows.append(about | found | memory | {"limits": str(reached)} | where)
        say(_line(rows[-1]))
        append(results, rows[-1:])
    return {"read_bytes_per_s": reached.read, "rows": rows}


def prefill(model: FusedModel, subject: Subject) -> dict[str, Any]:
    """Of one prompt, the median of three after one."""
    tokens = _random_tokens(subject.config, 1, PROMPT)
    taken = statistics.median(
        [_seconds(lambda: model.next_logits(tokens, model.caches(1, PROMPT))) for _ in range(4)][1:]
    )
    return {
        "phase": "prefill", "batch": 1, "context": PROMPT, "tokens/s": round(PROMPT / taken, 1),
        "ms": round(taken * 1e3, 3), "GB": "", "floor ms": "", "ratio": "",
    }  # fmt: skip


def decode(model: FusedModel, subject: Subject, batch: int, context: int, read: float) -> dict[str, Any]:
    """Of a batch whose cache is filled with random latents, as large as their norm makes them."""
    caches = model.caches(batch, context + WINDOWS * STEPS + 1)
    for cache in caches:
        cache.store.normal_()
        cache.length = context
    step = model.decoder(caches)
    tokens = step(_random_tokens(subject.config, batch, 1).flatten()).argmax(-1)

    def steps() -> None:
        nonlocal tokens
        for _ in range(STEPS):
            tokens = step(tokens).argmax(-1)

    taken = statistics.median(_seconds(steps) for _ in range(WINDOWS)) / STEPS
    nbytes = bytes_per_step(subject.config, subject.nbytes, batch, context)
    floor = nbytes / read
    return {
        "phase": "decode", "batch": batch, "context": context, "tokens/s": round(batch / taken, 1),
        "ms": round(taken * 1e3, 3), "GB": round(nbytes / 1e9, 3), "floor ms": round(floor * 1e3, 3),
        "ratio": round(floor / taken, 3),
    }  # fmt: skip


def _random_tokens(config: ModelConfig, batch: int, count: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, count), device=DEVICE)


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def _too_large(what: str, error: torch.OutOfMemoryError) -> UsageError:
    reason = str(error).partition(". ")[0]
    return UsageError(f"{what} does not fit: {reason}", fix="take a smaller --batch or --context, or another --scheme")


def _gib(nbytes: int) -> float:
    return round(nbytes / GIB, 2)


def _line(row: dict[str, Any]) -> str:
    floor = f", floor {row['floor ms']} ms for {row['GB']} GB ({row['ratio']})" if row["phase"] == "decode" else ""
    what = f"{row['phase']}, batch {row['batch']}, {row['context']} tokens"
    return f"{what}: {row['tokens/s']} tokens/s, {row['ms']} ms{floor}, {row['memory GiB']} GiB"
