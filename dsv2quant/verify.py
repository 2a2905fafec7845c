"""Checking an artifact: its files against the manifest, its tensors against its plan, its error against the source. A
GGUF file has neither manifest nor plan: there the scales of its blocks are looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dsv2quant.checkpoint import Checkpoint, Weight
from dsv2quant.errors import InputError, listing
from dsv2quant.files import is_artifact_path
from dsv2quant.folds import FOLDS_FILE, Folds
from dsv2quant.headers import read_json
from dsv2quant.model.load import decode
from dsv2quant.names import ROLES
from dsv2quant.writer import MANIFEST_FILE, STATE_FILE, hash_file

WORST = 5


@dataclass(frozen=True)
class TensorError:
    """Error of one decoded weight against its source: signal and noise are sums of squares."""

    name: str
    role: str
    scheme: str
    signal: float
    noise: float
    max_error: float

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise in dB; infinite where the weight is exact."""
        return sqnr(self.signal, self.noise)


def sqnr(signal: float, noise: float) -> float:
    """10 · log10(signal / noise); infinite without noise."""
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def check_files(artifact: Checkpoint, progress: Callable[[int], object]) -> dict[str, Any]:
    """Every file of the manifest at its size and sha256; returns the manifest. Raises InputError naming the first
    that differs, or that the manifest does not know."""
    folder = artifact.folder
    assert folder is not None
    if (folder / STATE_FILE).exists():
        raise InputError("the conversion is unfinished", where=folder, fix="run the same `convert` again")
    manifest = read_json(folder / MANIFEST_FILE)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise InputError("lists no files", where=folder / MANIFEST_FILE, fix="convert again")
    unknown = [file for file in artifact.files if file not in files]
    if unknown:
        raise InputError(f"does not list {listing(unknown)}", where=folder / MANIFEST_FILE, fix="convert again")
    for name, entry in files.items():
        if not is_artifact_path(name) or not (folder / name).is_file():
            raise InputError(f"{name} is missing", where=folder, fix="get it again, or convert again")
        if hash_file(folder / name) != entry:
            raise InputError("size or sha256 differs from the manifest", where=folder / name, fix="get it again")
        progress(entry["size"])
    return manifest


def check_blocks(artifact: Checkpoint, progress: Callable[[int], object]) -> None:
    """Read every weight of a GGUF file. Raises InputError at the first scale or plain value that is NaN or infinite."""
    from dsv2quant.formats.gguf.blocks import first_bad_block

    for weight in artifact.weights:
        for part in weight.parts.values():
            bad = first_bad_block(part.dtype, artifact.read(part))
            if bad is not None:
                what = f"{part.name}: block {bad:,} of {weight.slot.name} has a scale that is NaN or infinite"
                raise InputError(what, where=artifact.data[part.file][0], fix="get the file again, or convert again")
            progress(part.nbytes)


def check_layout(artifact: Checkpoint, source: Checkpoint) -> None:
    """Raise InputError where artifact and source are not the same model."""
    ours = {w.slot.name: w.slot.shape for w in artifact.weights}
    theirs = {w.slot.name: w.slot.shape for w in source.weights}
    differing = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    if differing:
        what = f"{source.model} is another model: {listing(sorted(differing))}"
        raise InputError(what, where=artifact.model, fix="give the checkpoint it was made from")


def compare_tensors(artifact: Checkpoint, source: Checkpoint, progress: Callable[[int], object]) -> list[TensorError]:
    """The error of every weight as consumers decode it (`decoded_dtype`), against the source's exact values, folded as
    in the artifact."""
    wanted = {w.slot.name: w for w in source.weights}
    folds = Folds({}) if artifact.folder is None else Folds.open(artifact.folder / FOLDS_FILE)
    errors = []
    for weight in artifact.weights:
        errors.append(_tensor_error(artifact, weight, source, wanted[weight.slot.name], folds))
        progress(weight.nbytes)
    return errors


def decoded_dtype(artifact: Checkpoint) -> torch.dtype:
    """BF16, in which DeepSeek-V2 is served; float32 of a GGUF file's blocks, which llama.cpp multiplies as they are."""
    return torch.bfloat16 if artifact.metadata is None else torch.float32


def _tensor_error(
    artifact: Checkpoint, weight: Weight, source: Checkpoint, wanted: Weight, folds: Folds
) -> TensorError:
    exact = torch.from_numpy(folds.apply(wanted.slot, decode(source, wanted, torch.float32).numpy()))
    difference = decode(artifact, weight, decoded_dtype(artifact)).float() - exact
    signal, noise = (float(x.double().square().sum()) for x in (exact, difference))
    largest = float(difference.abs().max())
    return TensorError(weight.slot.name, weight.slot.role, weight.stored_scheme, signal, noise, largest)


def report(manifest: dict[str, Any] | None, artifact: Checkpoint, errors: list[TensorError] | None) -> dict[str, Any]:
    """The object of `verify --json`; an exact weight has infinite SQNR, which JSON shows as null. A GGUF file has
    no manifest."""
    result: dict[str, Any] = {
        "schema": "dsv2quant.verify/1",
        "artifact": artifact.model,
        "files": len(manifest["files"] if manifest else artifact.files),
        "tensors": len(artifact.weights),
        "plan": manifest.get("plan") if manifest else None,
        "checked": "manifest" if manifest else "blocks",
    }
    if errors is None:
        return result
    groups: dict[tuple[str, str], list[TensorError]] = {}
    for error in errors:
        groups.setdefault((error.role, error.scheme), []).append(error)
    ordered = sorted(groups.items(), key=lambda item: (ROLES.index(item[0][0]), item[0][1]))
    result["decoded_dtype"] = str(decoded_dtype(artifact)).removeprefix("torch.")
    result["roles"] = [
        {
            "role": role,
            "scheme": scheme,
            "tensors": len(members),
            "sqnr_db": sqnr(sum(e.signal for e in members), sum(e.noise for e in members)),
            "lowest_sqnr_db": min(e.sqnr for e in members),
            "max_error": max(e.max_error for e in members),
        }
        for (role, scheme), members in ordered
    ]
    worst = sorted((e for e in errors if e.noise), key=lambda e: e.sqnr)[:WORST]
    result["worst"] = [
        {"tensor": e.name, "scheme": e.scheme, "sqnr_db": e.sqnr, "max_error": e.max_error} for e in worst
    ]
    return result
