"""One evaluation, start to end: text to windows, one or two models, and the numbers with what they rest on; of a second
model its kept reference will do, which another run has made."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from dsv2quant.calib.distributed import ALONE, Ranks
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import InputError, UsageError
from dsv2quant.evaluation import divergence
from dsv2quant.evaluation.divergence import TOKENS_TOGETHER, Divergence, Pass, batches_of, negative_log_likelihoods
from dsv2quant.evaluation.passes import (
    FLOOR_WINDOWS,
    Settings,
    conditions_of,
    kept_of,
    refer,
    run_model,
    source_of,
    weights_of,
)
from dsv2quant.evaluation.reference import KeptReference, Reference
from dsv2quant.evaluation.results import Comparison, Evaluation, Gate, Saved, Scored
from dsv2quant.model.cache import KV_NAMES
from dsv2quant.progress import Progress
from dsv2quant.storage.durable import MANIFEST_FILE
from dsv2quant.storage.safetensors import read_json
from dsv2quant.text.calibration import MAX_OVERLAP, fingerprint, overlap
from dsv2quant.text.text import Text
from dsv2quant.text.tokenizer import Tokenizer, Windows, cut

logger = logging.getLogger(__name__)


def evaluate(
    checkpoint: Checkpoint,
    reference: Checkpoint | KeptReference | None,
    text: Text,
    settings: Settings,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Score a text. Several `ranks` have windows each, and all get the same numbers, which are those of one.

    Raises InputError where model, reference and text don't go together, and UsageError for a length of windows that the
    model can't have, and for more ranks than batches of windows. Warns of a text that the model was calibrated on, of
    windows beyond what it was trained for, and of a kept reference that is of other weights than the model was made
    from."""
    started = time.perf_counter()
    _warn(checkpoint, text, settings)
    with progress(0, "", "tokenize"):
        windows = _windows(checkpoint, text, settings)
    options, device = settings.options, settings.options.device
    ids, first = windows.ids, windows.first
    batch = settings.batch or max(1, TOKENS_TOGETHER // ids.shape[1])
    conditions = conditions_of(checkpoint, windows, batch, text, settings)
    if isinstance(reference, KeptReference):
        reference.check(conditions, ids, checkpoint.model)
        _warn_of_source(checkpoint, reference)
    elif reference is not None and (theirs := reference.config.vocab_size) != checkpoint.config.vocab_size:
        what = f"has a vocabulary of {theirs}, {checkpoint.model} one of {checkpoint.config.vocab_size}"
        raise InputError(what, where=reference.model, fix="give the model it was made from")
    own = ranks.span(batches_of(len(ids), batch))
    mine = Windows(ids[own], first)
    if settings.save is not None:
        kept = kept_of(checkpoint, settings.save, windows, conditions, settings, progress)
        passed = kept.reference(len(ids), device).passed
    else:
        batches = batches_of(len(mine.ids), batch)
        passed = run_model(checkpoint, mine.ids, batches, settings, progress, checkpoint.model)
    comparison = None
    if reference is None:
        with progress(len(mine.ids) * windows.scored, "tok", "score") as advance:
            part = negative_log_likelihoods(passed, mine.ids, first, advance)
        nll = np.concatenate(ranks.everywhere(part))
    else:
        if isinstance(reference, KeptReference):
            referred = reference.reference(len(ids), device).part(own)
        else:
            referred = _refer(reference, windows, own, batch, settings, progress, ranks)
        nll, comparison = _compare(passed, referred, mine, progress, ranks)
    return Evaluation(
        scored=Scored(**weights_of(checkpoint), perplexity=divergence.perplexity(nll)),
        comparison=comparison,
        tokens=len(ids) * windows.scored,
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
        saved=None if settings.save is None else Saved(settings.save.name, settings.save.stat().st_size),
    )


def _refer(
    reference: Checkpoint,
    windows: Windows,
    own: slice,
    batch: int,
    settings: Settings,
    progress: Progress,
    ranks: Ranks,
) -> Reference:
    """A model as a reference over this rank's own windows. Rank 0 also runs what its noise floor needs."""
    needed = min(len(windows.ids), -(-FLOOR_WINDOWS // batch) * batch)  # in the batches that one rank has them in
    if ranks.is_first:
        some = Windows(windows.ids[: max(own.stop, needed)], windows.first)
        found = refer(reference, some, batch, settings, progress).part(own)
        ranks.agreed(found.noise_floor)
        return found
    ids = windows.ids[own]
    unquantized = replace(settings, options=replace(settings.options, kv_cache=None))
    passed = run_model(reference, ids, batches_of(len(ids), batch), unquantized, progress, "reference")
    return Reference(weights_of(reference), passed, ranks.agreed(None))


def _compare(
    passed: Pass, reference: Reference, windows: Windows, progress: Progress, ranks: Ranks
) -> tuple[np.ndarray, Comparison]:
    """−ln p of the model [windows, tokens], and how far its pass is from the reference's, of all ranks' windows."""
    with progress(len(windows.ids) * windows.scored, "tok", "compare") as advance:
        part = divergence.compare(passed, reference.distributions, windows.ids, windows.first, advance)
    compared = Divergence.joined(ranks.everywhere(part))
    referred = Scored(**reference.weights, perplexity=divergence.perplexity(compared.reference_nll))
    distance = vars(divergence.summarize(compared))
    return compared.nll, Comparison(**distance, reference=referred, noise_floor=reference.noise_floor)


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


def _warn_of_source(checkpoint: Checkpoint, reference: KeptReference) -> None:
    """Where both were made from different weights: a file's name doesn't say from which."""
    weights, source = reference.about["weights"], source_of(checkpoint)
    if source is not None and source not in (weights["identity"], reference.about["source"]):
        what = "warning: %s is of %s, and not of the weights that %s was made from"
        logger.warning(what, reference.path, weights["model"], checkpoint.model)


def _windows(checkpoint: Checkpoint, text: Text, settings: Settings) -> Windows:
    if checkpoint.config.is_classifier:
        fix = "perplexity needs a language model"
        raise InputError(f"is a {checkpoint.config.architecture}", where=checkpoint.model, fix=fix)
    ctx = settings.ctx or min(2048, checkpoint.config.trained_context)
    if not 8 <= ctx <= checkpoint.config.max_position_embeddings:
        limit = checkpoint.config.max_position_embeddings
        raise UsageError(f"--ctx {ctx} is out of range", fix=f"the model takes 8 to {limit}")
    tokenizer = checkpoint.tokenizer()
    stream = _encoded(tokenizer, text)
    tokenizer.check_ids(stream, checkpoint.config.vocab_size)
    windows = cut(stream, ctx, tokenizer.bos_id, settings.protocol, text.source, add_bos=tokenizer.add_bos)
    logger.info("%s: %d tokens, %d windows of %d", text.source, len(stream), len(windows.ids), ctx)
    return Windows(windows.ids[: settings.limit], windows.first)


@lru_cache(maxsize=4)  # a release scores one text with artifacts whose tokenizers are the same
def _encoded(tokenizer: Tokenizer, text: Text) -> np.ndarray:
    return tokenizer.encode(text.content)
