"""What the kernels share: the checks of their wrappers, dependent launches, the joining of a split K, and shares of
work that were measured.

Programmatic dependent launch (CUDA programming guide, "Programmatic Dependent Launch and Synchronization"): a kernel
may start while the one before it in the stream still runs. A kernel launched so waits until those before it have ended,
and lets its successor start then: no kernel is more than one ahead. What any but its direct predecessor wrote, weights
above all, it may read before it waits, so that they are on their way; all else it reads, and all that it writes, comes
behind the wait. Every program must wait.

On an H200 a step of V2-Lite took 1.72 ms without, 1.62 where kernels let the next one start at once, which then takes
room from those of other streams, and 1.55 so.

A table in `tuned/` has the shares that were fastest on one GPU, with one minor version of Triton: what `bench kernels
--tune` found.

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
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

logger = logging.getLogger(__name__)
FOLDER = Path(__file__).with_name("tuned")
HEAD = ("gpu", "capability", "triton")
KINDS = {  # of each operation's shares, and the number of their fields
    "fp8_gemm": {"vector": 3, "decode": 4, "prefill": 3},
    "int4_gemm": {"held": 2, "gemm": 5, "dequantize": 0},
}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = triton.knobs.runtime.interpret
MULTIPROCESSORS = 132  # of an H100 or H200


def check_rows(name: str, x: torch.Tensor, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> None:
    """Raises ValueError where x is not of `shape`, whose None stand for any, and of `dtype`, by default a float that
    the kernels compute with; or where elements of a row do not lie side by side."""
    sizes = x.shape
    fits = len(sizes) == len(shape)
    for want, size in zip(shape, sizes, strict=False):
        fits = fits and (want is None or want == size)
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(sizes)}; need ({wanted})")
    if x.dtype not in ((dtype,) if dtype else FLOATS):
        raise ValueError(f"{name} is {x.dtype}; need {dtype or 'bfloat16, float16 or float32'}")
    if x.stride(-1) != 1:
        raise ValueError(f"{name} has strides {x.stride()}; elements of a row must lie side by side")
    if INTERPRETED and x.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter has no bfloat16")


def output(x: torch.Tensor, rows: int, out: torch.Tensor | None) -> torch.Tensor:
    """Room for the product of x [M, K] and a weight of so many rows: `out` if given. Raises ValueError where it is not
    contiguous, of x's dtype and [M, rows]."""
    if out is None:
        return x.new_empty(len(x), rows)
    if out.shape != (len(x), rows) or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"out must be contiguous, {x.dtype}, of shape ({len(x)}, {rows})")
    return out


PDL = not INTERPRETED  # for `launch_pdl`
_ON: tl.constexpr = tl.constexpr(PDL)


@triton.jit
def wait() -> None:
    if _ON:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def finish(
    sums, at, stored, factors, partial, arrivals, tile, split,
    HEIGHT: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Store [HEIGHT, TOKENS] `at` [TOKENS, HEIGHT] where `stored`, times the `factors` of tokens: by the last of SPLIT
    programs of a tile, which adds all their sums in order."""
    sums = tl.trans(sums)
    if SPLIT == 1:
        _store(sums, at, stored, factors)
    else:
        SIZE: tl.constexpr = HEIGHT * TOKENS
        cell = partial + tile.to(tl.int64) * (SPLIT * SIZE) + tl.arange(0, TOKENS)[:, None] * HEIGHT
        cell += tl.arange(0, HEIGHT)[None, :]
        tl.store(cell + split * SIZE, sums, stored)
        tl.debug_barrier()  # every thread's sums are out before this program counts itself
        if tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT - 1:
            tl.store(arrivals + tile, 0)
            total = tl.zeros((TOKENS, HEIGHT), tl.float32)
            for part in tl.static_range(SPLIT):
                total += tl.load(cell + part * SIZE, stored, 0.0, cache_modifier=".cg")
            _store(total, at, stored, factors)


@triton.jit
def _store(sums, at, stored, factors):
    if factors is not None:
        sums *= factors[:, None]
    tl.store(at, sums.to(at.dtype.element_ty), stored)


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


def table_row(kinds: Mapping[str, type], share: Iterable[int]) -> list[Any]:
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
    return read_table(path)


@functools.cache
def specialized() -> bool:
    """Whether kernels whose warps are of two kinds run on the device that is current at the first call: Hopper's."""
    return not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def capability_of_this_device() -> str:
    """'9.0' on Hopper."""
    return "{}.{}".format(*torch.cuda.get_device_capability())


def nearest(gpu: str, capability: str, version: str) -> Path | None:
    """The table of the same compute capability, of the GPU itself if there is one, whose version of Triton is nearest;
    the newer of two. None where there is none."""

    def place(version: str) -> int:
        major, number = map(int, minor_version(version).split("."))
        return 1000 * major + number

    def distance(table: tuple[Path, dict[str, Any]]) -> tuple[bool, int, int, str]:
        path, raw = table
        its = place(raw["triton"])
        return raw["gpu"] != gpu, abs(its - place(version)), -its, path.name

    tables = [(path, raw) for path in FOLDER.glob("*.json") if (raw := _raw(path))["capability"] == capability]
    return min(tables, key=distance)[0] if tables else None


def path_of(gpu: str, version: str) -> Path:
    """Where the table of a GPU and a version of Triton lies, whether there is one or not."""
    return FOLDER / f"{gpu.replace(' ', '-')}-triton{minor_version(version)}.json"


def minor_version(version: str) -> str:
    """'3.6.0' → '3.6'. Raises ValueError for what is no version."""
    if not (matched := re.match(r"\d+\.\d+", version)):
        raise ValueError(f"{version!r} is no version of Triton")
    return matched[0]


def read_table(path: Path) -> Table:
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
        if path_of(raw["gpu"], raw["triton"]).name != path.name or minor_version(raw["triton"]) != raw["triton"]:
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
