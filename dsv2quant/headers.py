"""Reading safetensors headers and JSON files that nobody vouches for.

Downloaded files are untrusted: sizes are checked before anything is allocated, shards must lie inside the folder, and
a header must describe exactly the bytes that follow it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv2quant.errors import InputError, listing
from dsv2quant.formats.part import DTYPE_BYTES

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
MAX_JSON_BYTES = 64_000_000
AGAIN = "download it again"


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
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"larger than {MAX_JSON_BYTES:,} bytes", where=path, fix="this is no configuration")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("missing", where=path, fix="a checkpoint's folder must hold it") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where=path, fix=AGAIN) from None
    if not isinstance(value, dict):
        raise InputError("not a JSON object", where=path, fix=AGAIN)
    return value


def shard_files(folder: Path) -> list[str]:
    """Names of the shards in a folder, in order. Raises InputError where one is missing or lies outside."""
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    if not (folder / INDEX_FILE).exists():
        pickles = list(folder.glob("*.bin")) + list(folder.glob("*.pt"))
        fix = "convert the checkpoint to safetensors first: pickle is never read" if pickles else "check the folder"
        raise InputError(f"neither {SINGLE_FILE} nor {INDEX_FILE}", where=folder, fix=fix)
    files = indexed_shards(folder)
    for file in files:
        if not (folder / file).exists():
            raise InputError(f"shard {file} is missing", where=folder, fix="download it, the index needs it")
    return files


def indexed_shards(folder: Path) -> list[str]:
    """Names of the shards that a folder's index lists, in order, there or not. Raises InputError where one lies
    outside."""
    files = sorted(set(_weight_map(folder).values()))
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            fix = "shards lie in the same folder"
            raise InputError(f"names the shard {file!r}", where=folder / INDEX_FILE, fix=fix)
    return files


def _weight_map(folder: Path) -> dict[str, str]:
    index = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise InputError("weight_map is not an object of names", where=folder / INDEX_FILE, fix=AGAIN)
    return index


def check_index(folder: Path, headers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise InputError where the index and the shards' headers disagree on which tensor lies where."""
    if SINGLE_FILE in headers:
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
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise InputError("truncated or not a safetensors file", where=path, fix=AGAIN)
        try:
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise InputError(f"its header can't be parsed: {error}", where=path, fix=AGAIN) from None
    if not isinstance(header, dict):
        raise InputError("its header is not an object", where=path, fix=AGAIN)
    header.pop("__metadata__", None)
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


def stored_tensors(header: Mapping[str, Any], file: str, where: object) -> list[StoredTensor]:
    """The tensors of one header in file order. Raises InputError where an entry is malformed or tensors overlap."""
    tensors = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole or dtype not in DTYPE_BYTES:
            raise InputError(f"{name}: malformed header entry", where=where, fix=AGAIN)
        nbytes = DTYPE_BYTES[dtype]
        for dim in shape:
            nbytes *= dim
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
