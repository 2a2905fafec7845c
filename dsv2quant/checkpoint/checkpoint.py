"""A checkpoint: its configuration, and an index over the headers of its safetensors shards or GGUF files.

Opening reads headers only and compares them with the complete list of tensors that the configuration implies; a
weight's bytes are read when asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.deepseek_v2 import architecture
from dsv2quant.checkpoint.spellings import as_published
from dsv2quant.checkpoint.weights import (
    Weight,
    check_declared,
    check_quantization,
    index_tensors,
    match,
    take_kv_scales,
)
from dsv2quant.errors import InputError, UsageError, listing, printable
from dsv2quant.formats.fp8 import decode_block_to_float32
from dsv2quant.formats.quant_config import readable_codecs
from dsv2quant.storage import hub
from dsv2quant.storage.files import AGAIN, reading
from dsv2quant.storage.safetensors import StoredTensor, check_index, read_header, read_json, shard_files

if TYPE_CHECKING:
    from dsv2quant.storage.gguf import Metadata

logger = logging.getLogger(__name__)
_NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F8_E4M3": np.uint8}


@dataclass(eq=False)
class Checkpoint:
    """An opened checkpoint. Reads are thread-safe and go to the file system each time: nothing is cached.

    `folder` is its folder in Hugging Face layout; None of a GGUF file, which has `metadata` instead. `data` is where
    each file lies and where its data begins; empty where weights were not downloaded. `kv_scales` holds the KV-cache
    scale of each layer's keys, where the checkpoint has them.
    """

    model: str
    raw_config: dict[str, Any]
    config: ModelConfig
    weights: list[Weight]
    files: list[str]
    data: Mapping[str, tuple[Path, int]]
    folder: Path | None = None
    revision: str | None = None
    kv_scales: Mapping[int, StoredTensor] = field(default_factory=dict)
    metadata: Metadata | None = None

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        offline: bool = False,
        headers_only: bool = False,
    ) -> Checkpoint:
        """Open a folder, a GGUF file (of split ones any), or a hub id, `owner/name` or `owner/name@REVISION`
        (downloaded unless `headers_only`). An existing path wins over a hub id.

        Raises InputError for whatever is missing, surplus, mis-shaped, truncated, overlapping or not understood, and
        UsageError for a revision of what has none.
        """
        name = os.fspath(model)
        folder = Path(name)
        is_gguf = name.endswith(".gguf") and not folder.is_dir()
        if revision is not None and (is_gguf or folder.exists()):
            raise UsageError(f"--revision goes with a hub id: {name} is on this machine", fix="leave it out")
        if is_gguf and "://" not in name:
            return cls._of_gguf(folder)
        commit = None
        if not folder.exists():
            name, revision = hub.identify(name, revision)
            if headers_only and not hub.is_offline(offline):
                raw_config, headers, commit = hub.read_headers(name, revision, cache_dir)
                return cls._of_headers(name, None, commit, raw_config, headers, {})
            folder, commit = hub.download(name, revision, cache_dir, offline)
        elif not folder.is_dir():
            fix = "give the folder that holds config.json, or a .gguf file"
            raise InputError("not a folder", where=name, fix=fix)
        else:
            name = folder.resolve().name
        raw_config = read_json(folder / "config.json")
        ModelConfig.from_dict(raw_config, folder / "config.json")  # another model is not asked for its shards
        headers, data = {}, {}
        for file in shard_files(folder):
            headers[file], start = read_header(folder / file)
            data[file] = (folder / file, start)
        check_index(folder, headers)
        return cls._of_headers(name, folder, commit, raw_config, headers, data)

    @classmethod
    def _of_headers(
        cls,
        model: str,
        folder: Path | None,
        revision: str | None,
        raw_config: dict[str, Any],
        headers: Mapping[str, Mapping[str, Any]],
        data: Mapping[str, tuple[Path, int]],
    ) -> Checkpoint:
        where = folder if folder is not None else model
        config = ModelConfig.from_dict(raw_config, f"{where}/config.json")
        check_quantization(config.quantization, where)
        tensors = as_published(index_tensors(headers, where), config, where)
        logger.info("%s: %d tensors in %d files", model, len(tensors), len(headers))
        kv_scales = take_kv_scales(config, tensors, where)
        weights = match(architecture(config).specs(), tensors, readable_codecs(config.quantization), where)
        check_declared(weights, config.quantization, where)
        return cls(printable(model), raw_config, config, weights, sorted(headers), data, folder, revision, kv_scales)

    @classmethod
    def _of_gguf(cls, path: Path) -> Checkpoint:
        from dsv2quant.checkpoint.gguf import open_files

        found = open_files(path)
        data = {file.path.name: (file.path, file.data_start) for file in found.files}
        first = found.files[0]
        logger.info("%s: %d weights in %d files", first.path.name, len(found.weights), len(data))
        model = printable(first.path.name)
        return cls(model, found.raw_config, found.config, found.weights, list(data), data, metadata=first.metadata)

    def check_source(self) -> None:
        """Raise InputError for what is measured, but never converted: a GGUF file, or what is quantized already, save
        by DeepSeek's own FP8 blocks."""
        if self.metadata is not None:
            fix = "give the Hugging Face checkpoint it was made from"
            raise InputError("is a GGUF file, which is not converted", where=self.model, fix=fix)
        quantized = [weight.spec.name for weight in self.weights if weight.scheme not in ("bf16", "fp8-block")]
        if quantized:
            what = f"already quantized: {listing(quantized, 1)}"
            raise InputError(what, where=self.model, fix="give the checkpoint it was made from")

    def read(
        self, tensor: StoredTensor, begin: int = 0, nbytes: int | None = None, buffer: np.ndarray | None = None
    ) -> np.ndarray:
        """`nbytes` bytes (default: all) of a tensor from offset `begin`: uint8, in `buffer` if one of that size is
        given, otherwise in a new array."""
        if buffer is None:
            buffer = np.empty(tensor.nbytes - begin if nbytes is None else nbytes, np.uint8)
        path, start = self._path_and_start(tensor.file)
        offset = start + tensor.begin + begin
        view, done = buffer.data, 0
        with reading(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while done < len(view):
                    count = os.preadv(descriptor, [view[done:]], offset + done)
                    if count == 0:
                        raise InputError(f"{tensor.name} ends early", where=path, fix=AGAIN)
                    done += count
            finally:
                os.close(descriptor)
        return buffer

    def array(self, tensor: StoredTensor, buffer: np.ndarray | None = None) -> np.ndarray:
        """A whole tensor in its shape: BF16 as its bits (uint16), F8_E4M3 as its codes (uint8)."""
        return self.read(tensor, buffer=buffer).view(_NUMPY[tensor.dtype]).reshape(tensor.shape)

    def encodable(self, weight: Weight, buffer: np.ndarray | None = None) -> np.ndarray:
        """A weight as codecs take it: BF16 bits (uint16), or float32 for every other source. `buffer` has the stored
        weight's size and may hold the result."""
        stored = self.array(weight.stored, buffer)
        if weight.scheme == "fp8-block":
            scales = self.array(weight.parts["weight_scale_inv"]).astype(np.float32, copy=False)
            return decode_block_to_float32(stored, scales)
        return stored if stored.dtype == np.uint16 else stored.astype(np.float32, copy=False)

    def not_finite(self, weight: Weight, index: Sequence[int]) -> InputError:
        """The error to raise where `weight` is NaN or infinite, or would be in BF16."""
        what = f"{weight.stored.name} is NaN, infinite or beyond BF16's range at {list(index)}"
        where, _ = self._path_and_start(weight.stored.file)
        return InputError(what, where=where, fix="the checkpoint is damaged: get it again")

    def fingerprint(self) -> list[list[object]]:
        """Name, size and modification time of every shard: tells whether a source changed between two runs."""
        stats = []
        for file in self.files:
            path, _ = self._path_and_start(file)
            with reading(path):
                stat = os.stat(path)
            stats.append([file, stat.st_size, stat.st_mtime_ns])
        return stats

    def _path_and_start(self, file: str) -> tuple[Path, int]:
        if file not in self.data:
            raise InputError("weights were not downloaded", where=self.model)
        return self.data[file]
