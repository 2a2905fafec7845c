"""The error of an artifact's tensors against its source: both are read, decoded and compared piece by piece, a piece
being so many rows that what is computed of it stays in a core's cache.

Checking an artifact: its files against the manifest, its tensors against its plan. Of a GGUF file that has no
manifest the scales of its blocks are looked at.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv2quant.arch.spec import ROLES, TensorSpec
from dsv2quant.checkpoint.checkpoint import Checkpoint, Weight
from dsv2quant.errors import InputError, listing
from dsv2quant.evaluation.results import Checked, RoleErrors, SourceErrors, TensorError, Verification, sqnr
from dsv2quant.formats.codec import ROWS_APART
from dsv2quant.planning.smoothing import SMOOTHING_FILE, Smoothing
from dsv2quant.progress import Progress
from dsv2quant.storage.card import is_persons
from dsv2quant.storage.durable import hash_file, hash_together
from dsv2quant.storage.manifest import CARD_FILE, check_regular, is_text, own_manifest, read_manifest
from dsv2quant.storage.processors import processors
from dsv2quant.storage.verified import record

MAX_IN_FLIGHT = 256 << 20  # bytes of stored weights that are being compared
PIECE = {"cpu": 1 << 18}  # weights of a piece
PIECE_OF_DEVICE = 1 << 24
AT_ONCE = 8 << 20  # bytes of a tensor beside the language model
# Columns that share a scale in every scheme, and one in how many rows is looked at for wrong scales. Rounding's errors
# have 1/16 in common with what they are errors of, in FP8, whose errors grow with the value, 0.21 at most (measured on
# dsv2-mini, in all schemes and GGUF types); errors of wrong scales nearly all.
TILE, SAMPLED_ROWS = 16, 8


def verify(artifact: Checkpoint, source: Checkpoint | None, device: str, progress: Progress) -> Verification:
    """Check an artifact's files and, with the checkpoint it was made from, measure its tensors' errors on `device`.
    Raises InputError as `check_layout`, `check`, `compare_tensors` and `compare_others` do."""
    if source is not None:
        check_layout(artifact, source)
    checked = check(artifact, progress, has_source=source is not None)
    errors = None
    if source is not None:
        with progress(bytes_compared(artifact, source), "B", "errors") as advance:
            errors = summarize(artifact, compare_tensors(artifact, source, advance, device))
            compare_others(artifact, source, advance)
    return Verification(artifact.model, checked, len(artifact.weights), errors)


def note_verified(artifact: Checkpoint, source: Checkpoint, found: Verification) -> None:
    """Note beside an artifact's manifest that its files and, with `source`, its weights are as they must be."""
    assert found.errors is not None
    lossy = [role.lowest_sqnr_db for role in found.errors.roles if not role.exact]
    said = {"model": source.model, "revision": source.revision, "decoded_dtype": found.errors.decoded_dtype}
    record(artifact.manifest, "source", said | {"lowest_sqnr_db": min(lossy, default=None)})


def check_layout(artifact: Checkpoint, source: Checkpoint) -> None:
    """Raise InputError where artifact and source are not the same model."""
    ours = {w.spec.name: w.spec.shape for w in artifact.weights}
    theirs = {w.spec.name: w.spec.shape for w in _held(source, artifact)}
    if artifact.others:
        ours |= {tensor.name: tensor.shape for tensor in artifact.others}
        theirs |= {tensor.name: tensor.shape for tensor in source.others}
    differing = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    if differing:
        what = f"{source.model} is another model: {listing(sorted(differing))}"
        raise InputError(what, where=artifact.model, fix="give the checkpoint it was made from")


def _held(source: Checkpoint, artifact: Checkpoint) -> list[Weight]:
    """The source's weights that such an artifact has."""
    return [w for w in source.weights if not (w.spec.is_prediction and artifact.leaves_out_prediction)]


def bytes_compared(artifact: Checkpoint, source: Checkpoint) -> int:
    """What `compare_tensors` and `compare_others` read."""
    read = sum(weight.nbytes for weight in (*artifact.weights, *_held(source, artifact)))
    return read + 2 * sum(tensor.nbytes for tensor in artifact.others)


def compare_others(artifact: Checkpoint, source: Checkpoint, progress: Callable[[int], object]) -> None:
    """Raise InputError where what an artifact has beside its language model is not the source's, byte for byte."""
    theirs = {tensor.name: tensor for tensor in source.others}
    for tensor in artifact.others:
        exact = theirs[tensor.name]
        same = tensor.dtype == exact.dtype
        for begin in range(0, tensor.nbytes if same else 0, AT_ONCE):
            nbytes = min(AT_ONCE, tensor.nbytes - begin)
            same = same and np.array_equal(artifact.read(tensor, begin, nbytes), source.read(exact, begin, nbytes))
            progress(2 * nbytes)
        if not same:
            what = f"{tensor.name} is not as it is in {source.model}, though it is no weight of the language model"
            raise InputError(what, where=artifact.model, fix="give the checkpoint it was made from, or convert again")


def compare_tensors(
    artifact: Checkpoint, source: Checkpoint, progress: Callable[[int], object], device: str = "cpu"
) -> list[TensorError]:
    """The error of every weight as consumers decode it (`served_dtype`), against the source's exact values, folded as
    in the artifact."""
    wanted = {w.spec.name: w for w in source.weights}
    factors = artifact.file(SMOOTHING_FILE)
    smoothing = Smoothing({}) if factors is None else Smoothing.open(factors, artifact.config)
    running: deque[tuple[int, Future[TensorError]]] = deque()
    errors = []

    def finish_oldest() -> None:
        nbytes, future = running.popleft()
        errors.append(future.result())
        progress(nbytes)

    with _single_threaded(), ThreadPoolExecutor(min(16, processors()) if device == "cpu" else 2) as workers:
        try:
            for weight in artifact.weights:
                exact = wanted[weight.spec.name]
                nbytes = weight.nbytes + exact.nbytes
                while running and sum(held for held, _ in running) + nbytes > MAX_IN_FLIGHT:
                    finish_oldest()
                future = workers.submit(_tensor_error, artifact, weight, source, exact, smoothing, device)
                running.append((nbytes, future))
            while running:
                finish_oldest()
        finally:
            workers.shutdown(wait=False, cancel_futures=True)
    return errors


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Threads within torch's operations would wait for those that compare other tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tensor_error(
    artifact: Checkpoint, weight: Weight, source: Checkpoint, wanted: Weight, smoothing: Smoothing, device: str
) -> TensorError:
    rows = weight.spec.shape[0]
    step = PIECE.get(device, PIECE_OF_DEVICE) * rows // weight.spec.size
    step = max(step // ROWS_APART, 1) * ROWS_APART
    decoded = artifact.row_decoder(weight, getattr(torch, artifact.served_dtype), device)
    exact = source.row_decoder(wanted, torch.float32, device)
    signal = noise = largest = sampled = scales = 0.0
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        x = _smoothed(exact(begin, end), smoothing, weight.spec, begin)
        difference = torch.sub(decoded(begin, end).float(), x)
        furthest = max(abs(float(extreme)) for extreme in torch.aminmax(difference))  # NaN is both
        if not math.isfinite(furthest):
            what = f"{weight.spec.name} is NaN or infinite, there or in {source.model}"
            raise InputError(what, where=artifact.model, fix="one of them is damaged: get it again, or convert again")
        signal += _squares(x)
        if furthest:
            noise += _squares(difference)
            largest = max(largest, furthest)
            of_scales, of_all = _of_scales(x[::SAMPLED_ROWS], difference[::SAMPLED_ROWS])
            scales, sampled = scales + of_scales, sampled + of_all
    share = scales / sampled if sampled else 0.0
    spec, bits = weight.spec, 8 * weight.nbytes / weight.spec.size
    return TensorError(
        spec.name, spec.role, spec.layer, weight.stored_scheme, bits, signal, noise, largest, share
    )  # fmt: skip


def _of_scales(x: torch.Tensor, difference: torch.Tensor) -> tuple[float, float]:
    """(the noise that another scale for each `TILE` columns would take away, all noise), sums of squares over rows of
    x and of what was decoded less x [rows, columns]."""
    if x.ndim != 2 or x.shape[1] < TILE:
        return 0.0, 0.0
    x, noise = (t[:, : t.shape[1] // TILE * TILE].reshape(-1, TILE).double() for t in (x, difference))
    decoded = x + noise
    # The best factor leaves noise without what it has in common with `decoded`.
    common = (noise * decoded).sum(1).square() / decoded.square().sum(1).clamp_min(1e-300)
    return float(common.sum()), float(noise.square().sum())


def _squares(x: torch.Tensor) -> float:
    """The sum of squares, in float64 where float32 does not hold it."""
    x = x.reshape(-1)
    total = float(torch.dot(x, x))
    return total if 1e-30 < total < math.inf else float(x.double().square().sum())


def _smoothed(x: torch.Tensor, smoothing: Smoothing, spec: TensorSpec, begin: int) -> torch.Tensor:
    """Rows of a weight from `begin` as they were quantized. The factors are powers of two."""
    rows, columns = smoothing.rows(spec), smoothing.columns(spec)
    for exponents in (
        None if rows is None else rows[begin : begin + len(x)].reshape(-1, *(1,) * (x.ndim - 1)), columns
    ):  # fmt: skip
        if exponents is not None:
            x = x * torch.from_numpy(np.ldexp(np.float32(1), exponents)).to(x.device)
    return x


WORST = 5


def check(artifact: Checkpoint, progress: Progress, has_source: bool = False) -> Checked:
    """Check the files of an artifact. Raises InputError naming the first that is not as its manifest says, that the
    manifest does not list though consumers load it, or whose scales are not finite; also where a folder is no artifact
    of ours and, its source not given, nothing could be checked."""
    manifest = artifact.manifest
    if not os.path.lexists(manifest):
        by = artifact.check_unlisted(progress, has_source)
        return Checked(by, {x: {"size": path.stat().st_size, "sha256": None} for x, (path, _) in artifact.data.items()})
    smoothing = [SMOOTHING_FILE] if artifact.file(SMOOTHING_FILE) else []
    checked = _by_manifest(manifest, [*artifact.listed_files(), *smoothing], progress)
    return replace(checked, added=artifact.check_added([*checked.files]))


def _by_manifest(path: Path, needed: Sequence[str], progress: Progress) -> Checked:
    """Hash every file of a manifest, which must list those `needed`."""
    folder = path.parent
    check_regular(path, folder)
    manifest = read_manifest(path)
    files: dict[str, dict[str, Any]] = manifest["files"]
    if unlisted := [file for file in needed if file not in files]:
        raise InputError(f"does not list {listing(unlisted)}", where=path, fix="convert again")
    for name, entry in files.items():
        check_regular(folder / name, folder)
        size = (folder / name).stat().st_size
        if size != entry["size"] and not is_text(name):
            what = f"has {size:,} bytes; the manifest says {entry['size']:,}"
            raise InputError(what, where=folder / name, fix="get it again")
    total = sum(entry["size"] for entry in files.values())
    with progress(total, "B", "checksums") as advance:
        edited = [name for name in hash_together(partial(_edited, folder), files.items(), advance) if name]
    plan = manifest.get("plan")
    return Checked("manifest", files, plan if isinstance(plan, str) else None, edited)


def _edited(folder: Path, listed: tuple[str, dict[str, Any]], progress: Callable[[int], object]) -> str | None:
    """The name of a listed file if it was edited, as texts may be. Raises InputError where it is another file."""
    name, entry = listed
    try:
        same = hash_file(folder / name, progress) == entry
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", where=folder / name, fix="get it again") from None
    if not same and not is_text(name):
        raise InputError("its sha256 differs from the manifest", where=folder / name, fix="get it again")
    # A card with measurements is written when the artifact is whole already.
    return None if same or (name == CARD_FILE and not is_persons(folder / name)) else name


def summarize(artifact: Checkpoint, errors: Sequence[TensorError]) -> SourceErrors:
    """Errors by role and scheme, of all tensors, and the worst."""
    groups: dict[tuple[str, str], list[TensorError]] = {}
    for error in errors:
        groups.setdefault((error.role, error.scheme), []).append(error)
    ordered = sorted(groups.items(), key=lambda item: (ROLES.index(item[0][0]), item[0][1]))
    roles = [
        RoleErrors(
            role,
            scheme,
            tensors=len(members),
            exact=not any(e.noise for e in members),
            sqnr_db=sqnr(sum(e.signal for e in members), sum(e.noise for e in members)),
            lowest_sqnr_db=min(e.sqnr for e in members),
            max_error=max(e.max_error for e in members),
        )
        for (role, scheme), members in ordered
    ]
    noisy = sorted((e for e in errors if e.noise), key=lambda e: e.sqnr)
    tuned = bool(((own_manifest(artifact.manifest) or {}).get("tuned") or {}).get("accepted"))
    wrong = [e for e in noisy if e.is_wrong(tuned=tuned)]
    return SourceErrors(artifact.served_dtype, roles, list(errors), noisy[:WORST], wrong)
