"""What an evaluation runs: a model over the windows, a reference with its noise floor, and the reference that is kept
of a model."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.identity import sampled
from dsv2quant.errors import InputError
from dsv2quant.evaluation import divergence
from dsv2quant.evaluation.divergence import Pass, batches_of, run
from dsv2quant.evaluation.keeping import Snapshots, claimed, made_already, snapshot_path
from dsv2quant.evaluation.reference import SCHEMA, KeptHead, KeptReference, Reference, write
from dsv2quant.evaluation.results import NoiseFloor
from dsv2quant.model.completion import open_model
from dsv2quant.model.layers import Linear
from dsv2quant.model.load import Loader, LoadOptions, choose_backend
from dsv2quant.progress import Progress
from dsv2quant.storage.durable import MANIFEST_FILE, disk_errors, tell_kept
from dsv2quant.storage.manifest import own_manifest
from dsv2quant.storage.safetensors import read_json, refuse_among_weights
from dsv2quant.text.text import Text
from dsv2quant.text.tokenizer import Protocol, Windows
from dsv2quant.version import __version__

FLOOR_WINDOWS = 8


@dataclass(frozen=True)
class Settings:
    """How to evaluate. `ctx` of None is 2048, or the context the model was trained for, and `batch` of None depends on
    it. `decode_path` scores token by token through absorbed attention, as decoding does; then the model's latent cache
    stores what `options` say, and the reference's the compute dtype. `max_ppl_increase`, in percent, and `max_kld`, in
    nats, are gates. `save` is where a reference is kept of the model."""

    options: LoadOptions
    ctx: int | None
    limit: int | None
    batch: int | None
    protocol: Protocol
    stream: bool
    decode_path: bool
    max_ppl_increase: float | None
    max_kld: float | None
    save: Path | None


def conditions_of(
    checkpoint: Checkpoint, windows: Windows, batch: int, text: Text, settings: Settings
) -> dict[str, Any]:
    """What is scored and how, as a kept reference says it."""
    options, device = settings.options, settings.options.device
    return {
        "schema": SCHEMA,
        "dsv2quant": __version__,
        "text": {"source": text.source, "sha256": text.sha256},
        "protocol": settings.protocol,
        "ctx": int(windows.ids.shape[1]),
        "first": windows.first,
        "windows": len(windows.ids),
        "batch": batch,
        "vocabulary": checkpoint.config.vocab_size,
        "layers": checkpoint.config.num_hidden_layers,
        "eps": checkpoint.config.rms_norm_eps,
        "dtype": str(options.dtype).removeprefix("torch."),
        "weight_only": options.weight_only or checkpoint.is_weight_only,
        "serving": options.serving,
        "decode_path": settings.decode_path,
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "backend": options.backend,
        "torch": torch.__version__,
    }


def kept_of(
    checkpoint: Checkpoint,
    path: Path,
    windows: Windows,
    conditions: dict[str, Any],
    settings: Settings,
    progress: Progress,
) -> KeptReference:
    """The model as a kept reference: what is at `path` already, or made now. Raises InputError where something else is
    there, and for a model whose logits are no plain product."""
    about = conditions | {"source": source_of(checkpoint)}
    wanted = about | {"weights": weights_of(checkpoint)}
    refuse_among_weights(path, checkpoint.inputs)
    made = made_already(path, wanted)
    with tell_kept(path, snapshot_path(path).exists), disk_errors(path), claimed(path, wanted) as snapshots:
        if made is None:
            ends = Loader(checkpoint, settings.options).ends()
            if not isinstance(ends.head, Linear) or ends.head.activation is not None:
                fix = "keep a reference of the unquantized model"
                raise InputError("its head takes quantized activations", where=checkpoint.model, fix=fix)
            head = KeptHead(ends.norm, ends.head.weight)
            _check_space(path, windows.ids.size * ends.norm.weight.nbytes, head.weight.nbytes)
            referred = refer(checkpoint, windows, conditions["batch"], settings, progress, snapshots)
            with progress(0, "", f"write {path.name}"):
                write(path, about, windows.ids, head, referred)
    with progress(0, "", f"read {path.name}"):
        return made or KeptReference.opened(path)


def _check_space(path: Path, states: int, head: int) -> None:
    """Raise InputError where the disk can't take the file, and two snapshots, one of which replaces the other: before
    hours go into them."""
    needed, free = 3 * states + head, shutil.disk_usage(path.parent).free
    if needed > free:
        what = f"takes at most {needed:,} bytes, the disk has {free:,} free"
        raise InputError(what, where=path, fix="free space, or give a file on another disk")


def refer(
    reference: Checkpoint,
    windows: Windows,
    batch: int,
    settings: Settings,
    progress: Progress,
    snapshots: Snapshots | None = None,
) -> Reference:
    """A model as a reference, whose cache is not FP8."""
    ids = windows.ids
    floor_ids = ids[:FLOOR_WINDOWS]
    # The reference also runs its first windows again, one at a time (or all at once): the kernels then round
    # differently, and what that alone does to the numbers is the floor under every comparison.
    again = batches_of(len(floor_ids), 1 if batch > 1 else len(floor_ids))
    both = [*batches_of(len(ids), batch), *(slice(len(ids) + b.start, len(ids) + b.stop) for b in again)]
    unquantized = replace(settings, options=replace(settings.options, kv_cache=None))
    every = np.concatenate([ids, floor_ids])
    passed = run_model(reference, every, both, unquantized, progress, f"reference {reference.model}", snapshots)
    floor = _noise_floor(reference, passed, floor_ids, windows.first, batch, unquantized, progress)
    return Reference(weights_of(reference), passed.part(slice(0, len(ids))), floor)


def run_model(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    batches: list[slice],
    settings: Settings,
    progress: Progress,
    label: str,
    snapshots: Snapshots | None = None,
) -> Pass:
    """A pass over windows `ids` [windows, ctx], which goes on from a snapshot and takes some where there are any."""
    model = open_model(checkpoint, settings.options, stream=settings.stream, progress=progress)
    go = partial(run, model, ids, batches, decode_path=settings.decode_path)
    with progress(ids.size * checkpoint.config.num_hidden_layers, "tok·layer", label) as advance:
        if snapshots is None:
            return go(advance)
        return go(advance, begun=snapshots.begun(settings.options.device), behind=snapshots.take)


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
    rerun = run_model(reference, ids, batches_of(count, batch), in_other, progress, "noise floor")
    with progress(2 * count * (ids.shape[1] - 1 - first), "tok", "compare noise") as advance:
        batched, typed = (divergence.compare(run, baseline, ids, first, advance).kld.mean() for run in (again, rerun))
    return NoiseFloor(count, float(batched), str(other).removeprefix("torch."), float(typed))


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which weights are measured, as `Scored` names them."""
    manifest = checkpoint.file(MANIFEST_FILE)
    return {
        "model": checkpoint.model,
        "revision": checkpoint.revision,
        "digest": read_json(manifest).get("plan") if manifest else None,
        "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest else None,
        "identity": sampled(checkpoint),
    }


def source_of(checkpoint: Checkpoint) -> str | None:
    """The identity of the weights that an artifact was made from, as its manifest has it; None without one."""
    match own_manifest(checkpoint.manifest):
        case {"source": {"identity": {"weights": str(identity)}}}:
            return identity
    return None
