"""Numbers and sizes of ggml's tensor types: the gguf library's, and those that its releases don't know yet.

Sources: ggml/include/ggml.h (enum ggml_type), ggml/src/ggml-common.h (the structs of blocks).

The GGUF container, version 3: key-values, tensor headers, and where each tensor's data lies.

Layout: ggml/include/gguf.h. Reading is strict, because files come from others: a count or length is compared with what
is left of the file before anything is made of it. (gguf-py's reader walks off the end of a damaged file.)

Typed values of a GGUF file's metadata.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, quants

from dsv2quant.errors import InputError
from dsv2quant.storage.files import check_pointer, open_regular


class BlockType(NamedTuple):
    """`values` consecutive values of a row are stored in `bytes` bytes."""

    values: int
    bytes: int


NUMBERS = {kind.name: int(kind) for kind in GGMLQuantizationType} | {"Q1_0": 41, "Q2_0": 42}
NAMES = {number: name for name, number in NUMBERS.items()}
SIZES = {kind.name: BlockType(*size) for kind, size in GGML_QUANT_SIZES.items()}
SIZES |= {"Q1_0": BlockType(128, 18), "Q2_0": BlockType(64, 18)}
_FEW_BITS = {"Q1_0": 1, "Q2_0": 2}


def dequantize(name: str, data: np.ndarray) -> np.ndarray:
    """uint8 [rows, bytes of a row] → float32 [rows, cols], as ggml's dequantize_row_* has it."""
    if name in _FEW_BITS:
        return _few_bits(data, _FEW_BITS[name])
    values: np.ndarray = quants.dequantize(data, GGMLQuantizationType[name])
    return values


def _few_bits(data: np.ndarray, bits: int) -> np.ndarray:
    """A block is a float16 d, then codes of `bits` bits, the lowest first: one is −d or d, two are (code − 1) · d."""
    blocks = data.reshape(len(data), -1, 18)
    d = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)[..., None]
    codes = blocks[..., 2:, None] >> np.arange(0, 8, bits, dtype=np.uint8) & (2**bits - 1)
    signed = codes.astype(np.float32) * (2 if bits == 1 else 1) - 1
    values: np.ndarray = (signed * d).reshape(len(data), -1)
    return values


MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
MAX_HEADER_BYTES = 64_000_000  # ten times what DeepSeek-V2's vocabulary of 100,000 and its merges take
# Python objects take more than their bytes in the file: what models have, several times over.
MAX_VALUES = 2_000_000  # in all arrays of the metadata
MAX_TENSORS = 100_000
MAX_NAME_BYTES = 63  # of a tensor: GGML_MAX_NAME
_MAX_KEY_BYTES = 65535
_AGAIN = "get the file again"
_FORMATS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d", GGUFValueType.BOOL: "?",
}  # fmt: skip


class Value(NamedTuple):
    """A typed value of the metadata; a list where `is_array`, of values of `type`."""

    type: GGUFValueType
    value: Any
    is_array: bool = False


Metadata = Mapping[str, Value]


@dataclass(frozen=True)
class TensorHeader:
    """One tensor: its type's name ('Q4_K'), its shape [..., rows, cols] (the reverse of ggml's), and where its bytes
    begin, counted from the data's start."""

    name: str
    type: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Container:
    """An opened file; `data_start` is where the data begins in it."""

    path: Path
    metadata: Metadata
    tensors: tuple[TensorHeader, ...]
    data_start: int


def padded(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // alignment) * alignment


def pack_header(metadata: Metadata, tensors: Sequence[TensorHeader]) -> bytes:
    """Everything before the data, padded to where it begins."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, (kind, value, is_array) in metadata.items():
        parts.append(_pack_string(key))
        if is_array:
            parts.append(struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value)))
            if kind == GGUFValueType.STRING:
                parts += map(_pack_string, value)
            else:
                parts.append(struct.pack(f"<{len(value)}{_FORMATS[kind]}", *value))
        elif kind == GGUFValueType.STRING:
            parts += [struct.pack("<I", kind), _pack_string(value)]
        else:
            parts.append(struct.pack(f"<I{_FORMATS[kind]}", kind, value))
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts.append(_pack_string(tensor.name))
        parts.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, NUMBERS[tensor.type], tensor.begin))
    header = b"".join(parts)
    return header.ljust(padded(len(header)), b"\0")


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def read(path: Path) -> Container:
    """Open a GGUF file. Raises InputError where it is none, is truncated, or contradicts itself."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        check_pointer(start, path)
        if size < 24 or not start.startswith(MAGIC):
            raise InputError("truncated or not a GGUF file", where=path, fix=_AGAIN)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data, size).container()


class _Reader:
    """A cursor over a mapped file that never passes its end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 4
        self.end = min(size, MAX_HEADER_BYTES)  # of the header: no damaged count makes it larger
        self.values = 0  # read so far, of the metadata

    def container(self) -> Container:
        version, tensor_count, key_count = self.unpack("IQQ")
        if version not in (2, VERSION):
            raise self.error(f"GGUF version {version}, not 2 or 3", "convert the model again")
        self.check_count(tensor_count, 24)  # of a tensor's header at the least
        self.check_count(key_count, 13)
        if tensor_count > MAX_TENSORS:
            raise self.error(f"{tensor_count:,} tensors, more than {MAX_TENSORS:,}")
        metadata: dict[str, Value] = {}
        for _ in range(key_count):
            key = self.string(_MAX_KEY_BYTES)
            if key in metadata:
                raise self.error(f"the key {key} occurs twice")
            metadata[key] = self.value(key)
        alignment = metadata.get("general.alignment", Value(GGUFValueType.UINT32, ALIGNMENT)).value
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {alignment!r}, not a power of two of at least 8")
        tensors: list[TensorHeader] = []
        position = 0
        for _ in range(tensor_count):
            tensor = self.tensor()
            if tensor.begin != position:
                raise self.error(f"{tensor.name} begins at {tensor.begin:,}, not behind the tensor before it")
            position += padded(tensor.nbytes, alignment)
            tensors.append(tensor)
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise self.error("a tensor's name occurs twice")
        data_start = padded(self.at, alignment)
        end = data_start + tensors[-1].begin + tensors[-1].nbytes if tensors else self.at
        if self.size < end:
            raise self.error(f"truncated: {self.size:,} bytes instead of {end:,}")
        return Container(self.path, metadata, tuple(tensors), data_start)

    def tensor(self) -> TensorHeader:
        name = self.string(MAX_NAME_BYTES)
        (rank,) = self.unpack("I")
        if not 1 <= rank <= 4:
            raise self.error(f"{name} has {rank} dimensions")
        shape = self.unpack(f"{rank}Q")[::-1]
        number, begin = self.unpack("IQ")
        if number not in NAMES:
            raise self.error(f"{name} has the unknown type number {number}", "update dsv2quant, or get another file")
        kind = NAMES[number]
        values, nbytes = SIZES[kind]
        if not prod(shape) or shape[-1] % values:
            raise self.error(f"{name}: {kind} can't have the shape {list(shape)}")
        return TensorHeader(name, kind, shape, begin, prod(shape) // values * nbytes)

    def value(self, key: str) -> Value:
        number = self.unpack("I")[0]
        is_array = number == GGUFValueType.ARRAY
        count = 1
        if is_array:
            number, count = self.unpack("IQ")
        if number != GGUFValueType.STRING and number not in _FORMATS:
            raise self.error(f"{key} has a value of the unknown type {number}")
        kind = GGUFValueType(number)
        self.check_count(count, 8 if kind == GGUFValueType.STRING else struct.calcsize(_FORMATS[kind]))
        self.values += count
        if self.values > MAX_VALUES:
            raise self.error(f"{key} is the end of more than {MAX_VALUES:,} values")
        if kind == GGUFValueType.STRING:
            items = [self.string() for _ in range(count)]
        else:
            items = list(self.unpack(f"{count}{_FORMATS[kind]}"))
        return Value(kind, items, True) if is_array else Value(kind, items[0])

    def string(self, longest: int = MAX_HEADER_BYTES) -> str:
        (length,) = self.unpack("Q")
        self.check_count(length, 1)
        if length > longest:
            raise self.error(f"a name of {length:,} bytes, more than {longest:,}")
        self.at += length
        try:
            return self.data[self.at - length : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.error(f"a string is not UTF-8: {error}") from None

    def unpack(self, layout: str) -> tuple[Any, ...]:
        layout = f"<{layout}"
        nbytes = struct.calcsize(layout)
        self.check_count(nbytes, 1)
        self.at += nbytes
        return struct.unpack_from(layout, self.data, self.at - nbytes)

    def check_count(self, count: int, nbytes: int) -> None:
        """Raise InputError where `count` items of at least `nbytes` each can't be in what is left of the header."""
        if count * nbytes > self.end - self.at:
            raise self.error("truncated, or a count in its header is wrong")

    def error(self, what: str, fix: str = _AGAIN) -> InputError:
        return InputError(what, where=self.path, fix=fix)


UINT32_MAX = 2**32 - 1
_INTEGERS = {GGUFValueType.UINT32: (0, UINT32_MAX), GGUFValueType.INT32: (-(2**31), 2**31 - 1)}
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 can't
FLOAT32_MAX = float(np.finfo(np.float32).max)


def u32(value: int) -> Value:
    return Value(GGUFValueType.UINT32, value)


def f32(value: float) -> Value:
    return Value(GGUFValueType.FLOAT32, value)


def boolean(value: bool) -> Value:
    return Value(GGUFValueType.BOOL, value)


def string(value: str) -> Value:
    return Value(GGUFValueType.STRING, value)


def array(values: Sequence[Any]) -> Value:
    """Of strings or int32."""
    return Value(GGUFValueType.get_type(values[0]), list(values), is_array=True)


def written(writer: GGUFWriter, where: object) -> dict[str, Value]:
    """What gguf-py's own code has given to `writer`, in order; it must be text, numbers and lists of text.

    gguf-py checks nothing before it packs the bytes: raises InputError naming `where` for a value of another type.
    """
    found = {}
    for key, entry in writer.kv_data[0].items():
        is_array = entry.type == GGUFValueType.ARRAY
        kind = GGUFValueType.STRING if is_array else entry.type
        members = entry.value if is_array else [entry.value]
        if not isinstance(members, list) or not all(_fits(kind, member) for member in members):
            what = f"{key} would be {entry.value!r}"
            rule = {GGUFValueType.STRING: "text: quote it", GGUFValueType.BOOL: "true or false"}.get(kind, "a number")
            raise InputError(what, where=where, fix=f"it must be {rule}")
        found[key] = Value(kind, entry.value, is_array)
    return found


def check_numbers(values: Mapping[str, Value], where: object) -> None:
    """Raise InputError naming `where` for a number, but in an array, that its type can't hold."""
    for key, (kind, value, is_array) in values.items():
        if not is_array and kind != GGUFValueType.STRING and not _fits(kind, value):
            raise InputError(f"{key} would be {value!r}", where=where, fix=f"it must fit {kind.name.lower()}")


def _fits(kind: GGUFValueType, value: Any) -> bool:
    if kind == GGUFValueType.STRING:
        return isinstance(value, str) and not _SURROGATE.search(value)
    if kind == GGUFValueType.BOOL:
        return isinstance(value, bool)
    if kind in _INTEGERS:
        low, high = _INTEGERS[kind]
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX
