"""`dsv2quant bench model --engine`: an engine and this tool's runtime on the same checkpoint, at the same shapes and
over the same tokens of a text, which route as text does.

Both take prompts of `context` tokens together, decode behind them, and are the best of two after a warm-up. The
engine's clock runs from the request to the last token, the runtime's around the same work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv2quant.bench.device import append, check_device, measured_on
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.engines.answers import Request, asked_of
from dsv2quant.engines.process import bench, folder_of
from dsv2quant.errors import UsageError
from dsv2quant.model.completion import open_model
from dsv2quant.model.fused_model import FusedModel
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.progress import Progress
from dsv2quant.text.text import python_topics
from dsv2quant.text.tokenizer import Windows, cut

NEW_TOKENS = 128


def run(
    checkpoint: Checkpoint, engine: str, python: str | None, batches: Sequence[int], context: int,
    results: Path | None, say: Callable[[str], object], progress: Progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each program and batch; `say` gets a line, `results` a row for each.

    Raises UsageError without a Hopper GPU and for a context that the model lacks room for, and InputError where the
    engine fails.
    """
    check_device()
    tokens = prompts(checkpoint, max(batches), context)
    asked = {"batches": list(batches), "contexts": [context], "new_tokens": NEW_TOKENS}
    nothing = Request(Windows(tokens[:0], 0), checkpoint.config.vocab_size, tp=1)
    request = asked_of(folder_of(checkpoint), nothing) | {"bench": asked}
    measured, report = bench(engine, python, request, tokens, progress)  # first: its process frees the GPU
    where = {"model": checkpoint.model} | measured_on()
    version = report.versions.get(engine, "")
    programs = [(f"{engine} {version}".strip(), ", ".join(report.kernels), measured)]
    model = open_model(checkpoint, LoadOptions(torch.bfloat16, "cuda", backend="kernels"), progress=progress)
    programs.append(("dsv2quant", "kernels", [*own(model, tokens, batches)]))
    rows = [{"program": name, **row, "kernels": kernels} | where for name, kernels, found in programs for row in found]
    for row in rows:
        say(line(row))
    append(results, rows)
    return rows


def prompts(checkpoint: Checkpoint, batch: int, context: int) -> np.ndarray:
    """Token ids [batch, context] of Python's topics, over and over where they are too short."""
    room = checkpoint.config.max_position_embeddings - NEW_TOKENS
    if not 8 <= context <= room:
        raise UsageError(f"--context {context} is out of range", fix=f"{checkpoint.model} takes 8 to {room} here")
    tokenizer, text = checkpoint.tokenizer(), python_topics()
    ids = np.resize(tokenizer.encode(text.content), batch * (context - 1))
    return cut(ids, context, tokenizer.bos_id, "default", text.source).ids


def own(model: Model | FusedModel, tokens: np.ndarray, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What the runtime reaches at each batch of the prompts [most, context]."""
    context = tokens.shape[1]
    for batch in batches:
        given = torch.from_numpy(tokens[:batch])
        timed(model, given, 4)
        twice = [timed(model, given, NEW_TOKENS) for _ in range(2)]
        prefill, decode = map(min, zip(*twice, strict=True))
        step = decode / (NEW_TOKENS - 1)
        yield {
            "batch": batch, "context": context, "prefill_tokens_s": batch * context / prefill,
            "decode_tokens_s": batch / step, "step_ms": 1e3 * step,
        }  # fmt: skip


def timed(model: Model | FusedModel, prompts: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds to prefill prompts [batch, context] up to a first token of each, and to decode `new` − 1 behind it."""
    batch, context = prompts.shape
    caches = model.caches(batch, context + new)
    device = model.options.device
    started = _now(device)
    chosen = model.next_logits(prompts, caches).argmax(-1)
    prefilled = _now(device)
    step = model.decoder(caches)
    for _ in range(new - 1):
        chosen = step(chosen).argmax(-1)
    return prefilled - started, _now(device) - prefilled


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def line(row: dict[str, Any]) -> str:
    """A row, for people."""
    return (
        f"{row['program']}: batch {row['batch']}, {row['context']} tokens: prompt {row['prefill_tokens_s']:,.0f} "
        f"tokens/s, decode {row['decode_tokens_s']:,.0f} tokens/s, {row['step_ms']:.2f} ms a step"
    )
