"""Checking an artifact: its files against the manifest, its tensors against its plan. Of a GGUF file that has no
manifest the scales of its blocks are looked at. `compare.py` measures its error."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dsv2quant.checkpoint import Checkpoint
from dsv2quant.compare import TensorError, decoded_dtype, sqnr
from dsv2quant.errors import InputError, listing
from dsv2quant.folds import FOLDS_FILE
from dsv2quant.headers import INDEX_FILE
from dsv2quant.manifest import beside, check_regular, gguf_manifest, is_text, read_manifest
from dsv2quant.names import ROLES
from dsv2quant.progress import Progress
from dsv2quant.writer import MANIFEST_FILE, STATE_FILE, hash_file

WORST = 5


@dataclass(frozen=True)
class Checked:
    """What of an artifact was checked: its files by the 'manifest', a GGUF file's 'blocks' or, of a checkpoint that
    isn't ours, 'nothing'. `files` are the manifest's entries, or sizes alone; `edited` are texts that differ from it,
    `added` names of files that it does not list and no consumer loads."""

    by: Literal["manifest", "blocks", "nothing"]
    files: dict[str, dict[str, Any]]
    plan: str | None = None
    edited: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)


def check(artifact: Checkpoint, progress: Progress, has_source: bool = False) -> Checked:
    """Check the files of an artifact. Raises InputError naming the first that is not as its manifest says, that the
    manifest does not list though consumers load it, or whose scales are not finite; also where a folder is no artifact
    of ours and, its source not given, nothing could be checked."""
    if artifact.metadata is not None:
        first = artifact.data[artifact.files[0]][0]
        manifest = gguf_manifest(first)
        if os.path.lexists(manifest):
            return _by_manifest(manifest, artifact.files, progress)
        check_blocks(artifact, progress)
        return Checked("blocks", _sizes(artifact))
    folder = artifact.folder
    assert folder is not None
    if (folder / STATE_FILE).exists():
        raise InputError("the conversion is unfinished", where=folder, fix="run the same `convert` again")
    if not os.path.lexists(folder / MANIFEST_FILE):
        if has_source and artifact.config.quantization is not None:
            return Checked("nothing", _sizes(artifact))
        what = f"is no artifact of dsv2quant: it has no {MANIFEST_FILE}"
        fix = "`dsv2quant inspect` shows what it holds; of a quantized one, --source measures the error"
        raise InputError(what, where=folder, fix=fix)
    needed = [*artifact.files, "config.json", *(name for name in (INDEX_FILE, FOLDS_FILE) if (folder / name).exists())]
    checked = _by_manifest(folder / MANIFEST_FILE, needed, progress)
    loaded, added = beside(folder, checked.files.keys() | {MANIFEST_FILE})
    if loaded:
        what = f"holds {listing(loaded)}, which its manifest does not list and programs may load"
        raise InputError(what, where=folder, fix="remove what was added")
    return Checked("manifest", checked.files, checked.plan, checked.edited, added)


def _by_manifest(path: Path, needed: Sequence[str], progress: Progress) -> Checked:
    """Hash every file of a manifest, which must list those `needed`."""
    folder = path.parent
    check_regular(path, folder)
    manifest = read_manifest(path)
    files: dict[str, dict[str, Any]] = manifest["files"]
    if unlisted := [file for file in needed if file not in files]:
        raise InputError(f"does not list {listing(unlisted)}", where=path, fix="convert again")
    edited = []
    for name, entry in files.items():
        check_regular(folder / name, folder)
        size = (folder / name).stat().st_size
        if size != entry["size"] and not is_text(name):
            what = f"has {size:,} bytes; the manifest says {entry['size']:,}"
            raise InputError(what, where=folder / name, fix="get it again")
    total = sum(entry["size"] for entry in files.values())
    workers = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    with progress(total, "B", "checksums") as advance, workers:
        found = {name: workers.submit(hash_file, folder / name, advance) for name in files}
        for name, future in found.items():
            try:
                same = future.result() == files[name]
            except OSError as error:
                workers.shutdown(wait=False, cancel_futures=True)
                what = f"can't be read: {error.strerror}"
                raise InputError(what, where=folder / name, fix="get it again") from None
            if not same and not is_text(name):
                workers.shutdown(wait=False, cancel_futures=True)
                raise InputError("its sha256 differs from the manifest", where=folder / name, fix="get it again")
            edited += [name] * (not same)
    plan = manifest.get("plan")
    return Checked("manifest", files, plan if isinstance(plan, str) else None, edited)


def _sizes(artifact: Checkpoint) -> dict[str, dict[str, Any]]:
    return {name: {"size": path.stat().st_size, "sha256": None} for name, (path, _) in artifact.data.items()}


def check_blocks(artifact: Checkpoint, progress: Progress) -> None:
    """Read every weight of a GGUF file. Raises InputError at the first scale or plain value that is NaN or infinite."""
    from dsv2quant.formats.gguf.blocks import first_bad_block

    with progress(sum(weight.nbytes for weight in artifact.weights), "B", "scales") as advance:
        for weight in artifact.weights:
            for part in weight.parts.values():
                bad = first_bad_block(part.dtype, artifact.read(part))
                if bad is not None:
                    what = f"{part.name}: block {bad:,} of {weight.slot.name} has a scale that is NaN or infinite"
                    raise InputError(
                        what, where=artifact.data[part.file][0], fix="get the file again, or convert again"
                    )
                advance(part.nbytes)


def report(checked: Checked, artifact: Checkpoint, errors: list[TensorError] | None) -> dict[str, Any]:
    """The object of `verify --json`. What is `exact` has infinite SQNR, which JSON shows as null."""
    result: dict[str, Any] = {
        "schema": "dsv2quant.verify/2",
        "model": artifact.model,
        "checked": checked.by,
        "digest": checked.plan,
        "files": checked.files,
        "edited": checked.edited,
        "added": checked.added,
        "tensors": len(artifact.weights),
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
            "exact": not any(e.noise for e in members),
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
