"""Opening a checkpoint: a folder, a GGUF file, or a hub id."""

from __future__ import annotations

import os
from pathlib import Path

from dsv2quant.checkpoint.checkpoint import Checkpoint, HfCheckpoint
from dsv2quant.errors import InputError, UsageError
from dsv2quant.storage import hub


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
    headers_only: bool = False,
) -> Checkpoint:
    """Open a folder, a GGUF file (of split ones any), or a hub id, `owner/name` or `owner/name@REVISION` (downloaded
    unless `headers_only`). An existing path wins over a hub id.

    Raises InputError for whatever is missing, surplus, mis-shaped, truncated, overlapping or not understood, and
    UsageError for a revision of what has none.
    """
    name = os.fspath(model)
    folder = Path(name)
    is_gguf = name.endswith(".gguf") and not folder.is_dir()
    if revision is not None and (is_gguf or folder.exists()):
        raise UsageError(f"--revision goes with a hub id: {name} is on this machine", fix="leave it out")
    if is_gguf and "://" not in name:
        from dsv2quant.checkpoint.gguf import GgufCheckpoint

        return GgufCheckpoint.of_file(folder)
    if folder.is_dir():
        return HfCheckpoint.of_folder(folder, folder.resolve().name)
    if folder.exists():
        raise InputError("not a folder", where=name, fix="give the folder that holds config.json, or a .gguf file")
    name, revision = hub.identify(name, revision)
    if headers_only and not hub.is_offline(offline):
        raw_config, headers, commit = hub.read_headers(name, revision, cache_dir)
        return HfCheckpoint.of_headers(name, raw_config, headers, revision=commit)
    folder, commit = hub.download(name, revision, cache_dir, offline)
    return HfCheckpoint.of_folder(folder, name, commit)
