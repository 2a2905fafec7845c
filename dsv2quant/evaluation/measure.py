"""One evaluation, start to end: text to windows, one or two models, and the numbers with what they rest on."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.identity import sampled
from dsv2quant.errors import InputError, UsageError
from dsv2quant.evaluation import divergence
from dsv2quant.evaluation.divergence import TOKENS_TOGETHER, Pass, batches_of, negative_log_likelihoods, run
from dsv2quant.evaluation.results import Comparison, Evaluation, Gate, NoiseFloor, Scored
from dsv2quant.model.cache import KV_NAMES
from dsv2quant.model.completion import open_model
from dsv2quant.model.load import LoadOptions, choose_backend
from dsv2quant.progress import Progress
from dsv2quant.storage.durable import MANIFEST_FILE
from dsv2quant.storage.safetensors import read_json
from dsv2quant.text.calibration import MAX_OVERLAP, fingerprint, overlap
from dsv2quant.text.text import Text
from dsv2quant.text.tokenizer import Protocol, Windows, cut

logger = logging.getLogger(__name__)
FLOOR_WINDOWS = 8


@dataclass(frozen=True)
class Settings:
    """How to evaluate. `ctx` of None is 2048, or the context the model was trained for, and `batch` of None depends on
    it. `decode_path` scores token by token through absorbed attention, as decoding does; then the model's latent cache
    stores what `options` say, and the reference's the compute dtype. `max_ppl_increase`, in percent, and `max_kld`, in
    nats, are gates."""

    options: LoadOptions
    ctx: int | None
    limit: int | None
    batch: int | None
    protocol: Protocol
    stream: bool
    decode_path: bool
    max_ppl_increase: float | None
    max_kld: float | None


def evaluate(
    checkpoint: Checkpoint, reference: Checkpoint | None, text: Text, settings: Settings, progress: Progress
) -> Evaluation:
    """Score a text. Raises InputError where model, reference and text don't go together, and UsageError for a length of
    windows that the model can't have. Warns of a text that the model was calibrated on, and of windows beyond what it
    was trained for."""
    started = time.perf_counter()
    _warn(checkpoint, text, settings)
    with progress(0, "", "tokenize"):
        windows = _windows(checkpoint, text, settings)
    if reference is not None and (theirs := reference.config.vocab_size) != checkpoint.config.vocab_size:
        what = f"has a vocabulary of {theirs}, {checkpoint.model} one of {checkpoint.config.vocab_size}"
        raise InputError(what, where=reference.model, fix="give the model it was made from")
    options, device = settings.options, settings.options.device
    ids, first = windows.ids, windows.first
    batch = settings.batch or max(1, TOKENS_TOGETHER // ids.shape[1])
    passed = _run(checkpoint, ids, batches_of(len(ids), batch), settings, progress, checkpoint.model)
    scored = len(ids) * windows.scored
    comparison = None
    if reference is None:
        with progress(scored, "tok", "score") as advance:
            nll = negative_log_likelihoods(passed, ids, first, advance)
    else:
        nll, comparison = _compare(passed, reference, windows, batch, settings, progress)
    return Evaluation(
        scored=_scored(checkpoint, nll),
        comparison=comparison,
        tokens=scored,
        windows=len(ids),
        ctx=int(ids.shape[1]),
        protocol=settings.protocol,
        text=text.source,
        text_sha256=text.sha256,
        dtype=str(options.dtype).removeprefix("torch."),
        weight_only=options.weight_only or checkpoint.is_weight_only,
        serving=options.serving,
        decode_path=settings.decode_path,
        kv_cache=KV_NAMES[options.kv_cache or options.dtype] if settings.decode_path else None,
        device=device if device == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})",
        backend=options.backend,
        stream=settings.stream,
        torch=torch.__version__,
        seconds=time.perf_counter() - started,
        gates={} if comparison is None else _gates(comparison, settings),
    )


def _compare(
    passed: Pass, reference: Checkpoint, windows: Windows, batch: int, settings: Settings, progress: Progress
) -> tuple[np.ndarray, Comparison]:
    """−ln p of the model [windows, tokens], and how far its pass is from the reference's, whose cache is not FP8."""
    ids, first = windows.ids, windows.first
    floor_ids = ids[:FLOOR_WINDOWS]
    # The reference also runs its first windows again, one at a time (or all at once): the kernels then round
    # differently, and what that alone does to the numbers is the floor under every comparison.
    again = batches_of(len(floor_ids), 1 if batch > 1 else len(floor_ids))
    both = [*batches_of(len(ids), batch), *(slice(len(ids) + b.start, len(ids) + b.stop) for b in again)]
    unquantized = replace(settings, options=replace(settings.options, kv_cache=None))
    every = np.concatenate([ids, floor_ids])
    referred = _run(reference, every, both, unquantized, progress, f"reference {reference.model}")
    with progress(len(ids) * windows.scored, "tok", "compare") as advance:
        compared = divergence.compare(passed, referred.part(slice(0, len(ids))), ids, first, advance)
    floor = _noise_floor(reference, referred, floor_ids, first, batch, unquantized, progress)
    distance = vars(divergence.summarize(compared))
    return compared.nll, Comparison(**distance, reference=_scored(reference, compared.reference_nll), noise_floor=floor)


def _gates(found: Comparison, settings: Settings) -> dict[str, Gate]:
    """Those that are set: percent that perplexity grew by, and mean KLD in nats."""
    growth = float(100 * np.expm1(found.ln_ratio.value))
    limits = {"max_ppl_increase": (settings.max_ppl_increase, growth), "max_kld": (settings.max_kld, found.kld.mean)}
    return {name: Gate(most, value, value <= most) for name, (most, value) in limits.items() if most is not None}


def _warn(checkpoint: Checkpoint, text: Text, settings: Settings) -> None:
    trained = checkpoint.config.trained_context
    if settings.ctx is not None and settings.ctx > trained:
        what = "warning: --ctx %d is beyond the trained context, %d: perplexity may explode"
        logger.warning(what, settings.ctx, trained)
    if (manifest := checkpoint.file(MANIFEST_FILE)) is not None:
        calibrated = read_json(manifest).get("calibration_fingerprint")
        shared = overlap(fingerprint(text.content), calibrated) if isinstance(calibrated, list) else 0.0
        if shared > MAX_OVERLAP:
            what = "warning: %s of the text's lines were calibrated on: it flatters the model"
            logger.warning(what, f"{shared:.1%}")


def _windows(checkpoint: Checkpoint, text: Text, settings: Settings) -> Windows:
    if checkpoint.config.is_classifier:
        fix = "perplexity needs a language model"
        raise InputError(f"is a {checkpoint.config.architecture}", where=checkpoint.model, fix=fix)
    ctx = settings.ctx or min(2048, checkpoint.config.trained_context)
    if not 8 <= ctx <= checkpoint.config.max_position_embeddings:
        limit = checkpoint.config.max_position_embeddings
        raise UsageError(f"--ctx {ctx} is out of range", fix=f"the model takes 8 to {limit}")
    tokenizer = checkpoint.tokenizer()
    stream = tokenizer.encode(text.content)
    tokenizer.check_ids(stream, checkpoint.config.vocab_size)
    windows = cut(stream, ctx, tokenizer.bos_id, settings.protocol, text.source, add_bos=tokenizer.add_bos)
    logger.info("%s: %d tokens, %d windows of %d", text.source, len(stream), len(windows.ids), ctx)
    return Windows(windows.ids[: settings.limit], windows.first)


def _run(
    checkpoint: Checkpoint, ids: np.ndarray, batches: list[slice], settings: Settings, progress: Progress, label: str
) -> Pass:
    model = open_model(checkpoint, settings.options, stream=settings.stream, progress=progress)
    with progress(ids.size * checkpoint.config.num_hidden_layers, "tok·layer", label) as advance:
        return run(model, ids, batches, advance, decode_path=settings.decode_path)


def _noise_floor(
    reference: Checkpoint,
    referred: Pass,
    ids: np.ndarray,
    first: int,
    batch: int,
    settings: Settings,
    progress: Progress,
) -> NoiseFloor:
    """Of the reference against itself: under another batch size, and in the other compute dtype."""
    count = len(ids)
    baseline, again = referred.part(slice(0, count)), referred.part(slice(-count, None))
    options = settings.options
    other = torch.bfloat16 if options.dtype == torch.float32 else torch.float32
    backend = choose_backend("auto", options.device, other, options.weight_only or options.serving is not None)
    in_other = replace(settings, options=replace(options, dtype=other, backend=backend))
    rerun = _run(reference, ids, batches_of(count, batch), in_other, progress, "noise floor")
    with progress(2 * count * (ids.shape[1] - 1 - first), "tok", "compare noise") as advance:
        batched, typed = (divergence.compare(run, baseline, ids, first, advance).kld.mean() for run in (again, rerun))
    return NoiseFloor(count, float(batched), str(other).removeprefix("torch."), float(typed))


def _scored(checkpoint: Checkpoint, nll: np.ndarray) -> Scored:
    manifest = checkpoint.file(MANIFEST_FILE)
    return Scored(
        checkpoint.model,
        checkpoint.revision,
        digest=read_json(manifest).get("plan") if manifest else None,
        manifest_sha256=hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest else None,
        identity=sampled(checkpoint),
        perplexity=divergence.perplexity(nll),
    )
