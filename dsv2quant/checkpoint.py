"""A checkpoint: its configuration, and an index over the headers of its safetensors shards.

Opening reads headers only and compares them with the complete list of tensors that config.json implies; a weight's
bytes are read when asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv2quant import hub
from dsv2quant.config import ModelConfig
from dsv2quant.errors import InputError, listing
from dsv2quant.formats.codec import Codec
from dsv2quant.formats.fp8 import decode_block_to_float32
from dsv2quant.formats.int4 import PACKED
from dsv2quant.formats.part import PLAIN_DTYPES, Part
from dsv2quant.formats.quant_config import kv_scale_parts, readable_codecs
from dsv2quant.headers import AGAIN, StoredTensor, check_index, read_header, read_json, shard_files, stored_tensors
from dsv2quant.names import LINEAR_ROLES, Slot, model_slots

logger = logging.getLogger(__name__)
_NUMPY = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F8_E4M3": np.uint8}
_PACKED = (PACKED, "qweight")  # suffixes of INT4 codes


@dataclass(frozen=True)
class Weight:
    """A tensor of the model as this checkpoint stores it: its scheme, and its parts by suffix.

    `scheme` is 'bf16' for every unquantized tensor; `parts` then has one entry, whose dtype may be BF16, F16 or F32.
    """

    slot: Slot
    scheme: str
    parts: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def stored(self) -> StoredTensor:
        """The part that holds the weight itself, or its codes."""
        return next(iter(self.parts.values()))


class Checkpoint:
    """An opened checkpoint. Reads are thread-safe and go to the file system each time: nothing is cached.

    `kv_scales` holds the KV-cache scale of each layer's keys, where the checkpoint has them.
    """

    def __init__(
        self,
        model: str,
        folder: Path | None,
        revision: str | None,
        raw_config: dict[str, Any],
        headers: dict[str, dict[str, Any]],
        data_starts: dict[str, int] | None = None,
    ) -> None:
        self.model, self.folder, self.revision, self.raw_config = model, folder, revision, raw_config
        where = folder if folder is not None else model
        self.config = ModelConfig.from_dict(raw_config, f"{where}/config.json")
        self.files = sorted(headers)
        _check_quantization(self.config.quantization, where)
        tensors = _index(headers, where)
        self.kv_scales = _kv_scales(self.config, tensors, where)
        self.weights = _match(model_slots(self.config), tensors, readable_codecs(self.config.quantization), where)
        self._data_starts = data_starts or {}
        logger.info("%s: %d tensors in %d files", model, len(tensors), len(headers))

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
        """Open a folder, or a hub id (downloaded unless `headers_only`). An existing path wins over a hub id.

        Raises InputError for whatever is missing, surplus, mis-shaped, truncated, overlapping or not understood.
        """
        name = os.fspath(model)
        folder = Path(name)
        commit = None
        if not folder.exists():
            if not hub.is_repo_id(name):
                raise InputError("no such folder", where=name, fix="give a checkpoint's folder or a hub id, owner/name")
            if headers_only and not offline:
                raw_config, headers, commit = hub.read_headers(name, revision, cache_dir)
                return cls(name, None, commit, raw_config, headers)
            folder, commit = hub.download(name, revision, cache_dir, offline)
        elif not folder.is_dir():
            raise InputError("not a folder", where=name, fix="give the folder that holds config.json")
        else:
            name = folder.resolve().name
        raw_config = read_json(folder / "config.json")
        headers, starts = {}, {}
        for file in shard_files(folder):
            headers[file], starts[file] = read_header(folder / file)
        check_index(folder, headers)
        return cls(name, folder, commit, raw_config, headers, starts)

    def read(
        self, tensor: StoredTensor, begin: int = 0, nbytes: int | None = None, buffer: np.ndarray | None = None
    ) -> np.ndarray:
        """`nbytes` bytes (default: all) of a tensor from offset `begin`: uint8, in `buffer` if one of that size is
        given, otherwise in a new array."""
        if buffer is None:
            buffer = np.empty(tensor.nbytes - begin if nbytes is None else nbytes, np.uint8)
        offset = self._data_starts[tensor.file] + tensor.begin + begin
        view, done = buffer.data, 0
        descriptor = os.open(self._path(tensor.file), os.O_RDONLY | os.O_CLOEXEC)
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise InputError(f"{tensor.name} ends early", where=self._path(tensor.file), fix=AGAIN)
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

    def identity(self) -> str:
        """sha256 that tells this model from others of its shape: of names, shapes, dtypes and each tensor's first
        4 KiB, which training never leaves alone. How tensors are spread over shards does not matter."""
        digest = hashlib.sha256()
        for weight in self.weights:
            for part in weight.parts.values():
                digest.update(json.dumps([part.name, part.dtype, part.shape]).encode())
                digest.update(self.read(part, nbytes=min(part.nbytes, 4096)).data)
        return digest.hexdigest()

    def not_finite(self, weight: Weight, index: Sequence[int]) -> InputError:
        """The error to raise where `weight` is NaN or infinite, or would be in BF16."""
        what = f"{weight.stored.name} is NaN, infinite or beyond BF16's range at {list(index)}"
        where = self._path(weight.stored.file)
        return InputError(what, where=where, fix="the checkpoint is damaged: get it again")

    def fingerprint(self) -> list[list[object]]:
        """Name, size and modification time of every shard: tells whether a source changed between two runs."""
        stats = [(file, os.stat(self._path(file))) for file in self.files]
        return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]

    def _path(self, file: str) -> Path:
        if self.folder is None:
            raise InputError("weights were not downloaded", where=self.model)
        return self.folder / file


def _check_quantization(quantization: Mapping[str, Any] | None, where: object) -> None:
    if quantization is None:
        return
    method = quantization.get("quant_method")
    if method not in ("fp8", "compressed-tensors", "gptq", "awq"):
        what = f"is quantized with {method!r}"
        raise InputError(what, where=where, fix="give the unquantized checkpoint, or a block-FP8 one")
    if method not in ("gptq", "awq"):
        return
    key, layout = ("checkpoint_format", "gptq") if method == "gptq" else ("version", "gemm")
    found = {key: quantization.get(key, layout), "bits": quantization.get("bits", quantization.get("w_bit"))}
    for name, value in {key: layout, "bits": 4}.items():
        if (found[name].lower() if isinstance(found[name], str) else found[name]) != value:
            what = f"is {method.upper()} with {name} {found[name]!r}"
            raise InputError(what, where=where, fix=f"only {value!r} is read")


def _index(headers: Mapping[str, Mapping[str, Any]], where: object) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file, header in headers.items():
        for tensor in stored_tensors(header, file, f"{where}/{file}"):
            if tensor.name in tensors:
                what = f"{tensor.name} lies in {tensors[tensor.name].file} and in {file}"
                raise InputError(what, where=where, fix="each tensor must lie in one shard")
            tensors[tensor.name] = tensor
    return tensors


def _kv_scales(config: ModelConfig, tensors: dict[str, StoredTensor], where: object) -> dict[int, StoredTensor]:
    """Take the KV-cache scales that the configuration declares out of `tensors`: every layer's, or none. Only the keys'
    are kept: MLA caches no values."""
    found: dict[int, StoredTensor] = {}
    names = {
        f"model.layers.{layer}.self_attn.{part.suffix}": layer
        for part in kv_scale_parts(config.quantization)
        for layer in range(config.num_hidden_layers)
    }
    missing = [name for name in names if name not in tensors]
    if len(missing) < len(names) and missing:
        what = f"{len(missing)} KV-cache scales are missing: {listing(missing)}"
        raise InputError(what, where=where, fix="download the missing shards")
    for name, layer in names.items() if not missing else ():
        tensor = tensors.pop(name)
        if tensor.dtype not in PLAIN_DTYPES or tensor.shape not in ((), (1,)):
            what = f"{name} is {tensor.dtype} {list(tensor.shape)}"
            raise InputError(what, where=f"{where}/{tensor.file}", fix="a KV-cache scale is one plain number")
        found.setdefault(layer, tensor)
    return found


def _match(
    slots: Iterable[Slot], tensors: dict[str, StoredTensor], codecs: Sequence[Codec], where: object
) -> list[Weight]:
    """Pair every slot with its stored parts; whatever is left over, missing or mis-shaped is an error."""
    slots = list(slots)
    missing = [slot.name for slot in slots if _held(slot, tensors) is None]
    if missing:
        what = f"{len(missing)} tensors that config.json implies are missing: {listing(missing)}"
        raise InputError(what, where=where, fix="download the missing shards, or correct config.json")
    weights = [_weight(slot, tensors, codecs, where) for slot in slots]
    used = {part.name for weight in weights for part in weight.parts.values()}
    # Old checkpoints store RoPE's frequencies, which follow from config.json.
    surplus = [name for name in tensors if name not in used and not name.endswith("rotary_emb.inv_freq")]
    if surplus:
        what = f"{len(surplus)} tensors that config.json does not imply: {listing(surplus)}"
        raise InputError(what, where=where, fix="correct config.json, or remove them")
    return weights


def _held(slot: Slot, tensors: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """The tensor under the slot's own name or, of a matrix, its packed codes."""
    names = [slot.name, *(f"{slot.module}.{suffix}" for suffix in _PACKED if slot.role in LINEAR_ROLES)]
    return next((tensors[name] for name in names if name in tensors), None)


def _weight(slot: Slot, tensors: Mapping[str, StoredTensor], codecs: Sequence[Codec], where: object) -> Weight:
    held = _held(slot, tensors)
    assert held is not None
    where = f"{where}/{held.file}"
    if held.name == slot.name and held.shape != slot.shape:
        what = f"{slot.name} has shape {list(held.shape)}, config.json implies {list(slot.shape)}"
        raise InputError(what, where=where, fix="correct config.json, or download the right shard")
    if held.dtype in PLAIN_DTYPES:
        return Weight(slot, "bf16", {slot.name.rpartition(".")[2]: held})
    if slot.role not in LINEAR_ROLES or held.dtype not in ("F8_E4M3", "I32"):
        readable = "BF16, F16, F32" + (", F8_E4M3" if slot.role in LINEAR_ROLES else "")
        raise InputError(f"{held.name} has dtype {held.dtype}", where=where, fix=f"it must be one of {readable}")
    lacking: list[tuple[int, str]] = []  # how many other parts are there, and the first that is not
    misfits: list[list[StoredTensor]] = []
    for codec in codecs:
        layout = () if codec.refusal(slot.shape) else codec.layout(slot.shape)
        found = {part.suffix: tensors.get(f"{slot.module}.{part.suffix}") for part in layout}
        parts = {suffix: tensor for suffix, tensor in found.items() if tensor is not None}
        if held not in parts.values() or not _fits(layout[0], held):
            continue
        missing = [suffix for suffix in found if suffix not in parts]
        wrong = [parts[part.suffix] for part in layout if part.suffix in parts and not _fits(part, parts[part.suffix])]
        if not missing and not wrong:
            return Weight(slot, codec.name, parts)
        if wrong:
            misfits.append(wrong)
        else:
            lacking.append((len(parts), missing[0]))
    found_parts, first = max(lacking, key=lambda item: item[0], default=(0, ""))
    if found_parts > 1 or (lacking and not misfits):
        kind = "FP8" if held.dtype == "F8_E4M3" else "INT4"
        what = f"{held.name} is {kind} but has no {slot.module.rpartition('.')[2]}.{first}"
        fix = "download the shard that holds it: without it the codes mean nothing"
        raise InputError(what, where=where, fix=fix)
    odd = min(misfits, key=len, default=[held])[0]
    what = f"{odd.name}, {odd.dtype} {list(odd.shape)}, does not fit a weight of shape {list(slot.shape)}"
    fix = "scales are per 128×128 block, per row or per tensor, of INT4 per 32, 64 or 128 columns or per row"
    raise InputError(what, where=where, fix=fix)


def _fits(part: Part, stored: StoredTensor) -> bool:
    """Whether a stored tensor is this part; scales may have any plain dtype."""
    return stored.shape == part.shape and (
        stored.dtype == part.dtype or (stored.dtype in PLAIN_DTYPES and part.dtype in PLAIN_DTYPES)
    )
