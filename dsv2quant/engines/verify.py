"""Running an engine on an artifact and saying whether it computes what the artifact says.

The engine's distributions are compared with the runtime's of the same artifact, in float32 and under the engine's
departures from it. How far they may be apart is measured, too: by the engine on the unquantized source, and by the
runtime on the artifact in the engine's own dtype, since activations in FP8 make more of the same rounding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from dsv2quant.checkpoint.checkpoint import Checkpoint, HfCheckpoint
from dsv2quant.engines import compare, generation, llama_cpp, server
from dsv2quant.engines.answers import Answer, Request
from dsv2quant.engines.compare import Apart
from dsv2quant.engines.process import PYTHON_ENGINES, ask, folder_of
from dsv2quant.engines.results import Floor, Verdict
from dsv2quant.engines.runtime import Runtime
from dsv2quant.errors import InputError, UsageError
from dsv2quant.evaluation import divergence
from dsv2quant.evaluation.divergence import Pass
from dsv2quant.model.serving import Serving
from dsv2quant.progress import Progress
from dsv2quant.storage.verified import record
from dsv2quant.text.text import Text
from dsv2quant.text.tokenizer import Protocol, Windows, cut

DECODED = 32  # tokens


@dataclass(frozen=True)
class Settings:
    """How to run an engine, and on what. `python` is its interpreter, or `url` the address of a server. `ctx` of None
    is 512, or the trained context where that is shorter. Over a `kv_cache` in FP8 `DECODED` tokens are decoded behind
    each window and compared: prefill need not read the cache. `max_kld`, in nats, stands in for the noise floor."""

    engine: Serving
    python: str | None
    url: str | None
    tp: int
    windows: int
    ctx: int | None
    dtype: str
    kv_cache: str
    generate: bool
    max_kld: float | None
    device: str


def verify(
    artifact: Checkpoint, source: Checkpoint | None, text: Text, settings: Settings, progress: Progress
) -> Verdict:
    """Run the engine on `artifact`, and on `source` for its noise floor. What is wrong is among the verdict's faults.
    Raises InputError where the engine can't be run or fails, and UsageError for what it can't be asked."""
    started = time.perf_counter()
    runtime = Runtime(settings.engine, settings.dtype, settings.kv_cache, settings.device, progress)
    with progress(0, "", "tokenize"):
        windows = _windows(artifact, text, settings)
        tokenizer_faults = [] if source is None else _other_tokens(artifact, source, text)
    decode = DECODED if runtime.decodes else 0
    prompts = generation.prompts_of(artifact) if settings.generate else []
    request = Request(
        windows, artifact.config.vocab_size, prompts, dtype=settings.dtype, kv_cache=settings.kv_cache, tp=settings.tp,
        decode=decode,
    )  # fmt: skip
    answer = _ask(artifact, text, request, settings, progress)
    passed, own, cache_faults = runtime.passes(artifact, answer.windows)
    apart = _apart(answer, passed, progress)
    floor = None
    if source is not None and settings.url is None:  # a server has the artifact alone
        floor = _floor(answer, passed, source, text, request, settings, progress)
    continued = []
    if prompts:
        rounded = partial(runtime.model, artifact, getattr(torch, runtime.own_dtype(artifact)))
        on_text = max(apart.p999, floor.apart.p999 if floor else 0.0)
        continued = generation.check(
            runtime.model(artifact), rounded, source or artifact, prompts, answer.generated, on_text
        )
    return Verdict(
        model=artifact.model, engine=settings.engine, report=answer.report, apart=apart, own_noise=own,
        own_dtype=runtime.own_dtype(artifact), floor=floor,
        max_kld=settings.max_kld, continued=continued,
        artifact_faults=[*tokenizer_faults, *cache_faults, *_token_faults(answer, request)],
        windows=len(windows.ids), ctx=int(windows.ids.shape[1]), decoded=decode,
        tokens=len(windows.ids) * request.scored, likeliest=answer.scores.likeliest,
        storage_error=answer.scores.error, text=text.source, text_sha256=text.sha256, dtype=settings.dtype,
        kv_cache=settings.kv_cache, tp=settings.tp, device=settings.device, torch=torch.__version__,
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def note_verified(artifact: Checkpoint, verdict: Verdict) -> None:
    """Note beside an artifact's manifest that an engine computes of it what the runtime does."""
    said = {"versions": dict(verdict.report.versions), "kld": verdict.apart.distance.kld.mean, "limit": verdict.limit}
    asked = {
        "dtype": verdict.dtype,
        "kv_cache": verdict.kv_cache,
        "tp": verdict.tp,
        "source": verdict.floor is not None,
    }
    record(artifact.manifest, verdict.engine, said | asked | {"generated": len(verdict.continued)})


def _floor(
    answer: Answer, passed: Pass, source: Checkpoint, text: Text, request: Request, settings: Settings,
    progress: Progress,
) -> Floor:  # fmt: skip
    """The engine beside the runtime on the source, and both on the artifact beside that."""
    plain = _ask(source, text, replace(request, kv_cache="auto", prompts=()), settings, progress)
    theirs, _ = Runtime(settings.engine, settings.dtype, "auto", settings.device, progress).one(source, plain.windows)
    apart = _apart(plain, theirs, progress)
    if request.decode:  # the engine chose other tokens there
        return Floor(source.model, apart)
    windows = answer.windows
    with progress(2 * windows.ids.shape[0] * windows.scored, "tok", "cost") as advance:
        cost = divergence.compare(passed, theirs, windows.ids, windows.first, advance)
        engines = compare.compare(answer, theirs, advance)
    return Floor(source.model, apart, divergence.summarize(cost), compare.extra_cost(engines.kld, cost.kld))


def _windows(checkpoint: Checkpoint, text: Text, settings: Settings) -> Windows:
    config = checkpoint.config
    if config.is_classifier:
        what = f"is a {config.architecture}"
        raise InputError(what, where=checkpoint.model, fix="engines are compared on language models")
    ctx = settings.ctx or min(512, config.trained_context)
    if ctx + DECODED > config.max_position_embeddings:
        most = config.max_position_embeddings - DECODED
        raise UsageError(f"--ctx {ctx} is out of range", fix=f"the model takes 8 to {most} here")
    tokenizer = checkpoint.tokenizer()
    stream = tokenizer.encode(text.content)
    tokenizer.check_ids(stream, config.vocab_size)
    protocol: Protocol = "llama.cpp" if settings.engine == "llama.cpp" else "default"
    if settings.engine == "llama.cpp":
        llama_cpp.check_length(len(stream) + tokenizer.add_bos, ctx, text.source)
    found = cut(stream, ctx, tokenizer.bos_id, protocol, text.source, add_bos=tokenizer.add_bos)
    return Windows(found.ids[: settings.windows], found.first)


def _ask(checkpoint: Checkpoint, text: Text, request: Request, settings: Settings, progress: Progress) -> Answer:
    if settings.url is not None:
        return server.ask(settings.engine, settings.url, request, progress)
    if settings.engine in PYTHON_ENGINES:
        return ask(settings.engine, settings.python, folder_of(checkpoint), request, progress)
    if isinstance(checkpoint, HfCheckpoint):
        fix = "llama.cpp runs those alone: make one with convert --gguf"
        raise InputError("is no GGUF file", where=checkpoint.model, fix=fix)
    return llama_cpp.ask(checkpoint.inputs[0], text.content, request, progress)


def _apart(answer: Answer, runtime: Pass, progress: Progress) -> Apart:
    windows = answer.windows
    with progress(len(windows.ids) * windows.scored, "tok", "compare") as advance:
        return compare.summarize(compare.compare(answer, runtime, advance))


def _token_faults(answer: Answer, request: Request) -> list[str]:
    """What an engine that cuts the text itself took it for."""
    ours = request.windows.ids
    theirs = answer.windows.ids[:, : ours.shape[1]]
    if theirs.shape == ours.shape and np.array_equal(theirs, ours):
        return []
    apart = np.argwhere(theirs != ours)[0] if theirs.shape == ours.shape else [0, 0]
    return [f"takes the text for other tokens: the first at {int(apart[1])} in window {int(apart[0])}"]


def _other_tokens(artifact: Checkpoint, source: Checkpoint, text: Text) -> list[str]:
    """Where an artifact's tokenizer, ends of text and chat template are not its source's."""
    ours, theirs = artifact.tokenizer(), source.tokenizer()
    pairs: Sequence[tuple[str, object, object]] = (
        ("BOS", ours.bos_id, theirs.bos_id),
        ("whether a text begins with BOS", ours.add_bos, theirs.add_bos),
        ("the tokens of the text", ours.encode(text.content).tolist(), theirs.encode(text.content).tolist()),
        ("what ends a text", artifact.stop_ids(ours), source.stop_ids(theirs)),
        ("the chat template", dict(artifact.templates().named), dict(source.templates().named)),
    )  # fmt: skip
    return [f"{what} is not the source's" for what, a, b in pairs if a != b]
