"""What a conversion is made from: what tells one source from another, and whether it stayed the same meanwhile."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from dsv2quant.arch.config import ModelConfig
from dsv2quant.checkpoint.checkpoint import Checkpoint, HfCheckpoint
from dsv2quant.errors import InputError, listing
from dsv2quant.storage.processors import processors
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

    Of a checkpoint whose shards come one by one, `stats` have their hashes, `revision` its commit, and `identity` has
    no "weights" before the last shard was used: see `finished`.
    """

    identity: dict[str, Any]
    stats: list[list[object]]
    _changed: tuple[int, ...]
    revision: str | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, files: Mapping[str, bytes]) -> Source:
        """`files` are those beside the weights that the conversion takes along, by name."""
        stats, changed = checkpoint.fingerprint(), _changed(checkpoint)  # first: what changes from now on is seen
        config = json.dumps(checkpoint.raw_config, sort_keys=True).encode()
        contents = {"config.json": config} | dict(files)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        if _is_streamed(checkpoint):
            return cls({"files": hashes}, stats, (), checkpoint.revision)
        return cls({"weights": sampled(checkpoint), "files": hashes}, stats, changed)

    def finished(self, checkpoint: Checkpoint) -> Source:
        """With the whole identity, of a checkpoint whose shards were all used."""
        if not isinstance(checkpoint, HfCheckpoint) or checkpoint.stream is None:
            return self
        checkpoint.stream.show_samples()
        return replace(self, identity={"weights": sampled(checkpoint)} | self.identity)

    def differences(self, source: object) -> str | None:
        """In which way the source that an artifact recorded, its "identity" and "revision", is not this one; None where
        it is."""
        recorded = source.get("identity") if isinstance(source, dict) else None
        if (
            not isinstance(source, dict)
            or not isinstance(recorded, dict)
            or not isinstance(recorded.get("files"), dict)
        ):
            return "it does not say of which"
        found, files = recorded["files"], self.identity["files"]
        differing = sorted(name for name in found.keys() | files.keys() if found.get(name) != files.get(name))
        if "weights" in self.identity:
            same = recorded.get("weights") == self.identity["weights"]
        else:
            same = source.get("revision") == self.revision  # a commit is all of its files
        if not same:
            differing = ["the weights", *differing]
        if not differing:
            return None
        return f"{listing(differing)} {'differ' if len(differing) > 1 or differing[0] == 'the weights' else 'differs'}"

    def check_unchanged(self, checkpoint: Checkpoint) -> None:
        """Raise InputError where the weights changed since: the artifact would be a mixture."""
        if _is_streamed(checkpoint):
            return  # each shard had the hash that the hub has of it
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
    tensors = _tensors(checkpoint)
    count = _count(tensors)
    with ThreadPoolExecutor(min(8, processors())) as workers:
        digests = workers.map(partial(_sampled, checkpoint, count), tensors)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _sampled(checkpoint: Checkpoint, count: int, parts: Iterable[StoredTensor]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps([part.name, part.dtype, part.shape]).encode())
        digest.update(checkpoint.pieces(part, _samples(part, count)).data)
    return digest.digest()


def _samples(part: StoredTensor, count: int) -> list[tuple[int, int]]:
    """(first byte, how many) of what is read of a stored tensor."""
    if part.nbytes <= count * SAMPLE:
        return [(0, part.nbytes)]
    return [(i * (part.nbytes - SAMPLE) // (count - 1), SAMPLE) for i in range(count)]


def sampled_bytes(checkpoint: Checkpoint) -> dict[str, list[tuple[int, int]]]:
    """{file: (first byte of its data, how many) of all that `sampled` reads of it}."""
    tensors = _tensors(checkpoint)
    count = _count(tensors)
    found: dict[str, list[tuple[int, int]]] = {file: [] for file in checkpoint.files}
    for part in itertools.chain.from_iterable(tensors):
        found[part.file] += [(part.begin + begin, nbytes) for begin, nbytes in _samples(part, count)]
    return found


def _tensors(checkpoint: Checkpoint) -> list[list[StoredTensor]]:
    """What a checkpoint stores: the parts of each weight, and each tensor beside the language model."""
    return [[*weight.parts.values()] for weight in checkpoint.weights] + [[tensor] for tensor in checkpoint.others]


def _count(tensors: Sequence[Sequence[StoredTensor]]) -> int:
    """How many samples are taken of each."""
    return max(2, min(_MOST, _SAMPLES // max(1, sum(map(len, tensors)))))


def _is_streamed(checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint, HfCheckpoint) and checkpoint.stream is not None


def _changed(checkpoint: Checkpoint) -> tuple[int, ...]:
    """When each file was last changed in whatever way (ctime), which can't be set back."""
    return tuple(os.stat(path).st_ctime_ns for path, _ in checkpoint.data.values())
