"""A checkpoint: its configuration, and an index over the headers of the files that hold its weights.

Opening (open.py) reads headers only and compares them with the complete list of tensors that the configuration
implies; a weight's bytes are read when asked for. There are two kinds: `HfCheckpoint` is in Hugging Face layout,
`GgufCheckpoint` (gguf.py) a GGUF file. What differs between them, they answer themselves.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.arch.multimodal import PUBLISHED, Multimodal, Names, multimodal
from dsv2quant.checkpoint.dtypes import torch_dtype
from dsv2quant.checkpoint.weights import (
    Weight,
    as_published,
    check_declared,
    check_quantization,
    index_tensors,
    match,
    split_off,
    take_kv_scales,
    without_missing_prediction,
)
from dsv2quant.errors import InputError, listing, printable
from dsv2quant.formats.declared import readable_codecs
from dsv2quant.formats.schemes import CODECS, DECODERS, SOURCES
from dsv2quant.progress import Progress
from dsv2quant.storage.durable import MANIFEST_FILE, STATE_FILE
from dsv2quant.storage.files import carried_files, fill, reading
from dsv2quant.storage.manifest import beside
from dsv2quant.storage.safetensors import (
    HELD_AS,
    INDEX_FILE,
    StoredTensor,
    check_index,
    read_header,
    read_json,
    shard_files,
)
from dsv2quant.storage.stream import Stream
from dsv2quant.storage.verified import VERIFIED_FILE
from dsv2quant.text.chat import Templates
from dsv2quant.text.tokenizer import Tokenizer, bos_note, check_tokenizer, stop_ids

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Checkpoint(ABC):
    """An opened checkpoint. Reads are thread-safe and go to the file system each time: nothing is cached.

    `data` is where each file lies and where its data begins; empty where weights were not downloaded. `revision` is the
    hub's commit. `kv_scales` holds the KV-cache scales of each layer, where the checkpoint has them. Of a multimodal
    model the weights are those of its language model, and `others` the stored tensors of all else.
    """

    model: str
    raw_config: dict[str, Any]
    config: ModelConfig
    weights: list[Weight]
    files: list[str]
    data: Mapping[str, tuple[Path, int]]
    revision: str | None = None
    kv_scales: Mapping[int, tuple[StoredTensor, ...]] = field(default_factory=dict)
    others: Sequence[StoredTensor] = ()

    # Consumers multiply by weights of this dtype, as torch calls it.
    served_dtype = "bfloat16"
    # Whether activations stay as they are, whatever a consumer does to them.
    is_weight_only = False
    # Whether layers for multi-token prediction have no place in it.
    leaves_out_prediction = False

    @abstractmethod
    def as_source(self) -> HfCheckpoint:
        """Itself, where it can be converted. Raises InputError for a GGUF file and schemes that are no SOURCES."""

    @property
    @abstractmethod
    def inputs(self) -> list[Path]:
        """The folder or the files that it is read from, where nothing may be written."""

    def file(self, name: str) -> Path | None:
        """A file of this name in its folder; None where there is none, or no folder."""
        return None

    @abstractmethod
    def parts(self, weight: Weight, device: str = "cpu") -> dict[str, torch.Tensor]:
        """What is stored of a weight by suffix, on the device with its bytes unchanged."""

    @abstractmethod
    def decode(
        self, weight: Weight, dtype: torch.dtype, device: str = "cpu", scale_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A weight as a consumer reconstructs it in `dtype`, from scales rounded to `scale_dtype` (None: as stored).
        Raises InputError where its parts contradict each other."""

    @abstractmethod
    def row_decoder(self, weight: Weight, dtype: torch.dtype, device: str) -> Callable[[int, int], torch.Tensor]:
        """A function (begin, end) that gives these rows of a weight as `decode` does."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Its own. Raises InputError where it has none, or a damaged one."""

    @abstractmethod
    def templates(self) -> Templates:
        """Its chat templates. Raises InputError for a damaged file."""

    @abstractmethod
    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The tokens that end a text; none may be named. Raises InputError for what is no id."""

    def bos_note(self) -> list[str]:
        """A line for the user where nothing says whether a text begins with BOS."""
        return []

    @property
    @abstractmethod
    def manifest(self) -> Path:
        """Where the manifest lies if this is an artifact of ours. Raises InputError where its conversion is not
        finished."""

    @abstractmethod
    def listed_files(self) -> list[str]:
        """The names of what consumers load, which a manifest must list."""

    @abstractmethod
    def check_unlisted(self, progress: Progress, has_source: bool) -> Literal["blocks", "nothing"]:
        """Check what can be without a manifest, and return what that was: 'blocks', or 'nothing'. Raises InputError
        where nothing can be and there is no source to compare with."""

    def check_added(self, listed: Sequence[str]) -> list[str]:
        """Names of files in its folder beside those `listed`. Raises InputError for one that programs may load."""
        return []

    def file_summary(self) -> dict[str, Any] | None:
        """Of a GGUF file its `file_type` and the number of tensors by block type, `tensor_types`."""
        return None

    def read(
        self, tensor: StoredTensor, begin: int = 0, nbytes: int | None = None, buffer: np.ndarray | None = None
    ) -> np.ndarray:
        """`nbytes` bytes (default: all) of a tensor from offset `begin`: uint8, in `buffer` if one of that size is
        given, otherwise in a new array."""
        if buffer is None:
            buffer = np.empty(tensor.nbytes - begin if nbytes is None else nbytes, np.uint8)
        path, start = self._path_and_start(tensor.file)
        return fill(buffer, path, [(start + tensor.begin + begin, buffer.nbytes)], tensor.name)

    def pieces(self, tensor: StoredTensor, places: Sequence[tuple[int, int]]) -> np.ndarray:
        """The bytes (uint8) of a tensor at some places, (offset, how many), one behind the other."""
        path, start = self._path_and_start(tensor.file)
        buffer = np.empty(sum(nbytes for _, nbytes in places), np.uint8)
        return fill(buffer, path, [(start + tensor.begin + begin, nbytes) for begin, nbytes in places], tensor.name)

    def array(self, tensor: StoredTensor, buffer: np.ndarray | None = None) -> np.ndarray:
        """A whole tensor in its shape, as `HELD_AS` has its dtype: BF16 as its bits (uint16), FP8 as its codes."""
        return self.read(tensor, buffer=buffer).view(HELD_AS[tensor.dtype]).reshape(tensor.shape)

    def tensor(self, part: StoredTensor, device: str = "cpu") -> torch.Tensor:
        """A part with its bytes unchanged, in its own dtype."""
        import torch

        return torch.from_numpy(self.read(part)).to(device).view(torch_dtype(part.dtype)).view(part.shape)

    def kv_scale(self, layer: int, device: str) -> torch.Tensor | None:
        """A layer's KV-cache scales, float32: [1] of a latent cache, [2] of keys and values; None where there are none.
        Raises InputError for one that nothing can be divided by."""
        import torch

        scales = [self.tensor(part, device).float().reshape(1) for part in self.kv_scales.get(layer, ())]
        for part, scale in zip(self.kv_scales.get(layer, ()), scales, strict=True):
            if not 0 < scale.item() < float("inf"):
                fix = "the checkpoint is damaged: get it again"
                raise InputError(f"{part.name} is {scale.item()}", where=self.model, fix=fix)
        return torch.cat(scales) if scales else None

    def not_finite(self, weight: Weight, index: Sequence[int], part: str | None = None) -> InputError:
        """The error to raise where a weight, or the part that is named, is NaN or infinite, or would be in BF16."""
        what = f"{part or weight.spec.name} is NaN, infinite or beyond BF16's range at {list(index)}"
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


@dataclass(eq=False)
class HfCheckpoint(Checkpoint):
    """A checkpoint in Hugging Face layout. `folder` is where it lies; None where only headers were read.

    Of a multimodal model `whole` says what is around the language model, and `names` how that is spelled, there and in
    artifacts; `raw_config` is the whole's. Where the shards come one by one from the hub, `stream` brings them.
    """

    folder: Path | None = None
    whole: Multimodal | None = None
    names: Names = PUBLISHED
    stream: Stream | None = None

    @classmethod
    def of_folder(cls, folder: Path, model: str, revision: str | None = None) -> HfCheckpoint:
        """Open a folder that is called `model`."""
        raw_config = read_json(folder / "config.json")
        model_config(raw_config, folder / "config.json")  # another model is not asked for its shards
        headers, data = {}, {}
        for file in shard_files(folder):
            headers[file], start = read_header(folder / file)
            data[file] = (folder / file, start)
        check_index(folder, headers)
        return cls.of_headers(model, raw_config, headers, revision=revision, folder=folder, data=data)

    @classmethod
    def of_headers(
        cls,
        model: str,
        raw_config: dict[str, Any],
        headers: Mapping[str, Mapping[str, Any]],
        *,
        revision: str | None = None,
        folder: Path | None = None,
        data: Mapping[str, tuple[Path, int]] | None = None,
        stream: Stream | None = None,
    ) -> HfCheckpoint:
        """Of the headers of its shards by file."""
        data = stream.data if stream is not None else data or {}
        where = folder if folder is not None else model
        config, whole = model_config(raw_config, f"{where}/config.json"), multimodal(raw_config)
        check_quantization(config.quantization, where)
        stored = index_tensors(headers, where)
        others = split_off(stored, whole, where)
        for tensor in others:
            del stored[tensor.name]
        tensors, names = as_published(stored, config, where)
        logger.info("%s: %d tensors in %d files", model, len(tensors), len(headers))
        config = without_missing_prediction(config, tensors)
        kv_scales = take_kv_scales(config, tensors, where)
        weights = match(architecture(config).specs(), tensors, readable_codecs(config.quantization), where)
        check_declared(weights, config.quantization, where)
        return cls(
            printable(model), raw_config, config, weights, sorted(headers), data, revision, kv_scales, others,
            folder, whole, PUBLISHED if whole is None else names, stream,
        )  # fmt: skip

    @property
    def downloaded(self) -> Path:
        """Its folder. Raises InputError where only headers were read."""
        if self.folder is None:
            raise InputError("its tokenizer was not downloaded", where=self.model)
        return self.folder

    def as_source(self) -> HfCheckpoint:
        quantized = [weight.spec.name for weight in self.weights if weight.scheme not in SOURCES]
        if quantized:
            what = f"already quantized: {listing(quantized, 1)}"
            raise InputError(what, where=self.model, fix="give the checkpoint it was made from")
        return self

    def fingerprint(self) -> list[list[object]]:
        return self.stream.fingerprint() if self.stream is not None else super().fingerprint()

    def arrays(self, weight: Weight, buffer: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """What is stored of a weight by suffix, as `HELD_AS` has its dtypes, its codes in `buffer` if one is given."""
        return {s: self.array(part, buffer if part is weight.stored else None) for s, part in weight.parts.items()}

    def language_model(self) -> HfCheckpoint:
        """The language model of a multimodal one, alone and under the published names."""
        if self.whole is None:
            return self
        raw_config = self.whole.language_config(self.raw_config, self.model)
        raw_config |= {"architectures": [self.config.architecture]}
        return replace(self, raw_config=raw_config, whole=None, names=PUBLISHED, others=())

    def encodable(self, weight: Weight, buffer: np.ndarray | None = None) -> np.ndarray:
        """A source's weight as codecs take it: BF16 bits (uint16), or float32 for every other scheme and dtype.
        `buffer` has the size of the weight's codes and may hold the result. Raises InputError as `decode`."""
        if weight.scheme in DECODERS:
            return DECODERS[weight.scheme](self.arrays(weight, buffer))
        return self.decode(weight, torch_dtype("F32")).numpy()

    @property
    def inputs(self) -> list[Path]:
        return [] if self.folder is None else [self.folder]

    def file(self, name: str) -> Path | None:
        path = None if self.folder is None else self.folder / name
        return path if path is not None and os.path.lexists(path) else None

    def carried_files(self) -> dict[str, bytes]:
        """{name: content} of the files that an artifact carries along."""
        return {} if self.folder is None else carried_files(self.folder, processors=self.whole is not None)

    def parts(self, weight: Weight, device: str = "cpu") -> dict[str, torch.Tensor]:
        return {suffix: self.tensor(part, device) for suffix, part in weight.parts.items()}

    def decode(
        self, weight: Weight, dtype: torch.dtype, device: str = "cpu", scale_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        parts = self.parts(weight, device)
        if weight.scheme == "bf16":
            return next(iter(parts.values())).to(dtype)
        return self._decoded(weight, parts, dtype, scale_dtype)

    def row_decoder(self, weight: Weight, dtype: torch.dtype, device: str) -> Callable[[int, int], torch.Tensor]:
        if weight.scheme == "bf16":
            return lambda begin, end: self.decode(weight.rows(begin, end), dtype, device)
        parts, codec = self.parts(weight, device), CODECS[weight.scheme]
        return lambda begin, end: self._decoded(weight, codec.rows(parts, begin, end), dtype)

    def _decoded(
        self,
        weight: Weight,
        parts: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        scale_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        try:
            return CODECS[weight.scheme].decode(parts, dtype, scale_dtype)
        except ValueError as error:
            fix = "the checkpoint is damaged: get it again"
            raise InputError(f"{weight.spec.module}: {error}", where=self.model, fix=fix) from None

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.open(self.downloaded)

    def templates(self) -> Templates:
        return Templates.of_folder(self.downloaded)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        return stop_ids(self.downloaded, tokenizer)

    def bos_note(self) -> list[str]:
        return [] if self.folder is None else bos_note(self.folder)

    def check_tokenizer(self) -> None:
        """Check the tokenizer that an artifact gets, and warn where there is none: weights alone are worth converting,
        too. Raises InputError for a damaged one, and where it has ids beyond the vocabulary of the model."""
        if self.folder is not None:
            check_tokenizer(self.folder, self.config.vocab_size)

    @property
    def manifest(self) -> Path:
        folder = self.downloaded
        if (folder / STATE_FILE).exists():
            raise InputError("the conversion is unfinished", where=folder, fix="run the same `convert` again")
        return folder / MANIFEST_FILE

    def listed_files(self) -> list[str]:
        return [*self.files, "config.json", *([INDEX_FILE] if self.file(INDEX_FILE) else [])]

    def check_unlisted(self, progress: Progress, has_source: bool) -> Literal["blocks", "nothing"]:
        if has_source and self.config.quantization is not None:
            return "nothing"
        what = f"is no artifact of dsv2quant: it has no {MANIFEST_FILE}"
        fix = "`dsv2quant inspect` shows what it holds; of a quantized one, --source measures the error"
        raise InputError(what, where=self.folder, fix=fix)

    def check_added(self, listed: Sequence[str]) -> list[str]:
        loaded, added = beside(self.downloaded, {*listed, MANIFEST_FILE, VERIFIED_FILE})
        if loaded:
            what = f"holds {listing(loaded)}, which its manifest does not list and programs may load"
            raise InputError(what, where=self.folder, fix="remove what was added")
        return added
