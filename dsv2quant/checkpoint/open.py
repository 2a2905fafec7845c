"""Opening a checkpoint: a folder, a GGUF file, or a hub id."""

from __future__ import annotations

import os
from pathlib import Path

from dsv2quant.checkpoint.checkpoint import Checkpoint, HfCheckpoint
from dsv2quant.errors import InputError, UsageError
from dsv2quant.storage import hub
from dsv2quant.storage.safetensors import check_index, read_json


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


def open_streamed(
    model: str | os.PathLike[str],
    out: Path,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
) -> HfCheckpoint:
    """Open a hub id whose shards are downloaded one by one into folder `out`, when `Checkpoint.stream` is asked for
    them. Raises UsageError for what is on this machine, and with `offline`, else as `open_checkpoint`."""
    name = os.fspath(model)
    if Path(name).exists() or name.endswith(".gguf"):
        raise UsageError(f"--stream-hub goes with a hub id: {name} is on this machine", fix="leave it out")
    if hub.is_offline(offline):
        raise UsageError("--stream-hub downloads shard by shard: it goes neither with --offline nor HF_HUB_OFFLINE")
    name, revision = hub.identify(name, revision)
    folder, stream = hub.stream(name, revision, None if cache_dir is None else os.fspath(cache_dir), out)
    check_index(folder, stream.headers)
    return HfCheckpoint.of_headers(
        name, read_json(folder / "config.json"), stream.headers, revision=stream.commit, folder=folder, stream=stream
    )
