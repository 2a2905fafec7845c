"""The error of an artifact's tensors against its source: both are read, decoded and compared piece by piece, a piece
being so many rows that what is computed of it stays in a core's cache."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from dsv2quant.checkpoint import Checkpoint, Weight
from dsv2quant.errors import InputError, listing
from dsv2quant.folds import FOLDS_FILE, Folds
from dsv2quant.formats.codec import CODECS
from dsv2quant.formats.part import ROWS_APART
from dsv2quant.model.load import decode, decode_parts, stored_tensor
from dsv2quant.names import Slot

MAX_IN_FLIGHT = 256 << 20  # bytes of stored weights that are being compared
PIECE = {"cpu": 1 << 18}  # weights of a piece
PIECE_OF_DEVICE = 1 << 24


@dataclass(frozen=True)
class TensorError:
    """Error of one decoded weight against its source: signal and noise are sums of squares."""

    name: str
    role: str
    scheme: str
    signal: float
    noise: float
    max_error: float

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise in dB; infinite where the weight is exact."""
        return sqnr(self.signal, self.noise)


def sqnr(signal: float, noise: float) -> float:
    """10 · log10(signal / noise); infinite without noise."""
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def check_layout(artifact: Checkpoint, source: Checkpoint) -> None:
    """Raise InputError where artifact and source are not the same model."""
    ours = {w.slot.name: w.slot.shape for w in artifact.weights}
    theirs = {w.slot.name: w.slot.shape for w in source.weights}
    differing = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    if differing:
        what = f"{source.model} is another model: {listing(sorted(differing))}"
        raise InputError(what, where=artifact.model, fix="give the checkpoint it was made from")


def decoded_dtype(artifact: Checkpoint) -> torch.dtype:
    """BF16, in which DeepSeek-V2 is served; float32 of a GGUF file's blocks, which llama.cpp multiplies as they are."""
    return torch.bfloat16 if artifact.metadata is None else torch.float32


def bytes_compared(artifact: Checkpoint, source: Checkpoint) -> int:
    """What `compare_tensors` reads."""
    return sum(weight.nbytes for checkpoint in (artifact, source) for weight in checkpoint.weights)


def compare_tensors(
    artifact: Checkpoint, source: Checkpoint, progress: Callable[[int], object], device: str = "cpu"
) -> list[TensorError]:
    """The error of every weight as consumers decode it (`decoded_dtype`), against the source's exact values, folded as
    in the artifact."""
    wanted = {w.slot.name: w for w in source.weights}
    folds = Folds({}) if artifact.folder is None else Folds.open(artifact.folder / FOLDS_FILE, artifact.config)
    running: deque[tuple[int, Future[TensorError]]] = deque()
    errors = []

    def finish_oldest() -> None:
        nbytes, future = running.popleft()
        errors.append(future.result())
        progress(nbytes)

    with _single_threaded(), ThreadPoolExecutor(min(16, os.cpu_count() or 1) if device == "cpu" else 2) as workers:
        try:
            for weight in artifact.weights:
                exact = wanted[weight.slot.name]
                nbytes = weight.nbytes + exact.nbytes
                while running and sum(held for held, _ in running) + nbytes > MAX_IN_FLIGHT:
                    finish_oldest()
                future = workers.submit(_tensor_error, artifact, weight, source, exact, folds, device)
                running.append((nbytes, future))
            while running:
                finish_oldest()
        finally:
            workers.shutdown(wait=False, cancel_futures=True)
    return errors


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Threads within torch's operations would wait for those that compare other tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tensor_error(
    artifact: Checkpoint, weight: Weight, source: Checkpoint, wanted: Weight, folds: Folds, device: str
) -> TensorError:
    rows = weight.slot.shape[0]
    step = PIECE.get(device, PIECE_OF_DEVICE) * rows // weight.slot.size
    step = max(step // ROWS_APART, 1) * ROWS_APART
    decoded, exact = (
        _reader(artifact, weight, decoded_dtype(artifact), device), _reader(source, wanted, torch.float32, device)
    )  # fmt: skip
    signal = noise = largest = 0.0
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        x = _folded(exact(begin, end), folds, weight.slot, begin)
        difference = torch.sub(decoded(begin, end).float(), x)
        furthest = max(abs(float(extreme)) for extreme in torch.aminmax(difference))  # NaN is both
        if not math.isfinite(furthest):
            what = f"{weight.slot.name} is NaN or infinite, there or in {source.model}"
            raise InputError(what, where=artifact.model, fix="one of them is damaged: get it again, or convert again")
        signal += _squares(x)
        noise += _squares(difference) if furthest else 0.0
        largest = max(largest, furthest)
    return TensorError(weight.slot.name, weight.slot.role, weight.stored_scheme, signal, noise, largest)


def _squares(x: torch.Tensor) -> float:
    """The sum of squares, in float64 where float32 does not hold it."""
    x = x.reshape(-1)
    total = float(torch.dot(x, x))
    return total if 1e-30 < total < math.inf else float(x.double().square().sum())


def _folded(x: torch.Tensor, folds: Folds, slot: Slot, begin: int) -> torch.Tensor:
    """Rows of a weight from `begin` as they were quantized. The factors are powers of two."""
    rows, columns = folds.rows(slot), folds.columns(slot)
    for exponents in (
        None if rows is None else rows[begin : begin + len(x)].reshape(-1, *(1,) * (x.ndim - 1)), columns
    ):  # fmt: skip
        if exponents is not None:
            x = x * torch.from_numpy(np.ldexp(np.float32(1), exponents)).to(x.device)
    return x


def _reader(
    checkpoint: Checkpoint, weight: Weight, dtype: torch.dtype, device: str
) -> Callable[[int, int], torch.Tensor]:
    """A function (begin, end) that gives these rows of a weight, decoded to `dtype`."""
    if len(weight.parts) == 1 and (weight.scheme == "bf16" or checkpoint.metadata is not None):
        return lambda begin, end: decode(checkpoint, _rows(weight, begin, end), dtype, device)
    if checkpoint.metadata is not None:
        whole = decode(checkpoint, weight, dtype, device)
        return lambda begin, end: whole[begin:end]
    parts = {suffix: stored_tensor(checkpoint, part, device) for suffix, part in weight.parts.items()}
    codec = CODECS[weight.scheme]
    return lambda begin, end: decode_parts(checkpoint, weight, codec.rows(parts, begin, end), dtype)


def _rows(weight: Weight, begin: int, end: int) -> Weight:
    """Some rows of a weight that is one part, as a weight."""
    (suffix, part), shape = next(iter(weight.parts.items())), (end - begin, *weight.slot.shape[1:])
    width = part.nbytes // weight.slot.shape[0]
    part = replace(part, shape=shape, begin=part.begin + begin * width, nbytes=(end - begin) * width)
    return replace(weight, parts={suffix: part})
