"""What an artifact has of each weight of its model, as tuning holds it: trained, or as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from dsv2quant.arch.spec import TensorSpec
from dsv2quant.calib.trained import Blocks, Grouped, Parts, Plain
from dsv2quant.calib.whole import Held, Put
from dsv2quant.checkpoint.dtypes import tensors_of
from dsv2quant.checkpoint.gguf import GgufCheckpoint
from dsv2quant.checkpoint.weights import BLOCKS
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning.plan import Entry

CONTINUOUS = ("norm", "router")  # roles that are trained where they are plain numbers


def of_folder(entries: Iterable[Entry], stored: Callable[[Entry], Parts]) -> Held:
    """Of a plan's artifact; `stored` gives what it has of a weight, by suffix."""
    by_name = {entry.spec.name: entry for entry in entries}

    def held(spec: TensorSpec, put: Put, device: torch.device) -> Grouped | Plain | torch.Tensor:
        entry = by_name[spec.name]
        parts, codec = stored(entry), CODECS[entry.scheme]
        if codec.integers is not None:
            return Grouped(spec.name, put, parts, codec.integers, device)
        values = codec.decode(tensors_of(codec.layout(spec.shape), parts, device), torch.float32)
        return Plain(spec.name, put, values, is_bf16=True) if spec.role in CONTINUOUS else values

    return held


def of_gguf(file: GgufCheckpoint) -> Held:
    """Of a GGUF file. kv_b_proj's halves stay as they are."""
    by_name = {weight.spec.name: weight for weight in file.weights}

    def held(spec: TensorSpec, put: Put, device: torch.device) -> Blocks | Plain | torch.Tensor:
        weight = by_name[spec.name]
        if weight.scheme == "bf16" or len(weight.parts) > 1:
            values = file.decode(weight, torch.float32, str(device))
            is_trained = spec.role in CONTINUOUS and weight.stored.dtype == "F32"
            return Plain(spec.name, put, values, is_bf16=False) if is_trained else values
        blocks: np.ndarray = file.parts(weight)[BLOCKS].numpy()
        return Blocks(spec.name, put, weight.stored.dtype, blocks, device)

    return held
