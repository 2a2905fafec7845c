"""Shares of work that were fastest on one GPU, with one minor version of Triton: what `bench kernels --tune` found.

    {"gpu": "NVIDIA H200", "capability": "9.0", "triton": "3.6",
     "fp8_gemm": {"24576x1536": {"1": ["decode", 128, 16, 1, 4], "16": …}, …}, "int4_gemm": …}

A share serves weights of so many rows and columns, and at most so many tokens: its kind and its fields, as the
operation's module has them. Kernels have a rule of their own for what no table holds. A table also serves other
versions of Triton and other GPUs of its compute capability, where there is none of their own.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).with_name("tuned")
HEAD = ("gpu", "capability", "triton")
KINDS = {  # of each operation's shares, and the number of their fields
    "fp8_gemm": {"vector": 3, "decode": 4, "prefill": 3},
    "int4_gemm": {"held": 2, "gemm": 5, "dequantize": 0},
}


class Shares(NamedTuple):
    """Of one weight: the share at the same place serves up to so many tokens."""

    tokens: list[int]
    shares: list[list[Any]]


Table = Mapping[str, Mapping[tuple[int, int], Shares]]


def lookup(operation: str, rows: int, columns: int, tokens: int) -> list[Any] | None:
    """The share for this device, [kind, field …]; None where no table has the weight, or so many tokens."""
    known = _of_this_device().get(operation, {}).get((rows, columns))
    if known is None or tokens > known.tokens[-1]:
        return None
    return known.shares[bisect_left(known.tokens, tokens)]


def row(kinds: Mapping[str, type], share: Iterable[int]) -> list[Any]:
    """As a table has a share of one of an operation's kinds."""
    return [next(name for name, kind in kinds.items() if isinstance(share, kind)), *share]


@functools.cache
def _of_this_device() -> Table:
    """Of the device that is current at the first call: no later call asks for one."""
    if not torch.cuda.is_available():
        return {}
    gpu, capability, version = torch.cuda.get_device_name(), capability_of_this_device(), triton.__version__
    path = nearest(gpu, capability, version)
    if path is None:
        logger.info("block shapes: by rules; no table is for compute capability %s", capability)
        return {}
    logger.info("block shapes: %s, for %s with Triton %s", path.name, gpu, version)
    return read(path)


def capability_of_this_device() -> str:
    """'9.0' on Hopper."""
    return "{}.{}".format(*torch.cuda.get_device_capability())


def nearest(gpu: str, capability: str, version: str) -> Path | None:
    """The table of the same compute capability, of the GPU itself if there is one, whose version of Triton is nearest;
    the newer of two. None where there is none."""

    def place(version: str) -> int:
        major, number = map(int, minor(version).split("."))
        return 1000 * major + number

    def distance(table: tuple[Path, dict[str, Any]]) -> tuple[bool, int, int, str]:
        path, raw = table
        its = place(raw["triton"])
        return raw["gpu"] != gpu, abs(its - place(version)), -its, path.name

    tables = [(path, raw) for path in FOLDER.glob("*.json") if (raw := _raw(path))["capability"] == capability]
    return min(tables, key=distance)[0] if tables else None


def path_of(gpu: str, version: str) -> Path:
    """Where the table of a GPU and a version of Triton lies, whether there is one or not."""
    return FOLDER / f"{gpu.replace(' ', '-')}-triton{minor(version)}.json"


def minor(version: str) -> str:
    """'3.6.0' → '3.6'. Raises ValueError for what is no version."""
    if not (matched := re.match(r"\d+\.\d+", version)):
        raise ValueError(f"{version!r} is no version of Triton")
    return matched[0]


def read(path: Path) -> Table:
    """A table's shares by operation, and rows and columns of the weight. Raises ValueError, naming the file, where it
    is another GPU's or version's than its name says, or a share is none."""
    raw = _raw(path)
    try:
        return {name: _weights(name, weights) for name, weights in raw.items() if name not in HEAD}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error!r}") from None


def _raw(path: Path) -> dict[str, Any]:
    """A table as its file has it, its head checked."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if path_of(raw["gpu"], raw["triton"]).name != path.name or minor(raw["triton"]) != raw["triton"]:
            raise ValueError("it is of another GPU or version of Triton")
        if not re.fullmatch(r"\d+\.\d+", raw["capability"]):
            raise ValueError(f"{raw['capability']!r} is no compute capability")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error!r}") from None
    return raw


def _weights(operation: str, raw: Mapping[str, Mapping[str, Any]]) -> dict[tuple[int, int], Shares]:
    kinds, found = KINDS[operation], {}
    for shape, by_tokens in raw.items():
        matched = re.fullmatch(r"(\d+)x(\d+)", shape)
        if not matched or not by_tokens:
            raise ValueError(f"{operation}: {shape!r} is no rows and columns, or has no shares")
        for tokens, (kind, *fields) in by_tokens.items():
            whole = all(type(field) is int and field > 0 for field in fields)
            if kinds.get(kind) != len(fields) or not whole or int(tokens) < 1:
                raise ValueError(f"{operation}, {shape}: {[kind, *fields]} is no share for {tokens} tokens")
        ordered = sorted(by_tokens, key=int)
        found[int(matched[1]), int(matched[2])] = Shares([int(t) for t in ordered], [by_tokens[t] for t in ordered])
    return found
