"""A model to measure, and the bytes that its decoding must read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dsv2quant import recipe
from dsv2quant.bench.random_weights import RandomWeights
from dsv2quant.bench.shapes import configuration
from dsv2quant.checkpoint import Checkpoint
from dsv2quant.config import ModelConfig
from dsv2quant.formats.codec import CODECS
from dsv2quant.model.fused_model import FusedModel
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.source import CheckpointSource, Source
from dsv2quant.names import Slot, model_slots

CACHE_BYTES = 2  # of a number in the cache: BF16


class Subject(NamedTuple):
    """A model: `nbytes` says what a weight takes as it is stored, `load` makes the runtime."""

    name: str
    scheme: str
    config: ModelConfig
    nbytes: Callable[[Slot], int]
    load: Callable[[], FusedModel]


def random(name: str, scheme: str) -> Subject:
    """Random weights in the shape of one of shapes.MODELS, under a recipe of the package, or in BF16."""
    source = RandomWeights(configuration(name), None if scheme == "bf16" else recipe.builtin(scheme))

    def nbytes(slot: Slot) -> int:
        return sum(part.nbytes for part in CODECS[source.scheme(slot.module)].layout(slot.shape))

    return Subject(name, scheme, source.config, nbytes, lambda: _fused(source))


def stored(model: str, **hub: Any) -> Subject:
    """A checkpoint, an artifact or a GGUF file. Raises InputError as Checkpoint.open does."""
    checkpoint = Checkpoint.open(model, **hub)
    nbytes = {weight.slot: weight.nbytes for weight in checkpoint.weights}
    schemes = ", ".join(sorted({weight.scheme for weight in checkpoint.weights}))
    return Subject(
        checkpoint.model, schemes, checkpoint.config, nbytes.__getitem__,
        lambda: _fused(CheckpointSource(checkpoint, "cuda")),
    )  # fmt: skip


def _fused(source: Source) -> FusedModel:
    return FusedModel(source, LoadOptions(torch.bfloat16, "cuda", backend="kernels"))


def bytes_per_step(config: ModelConfig, nbytes: Callable[[Slot], int], batch: int, context: int) -> int:
    """What decoding one token of each of `batch` sequences must read, behind `context` tokens of each.

    All weights once, of the embedding one row a sequence, of the routed experts as many as are expected where each
    token chooses any with the same probability; and the cache, in BF16.
    """
    c = config
    active = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** batch if c.n_routed_experts else 0.0
    total = batch * context * c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim) * CACHE_BYTES
    experts = 0
    for slot in model_slots(c):
        if slot.role.startswith("routed."):
            experts += nbytes(slot)
        elif slot.role == "embed" and not c.tie_word_embeddings:
            total += batch * nbytes(slot) // c.vocab_size
        else:
            total += nbytes(slot)
    return total + round(active * experts)
