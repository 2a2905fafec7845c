"""What a conversion is made from: what tells one source from another, and whether it stayed the same meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from dsv2quant.arch.config import ModelConfig
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.errors import InputError, listing
from dsv2quant.storage.safetensors import StoredTensor

SAMPLE = 4096  # bytes
_SAMPLES = 1 << 15  # of a model, about
_MOST = 16  # of one stored tensor


@dataclass(frozen=True)
class Source:
    """A checkpoint as it was when its conversion began.

    `identity` is what artifacts record: {"weights": sha256 of names, dtypes, shapes and samples, "files": {name:
    sha256} of the configuration and all that is copied or read beside it}. Samples are 4 KiB each, 2 to 16 of every
    stored tensor, spread from its first byte to its last; a tensor no larger than its samples is read whole. So other
    or trained weights always differ; a change that keeps sizes and times and hits no sample is not seen.
    `stats` are sizes and times of the shards, which also must stay while a conversion is unfinished.
    """

    identity: dict[str, Any]
    stats: list[list[object]]
    _changed: tuple[int, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, files: Mapping[str, bytes]) -> Source:
        """`files` are those beside the weights that the conversion takes along, by name."""
        stats, changed = checkpoint.fingerprint(), _changed(checkpoint)  # first: what changes from now on is seen
        config = json.dumps(checkpoint.raw_config, sort_keys=True).encode()
        contents = {"config.json": config} | dict(files)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        return cls({"weights": sampled(checkpoint), "files": hashes}, stats, changed)

    def differences(self, recorded: object) -> str | None:
        """In which way the identity that an artifact recorded is not this source's; None where it is."""
        if recorded == self.identity:
            return None
        if not isinstance(recorded, dict) or not isinstance(recorded.get("files"), dict):
            return "it does not say of which"
        found, files = recorded["files"], self.identity["files"]
        differing = sorted(name for name in found.keys() | files.keys() if found.get(name) != files.get(name))
        if recorded.get("weights") != self.identity["weights"]:
            differing = ["the weights", *differing]
        return f"{listing(differing)} {'differ' if len(differing) > 1 or differing[0] == 'the weights' else 'differs'}"

    def check_unchanged(self, checkpoint: Checkpoint) -> None:
        """Raise InputError where the weights changed since: the artifact would be a mixture."""
        same = checkpoint.fingerprint() == self.stats
        # Another time of change may be a new link or new rights alone: then the samples tell.
        if same and _changed(checkpoint) != self._changed:
            same = sampled(checkpoint) == self.identity["weights"]
        if not same:
            what = "its weights changed while they were converted"
            raise InputError(what, where=checkpoint.model, fix="convert again with --force when they stay as they are")


def configured(config: ModelConfig) -> str:
    """sha256 of all that was read of a model's configuration."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()


def sampled(checkpoint: Checkpoint) -> str:
    """sha256 of names, dtypes, shapes and samples of all stored tensors; how they are spread over shards is the same
    to it."""
    tensors = [[*weight.parts.values()] for weight in checkpoint.weights]
    tensors += [[tensor] for tensor in checkpoint.others]
    count = max(2, min(_MOST, _SAMPLES // max(1, sum(map(len, tensors)))))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers:
        digests = workers.map(partial(_sampled, checkpoint, count), tensors)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _sampled(checkpoint: Checkpoint, count: int, parts: Iterable[StoredTensor]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps([part.name, part.dtype, part.shape]).encode())
        if part.nbytes <= count * SAMPLE:
            digest.update(checkpoint.read(part).data)
            continue
        for i in range(count):
            digest.update(checkpoint.read(part, i * (part.nbytes - SAMPLE) // (count - 1), SAMPLE).data)
    return digest.digest()


def _changed(checkpoint: Checkpoint) -> tuple[int, ...]:
    """When each file was last changed in whatever way (ctime), which can't be set back."""
    return tuple(os.stat(path).st_ctime_ns for path, _ in checkpoint.data.values())
