"""Folds: scalings of a linear's input channels that move into what produces them, and leave the model as it is.

    W x = (W S) (S⁻¹ x)     columns of the consumers × 2ᵉ, rows of the producer × 2⁻ᵉ

In DeepSeek-V2 these are legal, and no others of this kind: a norm in front of every linear that reads it (the router
is one of them, and so are all rows of kv_a_proj_with_mqa), up_proj in front of down_proj (not gate_proj: SiLU is not
linear), and the V rows of kv_b_proj in front of o_proj. Scales are powers of two: what stays BF16, the router above
all, keeps its digits, and every token its experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from dsv2quant.config import ModelConfig
from dsv2quant.errors import InputError
from dsv2quant.files import AGAIN, read_bytes
from dsv2quant.names import Slot, layer_slots, model_slots

FOLDS_FILE = "dsv2quant.folds"  # safetensors inside, but not its name: consumers load all files of that name
MAX_FOLDS_BYTES = 256 << 20


@dataclass(frozen=True)
class Fold:
    """Linears that share an input, [·, K] each, and the producer of its K channels: a norm [K], or rows of a matrix."""

    consumers: tuple[Slot, ...]
    producer: Slot
    rows: np.ndarray | None = None  # those of the producer, in the channels' order; None: all


def layer_folds(config: ModelConfig, layer: int) -> list[Fold]:
    """Every fold of a layer."""
    at = f"model.layers.{layer}"
    slots = {slot.module: slot for slot in layer_slots(config, layer) if slot.role != "bias"}

    def named(*modules: str) -> tuple[Slot, ...]:
        return tuple(slots[f"{at}.{module}"] for module in modules if f"{at}.{module}" in slots)

    def fold(consumers: tuple[Slot, ...], producer: str, rows: np.ndarray | None = None) -> Fold:
        return Fold(consumers, slots[f"{at}.{producer}"], rows)

    queries = named("self_attn.q_proj", "self_attn.q_a_proj")
    folds = [fold((*queries, *named("self_attn.kv_a_proj_with_mqa")), "input_layernorm")]
    if config.q_lora_rank is not None:
        folds.append(fold(named("self_attn.q_b_proj"), "self_attn.q_a_layernorm"))
    folds.append(fold(named("self_attn.kv_b_proj"), "self_attn.kv_a_layernorm"))
    keys, values = config.qk_nope_head_dim, config.v_head_dim
    heads = np.arange(config.num_attention_heads)[:, None] * (keys + values)
    folds.append(fold(named("self_attn.o_proj"), "self_attn.kv_b_proj", (heads + keys + np.arange(values)).reshape(-1)))
    every = ["mlp", "mlp.shared_experts", *(f"mlp.experts.{e}" for e in range(config.n_routed_experts))]
    ffns = [ffn for ffn in every if f"{at}.{ffn}.up_proj" in slots]
    readers = [f"{ffn}.{name}" for ffn in ffns for name in ("gate_proj", "up_proj")]
    folds.append(fold(named("mlp.gate", *readers), "post_attention_layernorm"))
    return folds + [fold(named(f"{ffn}.down_proj"), f"{ffn}.up_proj") for ffn in ffns]


class Folds:
    """Chosen exponents, int8, by tensor name: of a producer's rows and of a consumer's columns."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.tensors = dict(tensors)

    @staticmethod
    def of(fold: Fold, exponents: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors that record e [K] for a fold."""
        rows = np.zeros(fold.producer.shape[0], np.int8)
        rows[slice(None) if fold.rows is None else fold.rows] = -exponents
        return {f"{fold.producer.name}.rows": rows} | {f"{slot.name}.columns": exponents for slot in fold.consumers}

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        return save(self.tensors)

    @classmethod
    def open(cls, path: Path, config: ModelConfig) -> Folds:
        """Those of an artifact; empty where it has none. Raises InputError where the file is damaged, or another
        model's."""
        if not path.exists():
            return cls({})
        try:
            stored = deserialize(read_bytes(path, MAX_FOLDS_BYTES))
        except SafetensorError as error:
            raise InputError(f"can't be read: {error}", where=path, fix=AGAIN) from None
        slots = {slot.name: slot for slot in model_slots(config)}
        tensors: dict[str, np.ndarray] = {}
        for name, part in stored:
            slot, _, kind = name.rpartition(".")
            dim = {"rows": 0, "columns": -1}.get(kind)
            if slot not in slots or dim is None or part["dtype"] != "I8" or part["shape"] != [slots[slot].shape[dim]]:
                raise InputError(f"{name} is no fold of this model", where=path, fix=AGAIN)
            tensors[name] = np.frombuffer(part["data"], np.int8)
        return cls(tensors)

    def columns(self, slot: Slot) -> np.ndarray | None:
        """Exponents of a matrix's columns; None where they stay."""
        return self.tensors.get(f"{slot.name}.columns")

    def rows(self, slot: Slot) -> np.ndarray | None:
        """Exponents of a weight's rows; None where they stay."""
        return self.tensors.get(f"{slot.name}.rows")

    def apply(self, slot: Slot, weight: np.ndarray) -> np.ndarray:
        """A weight as it is quantized: BF16 bits (uint16) or float32 in, the same or float32 out."""
        rows, columns = self.rows(slot), self.columns(slot)
        if rows is None and columns is None:
            return weight
        x = weight if weight.dtype == np.float32 else (weight.astype(np.uint32) << 16).view(np.float32)
        if rows is not None:
            x = np.ldexp(x, rows if x.ndim == 1 else rows[:, None])
        return x if columns is None else np.ldexp(x, columns)
