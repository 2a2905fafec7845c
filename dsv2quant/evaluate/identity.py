"""Which weights a measurement was made of."""

from __future__ import annotations

import hashlib
from typing import Any

from dsv2quant.checkpoint import Checkpoint
from dsv2quant.headers import read_json
from dsv2quant.source import sampled
from dsv2quant.writer import MANIFEST_FILE


def identify(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells this model from every other: the hub's commit, the digest of an artifact's plan and the sha256 of its
    manifest, which holds that of every file; each None where there is none; and `sampled`."""
    path = checkpoint.folder / MANIFEST_FILE if checkpoint.folder is not None else None
    manifest = path if path is not None and path.exists() else None
    return {
        "revision": checkpoint.revision,
        "digest": read_json(manifest).get("plan") if manifest else None,
        "manifest_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest else None,
        "identity": sampled(checkpoint),
    }
