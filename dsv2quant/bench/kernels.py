"""`dsv2quant bench kernels`: every operation in DeepSeek-V2's and V2-Lite's shapes, beside its peers and the floor;
with `--tune`, the table of shares that are fastest on the GPU at hand.

Times are CUDA-graph replays over random operands in rotation, so that none is in the cache: the median of 7. Each call
is checked against float64 on the dequantized operands before it is timed.

Candidates for a table are compiled first, once each and side by side in processes that leave them in Triton's cache.
Those of a shape are then timed by a few replays, and the best of them by more. The rule's choice stays unless another
is more than 2 % faster.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from dsv2quant.bench import attention, experts, fp8, fused, weight_only
from dsv2quant.bench.device import (
    Measured,
    append,
    check_device,
    frobenius,
    limits,
    measured_on,
    random_bf16,
    recorded,
)
from dsv2quant.bench.model import MODELS, configuration, matrices
from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.kernels import fp8_gemm, int4_gemm, launch
from dsv2quant.kernels.fp8_vector import Vector
from dsv2quant.kernels.int4_held import Held
from dsv2quant.storage.processors import processors

SECTIONS = {
    "fp8": fp8.SECTION, "int4": weight_only.INT4, "gguf": weight_only.GGUF, "experts": experts.SECTION,
    "mla": attention.MLA, "gqa": attention.GQA, "fused": fused.FUSED,
}  # fmt: skip
PEERS = list(dict.fromkeys(peer for section in SECTIONS.values() for peer in section.peers))
TOKENS = (1, 4, 16, 32, 64, 128, 256, 1024, 4096)
CLOSE = 1.1  # of the fastest in the first round, for a second
FINALISTS = 4
FASTER = 0.98  # than the rule's choice
APART = 5e-3  # two right products, each with an error of at most 3e-3 against the exact one
ROUNDS = (3, 11)  # replays


def run(names: Sequence[str], results: Path | None, say: Callable[[str], object]) -> dict[str, Any]:
    """Measure the sections of these names; `say` gets a line for each call, `results` a row.

    Returns what was measured, the rows of the summary, and the calls whose error is beyond its limit. Raises UsageError
    without a Hopper GPU.
    """
    check_device()
    torch.manual_seed(0)
    reached, where = limits(), measured_on()
    say(f"{where['GPU']}, driver {where['driver']}, {where['versions']}: {reached}")
    measured: list[Measured] = []
    for name in names:
        for call in SECTIONS[name].measure(reached):
            measured.append(call)
            say(call.line())
    rows = [call.columns(PEERS) | {"limits": str(reached)} | where for call in measured]
    append(results, rows)
    summaries = [row.summary(measured) for name in names for row in SECTIONS[name].rows]
    return {
        **where,
        "read_bytes_per_s": reached.read,
        "bf16_flops": reached.products,
        "kernels": [call._asdict() for call in measured],
        "rows": [summary for summary in summaries if summary],
        "wrong": [call.label for call in measured if call.wrong],
    }


def summary_line(row: dict[str, Any]) -> str:
    """A row of the summary as text."""
    return (
        f"{row['row']}, against {row['against']}: {row['mean']:.2f} in the mean of {row['calls']}, "
        f"worst {row['worst']:.2f} ({row['worst call']})"
    )


@dataclass(frozen=True)
class Operation:
    """What is tuned: `weights` are the shapes [rows, columns], `compiled` what decides a candidate's machine code."""

    name: str  # in tables
    weights: Callable[[], set[tuple[int, int]]]
    rule: Callable[[int, int, int], Any]  # of tokens, rows, columns
    candidates: Callable[[int, int, int], list[Any]]
    random_weights: Callable[[int, int, int | None], Any]  # rows, columns, how many; None: what calls rotate through
    random_tokens: Callable[[int, int], Any]  # tokens, columns
    calls: Callable[[Any, Any, Any], list[Callable[[], torch.Tensor]]]  # of weights, tokens, share
    table_row: Callable[[Any], list[Any]]
    compiled: Callable[[Any, int, int], tuple[Any, int, int]]  # share, rows, columns → those of a small call alike


def _fp8_weights() -> set[tuple[int, int]]:
    """In fused matrices, weights of block scales begin at multiples of 128 rows, those of other schemes anywhere."""
    return {shape for model in MODELS for unit in (1, BLOCK) for shape in matrices(configuration(model), unit).values()}


def _fp8_compiled(share: fp8.Share, rows: int, columns: int) -> tuple[fp8.Share, int, int]:
    if isinstance(share, fp8_gemm.Decode):
        share = share._replace(splits=min(share.splits, 2))
    if isinstance(share, Vector):
        return share, 256, columns
    return share, 256, 512 if columns % BLOCK == 0 else 576


OPERATIONS = {
    "fp8": Operation(
        "fp8_gemm", _fp8_weights, fp8_gemm.rule, fp8.candidates, fp8.random_weights, fp8.quantized_tokens, fp8.calls,
        fp8.table_row, _fp8_compiled,
    ),
    "int4": Operation(
        "int4_gemm", lambda: {shape for model in MODELS for shape in weight_only.int4_shapes(model).values()},
        int4_gemm.rule, weight_only.int4_candidates, weight_only.int4_weights, random_bf16, weight_only.int4_calls,
        weight_only.int4_row,
        lambda share, rows, columns: (share, 256, columns if isinstance(share, Held) else 512),
    ),
}  # fmt: skip


def tune(names: Sequence[str], folder: Path, say: Callable[[str], object]) -> Path:
    """Tune the operations of these names and write their part of this GPU's table, in `folder`; `say` gets a line for
    each weight. Raises UsageError without a Hopper GPU."""
    check_device()
    torch.manual_seed(0)
    operations = [OPERATIONS[name] for name in names]
    started = time.perf_counter()
    say(f"compiled {precompile(operations)} candidates in {time.perf_counter() - started:.0f} s")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / launch.path_of(torch.cuda.get_device_name(), triton.__version__).name
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    table |= {
        "gpu": torch.cuda.get_device_name(),
        "capability": launch.capability_of_this_device(),
        "triton": launch.minor_version(triton.__version__),
    }
    for operation in operations:
        table[operation.name] = found = {}
        for rows, columns in sorted(operation.weights(), reverse=True):
            found[f"{rows}x{columns}"] = tuned(operation, rows, columns, say)
            path.write_text(as_text(table), encoding="utf-8")
    launch.read_table(path)
    return path


def tuned(operation: Operation, rows: int, columns: int, say: Callable[[str], object]) -> dict[str, list[Any]]:
    """The rows of the table of one weight, by tokens."""
    weights, found, changed = operation.random_weights(rows, columns, None), {}, []
    for tokens in TOKENS:
        x = operation.random_tokens(tokens, columns)
        ruled = operation.rule(tokens, rows, columns)
        shares = list(dict.fromkeys([ruled, *operation.candidates(tokens, rows, columns)]))
        times = time_all({share: operation.calls(weights, x, share) for share in shares})
        best = decide(times, ruled)
        row = found[str(tokens)] = operation.table_row(best)
        if best != ruled:
            changed.append(f"M={tokens} {times[ruled]:.1f} → {times[best]:.1f} µs {' '.join(map(str, row))}")
    say(f"{operation.name} {rows}×{columns}: {'; '.join(changed) or 'all by the rule'}")
    return found


def time_all(calls: Mapping[Any, list[Callable[[], torch.Tensor]]]) -> dict[Any, float]:
    """µs of the shares that reach the second round; the first of `calls` is always one of them.

    All are given the same operands. A share whose result is not the first's is left out, as is one that needs more
    memory than a multiprocessor has. Raises ValueError where that is the first.
    """
    shares = list(calls)
    replays, expected = {}, None
    for share in shares:
        try:
            result = calls[share][0]()
        except OutOfResources:
            continue
        expected = result.double() if expected is None else expected
        if frobenius(result, expected) <= APART:
            replays[share] = recorded(calls[share])
    if shares[0] not in replays:
        raise ValueError(f"{shares[0]} can't be run, or its result is not finite")
    first = {share: replay(ROUNDS[0]) for share, replay in replays.items()}
    near = sorted((s for s in first if first[s] <= CLOSE * min(first.values())), key=first.__getitem__)
    return {share: replays[share](ROUNDS[1]) for share in dict.fromkeys([shares[0], *near[:FINALISTS]])}


def decide(times: Mapping[Any, float], ruled: Any) -> Any:
    """The rule's choice, or the fastest where that is faster by more than 2 %."""
    best = min(times, key=times.__getitem__)
    return best if times[best] < FASTER * times[ruled] else ruled


def precompile(operations: Sequence[Operation]) -> int:
    """Run each candidate once on a small weight, in processes of their own: their kernels are in Triton's cache then.
    Returns how many there were."""
    jobs = {
        (key, *operation.compiled(share, rows, columns)): None
        for key, operation in OPERATIONS.items()
        if operation in operations
        for rows, columns in operation.weights()
        for tokens in TOKENS
        for share in (operation.rule(tokens, rows, columns), *operation.candidates(tokens, rows, columns))
    }
    workers = min(processors(), 16)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, jobs))
    return len(jobs)


def _compile(job: tuple[str, Any, int, int]) -> None:
    name, share, rows, columns = job
    operation = OPERATIONS[name]
    weights = operation.random_weights(rows, columns, 1)
    try:
        for tokens in (1, 4):
            operation.calls(weights, operation.random_tokens(tokens, columns), share)[0]()
    except OutOfResources:
        return


def as_text(table: Mapping[str, Any]) -> str:
    """JSON with a line for each share."""
    lines = []
    for operation, weights in table.items():
        if isinstance(weights, str):
            lines.append(f"  {json.dumps(operation)}: {json.dumps(weights)}")
            continue
        by_weight = []
        for shape, by_tokens in weights.items():
            shares = ",\n".join(f'      "{tokens}": {json.dumps(share)}' for tokens, share in by_tokens.items())
            by_weight.append(f'    "{shape}": {{\n{shares}\n    }}')
        inner = ",\n".join(by_weight)
        lines.append(f'  "{operation}": {{\n{inner}\n  }}')
    return "{\n" + ",\n".join(lines) + "\n}\n"
