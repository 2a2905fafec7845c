"""The files of an artifact, planned to the byte: tensors, their order and safetensors headers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dsv2quant.errors import UsageError
from dsv2quant.formats.part import DTYPE_BYTES

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
