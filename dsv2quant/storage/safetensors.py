"""Reading safetensors headers and JSON files that nobody vouches for.

Downloaded files are untrusted: sizes are checked before anything is allocated, shards must lie inside the folder, and
a header must describe exactly the bytes that follow it. What the safetensors library refuses is refused here.

The files of an artifact, planned to the byte: tensors, their order and safetensors headers.

The stored tensors a weight becomes, the dtypes they may have, and what encoding may know of its inputs.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from dsv2quant.errors import InputError, UsageError, listing
from dsv2quant.storage.files import AGAIN, check_pointer, open_regular, read_bytes, reading

logger = logging.getLogger(__name__)
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_JSON_BYTES = 64_000_000
_MAX_BYTES = 1 << 63  # of a tensor
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a shard's header declares it; `begin` counts from the start of the shard's data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    nbytes: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from an untrusted file. Raises InputError naming the file and what is wrong with it."""
    content = read_bytes(path, MAX_JSON_BYTES)
    try:
        value = _parse(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where=path, fix=AGAIN) from None
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=path, fix=AGAIN)
    return value


def _parse(content: bytes, **hooks: Any) -> Any:
    """JSON in UTF-8 without BOM. Raises ValueError, of which every error of decoding is one, or RecursionError."""
    value = json.loads(content.decode(), **hooks)
    if b"\\ud" in content.lower():  # half a surrogate pair is no text: nothing could write it again
        json.dumps(value, ensure_ascii=False).encode()
    return value


def shard_files(folder: Path) -> list[str]:
    """Names of the shards in a folder, in order. Raises InputError where one is missing or lies outside, and where the
    folder holds two sets of weights, of which one would be ignored."""
    held = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    indexed = (folder / INDEX_FILE).exists()
    if not indexed and SINGLE_FILE not in held:
        raise _no_weights(folder, held)
    files = indexed_shards(folder) if indexed else [SINGLE_FILE]
    missing = [file for file in files if not os.path.exists(folder / file)]
    if missing:
        are = "shard {} is missing" if len(missing) == 1 else f"{len(missing)} of {len(files)} shards are missing: {{}}"
        raise InputError(are.format(listing(missing)), where=folder, fix=_unfinished(folder))
    _check_strays(folder, [name for name in held if name not in files], files)
    return files


def refuse_among_weights(out: Path, inputs: Iterable[Path]) -> None:
    """Raise InputError for a file to be written that would lie in a checkpoint's folder and look like a shard."""
    if out.suffix == ".safetensors" and any(path.is_dir() and out.parent.samefile(path) for path in inputs):
        what = "would lie among the checkpoint's weights, and be taken for some of them"
        raise InputError(what, where=out, fix="give a file in another folder")


def indexed_shards(folder: Path) -> list[str]:
    """Names of the shards that a folder's index lists, in order, there or not. Raises InputError where one lies
    outside."""
    files = sorted(set(_weight_map(folder).values()))
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            fix = "shards lie in the same folder"
            raise InputError(f"names the shard {file!r}", where=folder / INDEX_FILE, fix=fix)
    return files


def _no_weights(folder: Path, held: list[str]) -> InputError:
    """The error to raise where a folder has neither the one file nor the index."""
    what = f"neither {SINGLE_FILE} nor {INDEX_FILE}"
    adapter = any((folder / name).exists() for name in ("adapter_config.json", "adapter_model.safetensors"))
    if adapter:
        what, fix = "is a LoRA adapter, not a checkpoint", "merge it into its base model first: PEFT's merge_and_unload"
    elif held:
        what = f"{len(held)} shards without their index, {INDEX_FILE}: {listing(held)}"
        fix = "download the index from the same place, it says which shards there are"
    elif any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir()):
        fix = "convert the checkpoint to safetensors first: pickle is never read"
    else:
        fix = _unfinished(folder)
    return InputError(what, where=folder, fix=fix)


def _unfinished(folder: Path) -> str:
    """What to do where weights are missing; names a download that did not end."""
    # The hub's own client: beside a snapshot in its cache, and inside a folder that it was told to fill.
    caches = (folder, folder / ".cache/huggingface/download", folder.parent.parent / "blobs")
    begun = [path.name for cache in caches for path in cache.glob("*.incomplete")]
    if begun:
        return f"the download did not end, it left {listing(sorted(begun), 1)}: run it again"
    return "download the weights: the folder is not a whole checkpoint"


def _check_strays(folder: Path, strays: list[str], files: list[str]) -> None:
    """Weights that nothing names: a second set of the model's own is an error, anything else is said."""
    if (folder / "adapter_config.json").exists() or "adapter_model.safetensors" in strays:
        fix = "merge it first (PEFT's merge_and_unload), or move it out: transformers would load it with the model"
        raise InputError("holds a LoRA adapter beside the weights", where=folder, fix=fix)
    second = [name for name in strays if name == SINGLE_FILE or _SHARD.fullmatch(name)]
    if second:
        what = f"holds {listing(second, 1)} beside {listing(files, 1)}, which the model is made of"
        fix = "two sets of weights: programs differ on which they load, so move one out"
        raise InputError(what, where=folder, fix=fix)
    if strays:
        logger.warning("%s: %s is not read: the model is %s", folder, listing(strays), listing(files, 1))


def _weight_map(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise InputError("weight_map is not an object of names", where=folder / INDEX_FILE, fix=AGAIN)
    return index


def check_index(folder: Path, headers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError where the index and the shards' headers disagree on which tensor lies where."""
    if not (folder / INDEX_FILE).exists():
        return
    index = _weight_map(folder)
    held = {name: file for file, header in headers.items() for name in header}
    for wrong, what in (
        ([n for n, file in index.items() if n not in headers[file]], "lists tensors that their shard does not hold"),
        ([n for n in held if n not in index], "does not list tensors that a shard holds"),
    ):
        if wrong:
            raise InputError(f"{what}: {listing(wrong)}", where=folder / INDEX_FILE, fix="index and shards must agree")


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(header without __metadata__, offset of the data) of a safetensors file, checked against the file's size."""
    with os.fdopen(open_regular(path), "rb") as file, reading(path):
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        check_pointer(start, path)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise InputError("truncated or not a safetensors file", where=path, fix=AGAIN)
        file.seek(8)
        content = file.read(length)
    try:
        header = _parse(content, object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its header can't be parsed: {error}", where=path, fix=AGAIN) from None
    if not isinstance(header, dict):
        raise InputError("its header is not an object", where=path, fix=AGAIN)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise InputError("its __metadata__ is not an object of texts", where=path, fix=AGAIN)
    stored = stored_tensors(header, path.name, path)
    end = 8 + length + sum(t.nbytes for t in stored)
    if end != size:
        what = f"{size:,} bytes instead of {end:,}"
        raise InputError(f"{'truncated' if size < end else 'too long'}: {what}", where=path, fix=AGAIN)
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def stored_tensors(header: Mapping[str, Any], file: str, where: object) -> list[StoredTensor]:
    """The tensors of one header in file order. Raises InputError where an entry is malformed or tensors overlap."""
    tensors = []
    for name, entry in header.items():
        found = _entry(entry)
        if found is None:
            raise InputError(f"{name}: malformed header entry", where=where, fix=AGAIN)
        dtype, shape, begin, end = found
        nbytes = DTYPE_BYTES[dtype] * prod(shape)
        if end - begin != nbytes:
            what = f"{name}: {dtype} {list(shape)} needs {nbytes:,} bytes, the header gives it {end - begin:,}"
            raise InputError(what, where=where, fix=AGAIN)
        tensors.append(StoredTensor(name, dtype, shape, file, begin, nbytes))
    tensors.sort(key=lambda t: (t.begin, t.nbytes))
    position = 0
    for tensor in tensors:
        if tensor.begin != position:
            what = "overlaps the tensor before it" if tensor.begin < position else "leaves a hole before it"
            raise InputError(f"{tensor.name} {what}", where=where, fix=AGAIN)
        position += tensor.nbytes
    return tensors


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int] | None:
    """(dtype, shape, first byte, end) of a header's entry; None where it is malformed, or larger than any file."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return None
    lists = isinstance(shape, list) and isinstance(entry["data_offsets"], list)
    if not lists or not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return None
    size = 1
    for number in (begin, end, *shape):
        if type(number) is not int or not 0 <= number < _MAX_BYTES:
            return None
    for dim in shape:
        size *= dim
        if size >= _MAX_BYTES:
            return None
    return dtype, tuple(shape), begin, end


DEFAULT_SHARD_SIZE = 5_000_000_000
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Output:
    """One tensor of the artifact."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file, its tensors in file order, and its header's metadata."""

    file: str
    outputs: tuple[Output, ...]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})

    @cached_property
    def header(self) -> bytes:
        """The safetensors header: length, then JSON padded with spaces to a multiple of 8."""
        entries: dict[str, Any] = {"__metadata__": dict(self.metadata)}
        position = 0
        for output in self.outputs:
            offsets = [position, position + output.nbytes]
            entries[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": offsets}
            position += output.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def placed(self) -> Iterator[tuple[Output, int]]:
        """Its tensors with the places of their first bytes in the file."""
        position = len(self.header)
        for output in self.outputs:
            yield output, position
            position += output.nbytes

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(output.nbytes for output in self.outputs)


def aligned(outputs: list[Output]) -> tuple[Output, ...]:
    """Plan order where every tensor then starts at a multiple of its element size; otherwise widest elements first,
    as the safetensors library writes them."""
    position = 0
    for output in outputs:
        if position % DTYPE_BYTES[output.dtype]:
            return tuple(sorted(outputs, key=lambda o: -DTYPE_BYTES[o.dtype]))
        position += output.nbytes
    return tuple(outputs)


def parse_size(text: str) -> int:
    """'5GB' → 5,000,000,000 bytes; also KB, MB, TB and the binary KiB, MiB, GiB."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise UsageError(f"{text!r} is not a size", fix="write it as 5GB, 500MB or a number of bytes")
    return int(float(match[1]) * unit)


# Bytes per element of the safetensors dtypes (safetensors/src/tensor.rs); the sub-byte ones never occur here.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
# How arrays hold the bits of those that weights' parts may have.
HELD_AS = {
    "BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F8_E4M3": np.uint8, "F8_E8M0": np.uint8, "I8": np.int8,
    "I32": np.int32, "I64": np.int64,
}  # fmt: skip
PLAIN_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Part:
    """One stored tensor of a weight: `<module>.<suffix>`, its safetensors dtype and its shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * prod(self.shape)
