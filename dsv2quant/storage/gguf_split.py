"""Where a GGUF file is cut, and what the files are that it is cut into: llama-gguf-split's, by `--split-max-size`.

The rule is that of llama.cpp's tools/gguf-split/gguf-split.cpp: tensors in their order, a new file where the next one
would bring the data, each tensor padded, beyond the limit. The first file has all metadata, which isn't counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import GGUFValueType

from dsv2quant.errors import InputError, UsageError
from dsv2quant.storage.durable import HASHED_AT_ONCE
from dsv2quant.storage.gguf import Metadata, Value, pack_header, padded, read


@dataclass(frozen=True)
class Piece:
    """A file of those that `whole` is cut into: its name, its header, and which bytes of `whole`, from `begin` to
    `end`, follow."""

    name: str
    whole: Path
    header: bytes
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return len(self.header) + self.end - self.begin

    def chunks(self) -> Iterator[bytes]:
        """Its content. Raises InputError where `whole` was cut meanwhile."""
        yield self.header
        with self.whole.open("rb") as file:
            file.seek(self.begin)
            left = self.end - self.begin
            while left:
                chunk = file.read(min(left, HASHED_AT_ONCE))
                if not chunk:
                    raise InputError("was cut while it was read", where=self.whole, fix="verify it")
                left -= len(chunk)
                yield chunk


def spread(tensors: Sequence[tuple[str, int]], limit: int, option: str) -> list[range]:
    """Which tensors, (name, bytes) each, come into each file, of at most `limit` bytes of data. Raises UsageError,
    naming the option, where one alone has more."""
    name, largest = max(tensors, key=lambda tensor: tensor[1])
    if padded(largest) > limit:
        what = f"{option} {limit:,}: {name} alone takes {padded(largest):,} bytes"
        raise UsageError(what, fix="tensors are not cut: give at least that")
    begins, size = [0], 0
    for number, (_, nbytes) in enumerate(tensors):
        size += padded(nbytes)
        if size > limit:
            begins.append(number)
            size = padded(nbytes)
    return [range(begin, end) for begin, end in zip(begins, [*begins[1:], len(tensors)], strict=True)]


def split_name(stem: str, number: int, count: int) -> str:
    """The name of file `number` of `count`, from 0 on (llama_split_path in src/llama.cpp)."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def split_keys(number: int, count: int, tensors: int) -> Metadata:
    """What file `number` of `count` says of itself; `tensors` are those of all."""
    return {
        "split.no": Value(GGUFValueType.UINT16, number),
        "split.tensors.count": Value(GGUFValueType.INT32, tensors),
        "split.count": Value(GGUFValueType.UINT16, count),
    }


def pieces(path: Path, limit: int, option: str) -> list[Piece]:
    """What a GGUF file that `convert` wrote is cut into. Raises as `spread` and `read` do."""
    whole = read(path)
    groups = spread([(tensor.name, tensor.nbytes) for tensor in whole.tensors], limit, option)
    found = []
    for number, group in enumerate(groups):
        members = [whole.tensors[i] for i in group]
        begin = members[0].begin
        keys = split_keys(number, len(groups), len(whole.tensors))
        header = pack_header(
            {**whole.metadata, **keys} if number == 0 else keys,
            [replace(tensor, begin=tensor.begin - begin) for tensor in members],
        )
        end = members[-1].begin + padded(members[-1].nbytes)
        name = split_name(path.name.removesuffix(".gguf"), number, len(groups))
        found.append(Piece(name, path, header, whole.data_start + begin, whole.data_start + end))
    return found
