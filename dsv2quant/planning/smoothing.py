"""Smoothing, or scale migration: scalings of a linear's input channels that move into what produces them, and leave the
model as it is.

    W x = (W S) (S⁻¹ x)     columns of the consumers × 2ᵉ, rows of the producer × 2⁻ᵉ

In DeepSeek-V2 these are legal, and no others of this kind (`TensorSpec.producer`): a norm in front of every linear that
reads it (the router is one of them, and so are all rows of kv_a_proj_with_mqa), up_proj in front of down_proj (not
gate_proj: SiLU is not linear), and the V rows of kv_b_proj in front of o_proj. Scales are powers of two: what stays
BF16, the router above all, keeps its digits, and every token its experts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.spec import TensorSpec
from dsv2quant.errors import InputError, listing
from dsv2quant.formats.codec import widened
from dsv2quant.storage.files import read_bytes
from dsv2quant.storage.safetensors import read_header, stored_tensors

SMOOTHING_FILE = "dsv2quant.folds"  # safetensors inside, but not its name: consumers load all files of that name
MAX_FOLDS_BYTES = 256 << 20
_AGAIN = "get it again, or convert again"
REACH = 8  # exponents lie within ±8: far beyond what helps, far within BF16's range


@dataclass(frozen=True)
class SmoothingPair:
    """Linears that share an input, [·, K] each, and the producer of its K channels: a norm [K], or rows of a matrix."""

    consumers: tuple[TensorSpec, ...]
    producer: TensorSpec
    rows: np.ndarray | None = None  # those of the producer, in the channels' order; None: all


def smoothing_pairs(config: ModelConfig, layer: int) -> list[SmoothingPair]:
    """Every smoothing of a layer."""
    specs = architecture(config).layer(layer)
    named = {spec.name: spec for spec in specs}
    consumers: dict[str, list[TensorSpec]] = {}
    for spec in sorted(specs, key=lambda spec: spec.expert is not None):  # before an expert what all tokens come by
        if spec.producer is not None:
            consumers.setdefault(spec.producer, []).append(spec)
    return [SmoothingPair(tuple(c), named[name], _value_rows(named[name])) for name, c in consumers.items()]


def _value_rows(producer: TensorSpec) -> np.ndarray | None:
    """Those that make values, of a matrix with heads."""
    if producer.heads is None:
        return None
    return np.arange(producer.shape[0]).reshape(producer.heads.count, -1)[:, producer.heads.keys :].reshape(-1)


class Smoothing:
    """Chosen exponents, int8, by tensor name: of a producer's rows and of a consumer's columns."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = dict(tensors)

    @staticmethod
    def of(pair: SmoothingPair, exponents: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors that record e [K] for a pair."""
        rows = np.zeros(pair.producer.shape[0], np.int8)
        rows[slice(None) if pair.rows is None else pair.rows] = -exponents
        return {f"{pair.producer.name}.rows": rows} | {f"{spec.name}.columns": exponents for spec in pair.consumers}

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        return save(self.tensors)

    @classmethod
    def open(cls, path: Path, config: ModelConfig) -> Smoothing:
        """Those of an artifact of such a model; empty where it has none. Raises InputError for a damaged file: all
        tensors of a pair must say the same, so that together they leave the model as it is."""
        if not os.path.lexists(path):
            return cls({})
        content, tensors = read_bytes(path, MAX_FOLDS_BYTES), {}
        header, start = read_header(path)
        for stored in stored_tensors(header, path.name, path):
            begin = start + stored.begin
            if stored.dtype != "I8":
                raise InputError(f"{stored.name} is {stored.dtype}, not I8", where=path, fix=_AGAIN)
            tensors[stored.name] = np.frombuffer(content[begin : begin + stored.nbytes], np.int8).reshape(stored.shape)
        left = dict(tensors)
        for pair in (pair for layer in range(config.num_hidden_layers) for pair in smoothing_pairs(config, layer)):
            exponents = tensors.get(f"{pair.consumers[0].name}.columns")
            if exponents is None:
                continue
            if exponents.shape != pair.consumers[0].shape[1:] or abs(exponents.astype(np.int16)).max() > REACH:
                what = f"{pair.consumers[0].name}.columns is no smoothing of this model's"
                raise InputError(what, where=path, fix=_AGAIN)
            for name, wanted in cls.of(pair, exponents).items():
                if name not in left or not np.array_equal(left.pop(name), wanted):
                    raise InputError(f"{name} is missing or does not undo its smoothing", where=path, fix=_AGAIN)
        if left:
            raise InputError(f"{listing(sorted(left))} belongs to no smoothing", where=path, fix=_AGAIN)
        return cls(tensors)

    def columns(self, spec: TensorSpec) -> np.ndarray | None:
        """Exponents of a matrix's columns; None where they stay."""
        return self.tensors.get(f"{spec.name}.columns")

    def rows(self, spec: TensorSpec) -> np.ndarray | None:
        """Exponents of a weight's rows; None where they stay."""
        return self.tensors.get(f"{spec.name}.rows")

    def apply(self, spec: TensorSpec, weight: np.ndarray) -> np.ndarray:
        """A weight as it is quantized: BF16 bits (uint16) or float32 in, the same or float32 out."""
        rows, columns = self.rows(spec), self.columns(spec)
        if rows is None and columns is None:
            return weight
        x = widened(weight)
        if rows is not None:
            x = np.ldexp(x, rows if x.ndim == 1 else rows[:, None])
        return x if columns is None else np.ldexp(x, columns)
