"""The stored tensors a weight becomes, the dtypes they may have, and what encoding may know of its inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dsv2quant.errors import InputError

# Bytes per element of the safetensors dtypes (safetensors/src/tensor.rs); the sub-byte ones never occur here.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
# How encoded parts hold the bits of those that occur in artifacts.
HELD_AS = {
    "BF16": np.uint16, "F16": np.float16, "F32": np.float32, "F8_E4M3": np.uint8, "I32": np.int32, "I64": np.int64,
}  # fmt: skip
PLAIN_DTYPES = ("BF16", "F16", "F32")
ROWS_APART = 128  # wherever a weight is cut into rows (`Codec.rows`), every codec's parts can be


@dataclass(frozen=True)
class Part:
    """One stored tensor of a weight: `<module>.<suffix>`, its safetensors dtype and its shape."""

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        n = DTYPE_BYTES[self.dtype]
        for dim in self.shape:
            n *= dim
        return n


@dataclass(frozen=True)
class Inputs:
    """What calibration measured of a weight's inputs: the mean square of each channel (float32 [in]), and the largest
    magnitude of all."""

    importance: np.ndarray
    amax: float


class TooLargeError(ValueError):
    """A weight needs larger scales than its layout stores: `which` of the weights given to `encode`."""

    def __init__(self, which: int) -> None:
        super().__init__(f"weight {which} has values too large for its scales")
        self.which = which


def too_large(module: str, scheme: str) -> InputError:
    """The error to raise for the module of such a weight."""
    what = f"has values too large for the float16 scales of {scheme}"
    return InputError(what, where=module, fix="leave out --format: compressed-tensors has BF16 scales")


class NonFiniteError(ValueError):
    """A weight holds NaN or infinity: `which` of the weights given to `encode`, and its first offending index."""

    def __init__(self, which: int, index: tuple[int, ...]) -> None:
        super().__init__(f"weight {which} is not finite at {index}")
        self.which, self.index = which, index
