"""Typed values of a GGUF file's metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from dsv2quant.errors import InputError
from dsv2quant.formats.gguf.container import Value

UINT32_MAX = 2**32 - 1
_INTEGERS = {
    GGUFValueType.UINT32: (0, UINT32_MAX), GGUFValueType.INT32: (-(2**31), 2**31 - 1),
}  # fmt: skip
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
