"""The published models' configurations, and the matrices that a fused runtime multiplies by.

A model of random weights, quantized on the device as they are made: what `bench model` runs without a checkpoint.

Each weight is normal, as wide as keeps activations at the size they have (norms are 1), rounded to BF16 and encoded as
`convert` does by `rtn`; the same name and seed give the same weight on the same kind of device. One weight's
temporaries are in memory at a time.

A model to measure, and the bytes that its decoding must read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import torch

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.deepseek_v2 import architecture
from dsv2quant.arch.spec import TensorSpec
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.fused_model import FusedModel
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.source import CheckpointSource, Source
from dsv2quant.planning import recipe
from dsv2quant.planning.recipe import Recipe

MODELS = ("v2", "v2-lite")  # deepseek-ai/DeepSeek-V2 and DeepSeek-V2-Lite


def configuration(model: str) -> ModelConfig:
    """Of one of MODELS: what its config.json says, without what does not concern the model."""
    text = resources.files("dsv2quant").joinpath("bench", "configs", f"{model}.json").read_text(encoding="utf-8")
    return ModelConfig.from_dict(json.loads(text), f"{model}.json")


def matrices(config: ModelConfig, unit: int = 1) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every weight but the routed experts', those that have an input in common as one, in which each
    has rows in multiples of `unit`."""
    model = architecture(config)
    groups: dict[str, list[TensorSpec]] = {}
    for layer in dict.fromkeys((config.num_hidden_layers - 1, 0)):  # an MoE, and a dense one
        for spec in model.layer(layer):
            if not spec.keep and spec.expert is None:
                groups.setdefault(str(spec.site), []).append(spec)

    def rows(specs: list[TensorSpec]) -> int:
        return specs[0].shape[0] if len(specs) == 1 else sum(-(-spec.shape[0] // unit) * unit for spec in specs)

    return {_label(specs): (rows(specs), specs[0].shape[1]) for specs in groups.values()}


def _label(specs: list[TensorSpec]) -> str:
    """'q_a + kv_a', 'shared gate + up'."""
    ffn, _, _ = specs[0].role.rpartition(".")
    names = " + ".join(spec.role.rpartition(".")[2].partition("_proj")[0] for spec in specs)
    return f"{ffn} {names}".strip()


class RandomWeights:
    """The weights of a configuration under a recipe, by the interface of model/source.py."""

    def __init__(self, config: ModelConfig, recipe: Recipe | None, device: str = "cuda", seed: int = 0) -> None:
        self.name, self.config = "random weights", config
        self.recipe, self.device, self.seed = recipe, device, seed
        self.dtype = torch.bfloat16
        self._specs = {spec.name: spec for spec in architecture(config).specs()}

    def scheme(self, module: str) -> str:
        """The recipe's, or bf16 where a weight's shape can't have it."""
        spec = self._specs[f"{module}.weight"]
        scheme = self.recipe.assign(spec)[0] if self.recipe else "bf16"
        return "bf16" if CODECS[scheme].refusal(spec.shape) else scheme

    def stored(self, module: str) -> tuple[str, dict[str, torch.Tensor]]:
        """A matrix' scheme and its parts by suffix, as formats/ names and shapes them."""
        spec = self._specs[f"{module}.weight"]
        scheme = self.scheme(module)
        return scheme, CODECS[scheme].encode_tensor(self._random(spec))

    def plain(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """A bias, norm, router, embedding or head in `dtype`, or None where the model has no such tensor."""
        spec = self._specs.get(name)
        return None if spec is None else self._random(spec).to(dtype or self.dtype)

    def activation(self, scheme: str) -> str | None:
        """How activations are quantized that meet weights of the scheme."""
        return CODECS[scheme].activation

    def kv_scale(self, layer: int) -> torch.Tensor | None:
        """None: an FP8 cache has scale 1."""
        return None

    def _random(self, spec: TensorSpec) -> torch.Tensor:
        """In BF16."""
        if spec.role in ("norm", "bias"):
            return torch.full(spec.shape, float(spec.role == "norm"), dtype=torch.bfloat16, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(spec.name.encode(), self.seed))
        weight = torch.empty(spec.shape, dtype=torch.bfloat16, device=self.device)
        return weight.normal_(std=spec.shape[1] ** -0.5, generator=generator)


CACHE_BYTES = 2  # of a number in the cache: BF16


class Subject(NamedTuple):
    """A model: `nbytes` says what a weight takes as it is stored, `load` makes the runtime."""

    name: str
    scheme: str
    config: ModelConfig
    nbytes: Callable[[TensorSpec], int]
    load: Callable[[], FusedModel]


def random(name: str, scheme: str) -> Subject:
    """Random weights in the shape of one of shapes.MODELS, under a recipe of the package, or in BF16."""
    source = RandomWeights(configuration(name), None if scheme == "bf16" else recipe.builtin(scheme))

    def nbytes(spec: TensorSpec) -> int:
        return sum(part.nbytes for part in CODECS[source.scheme(spec.module)].layout(spec.shape))

    return Subject(name, scheme, source.config, nbytes, lambda: _fused(source))


def stored(model: str, **hub: Any) -> Subject:
    """A checkpoint, an artifact or a GGUF file. Raises InputError as Checkpoint.open does."""
    checkpoint = Checkpoint.open(model, **hub)
    nbytes = {weight.spec: weight.nbytes for weight in checkpoint.weights}
    schemes = ", ".join(sorted({weight.scheme for weight in checkpoint.weights}))
    return Subject(
        checkpoint.model, schemes, checkpoint.config, nbytes.__getitem__,
        lambda: _fused(CheckpointSource(checkpoint, "cuda")),
    )  # fmt: skip


def _fused(source: Source) -> FusedModel:
    return FusedModel(source, LoadOptions(torch.bfloat16, "cuda", backend="kernels"))


def bytes_per_step(config: ModelConfig, nbytes: Callable[[TensorSpec], int], batch: int, context: int) -> int:
    """What decoding one token of each of `batch` sequences must read, behind `context` tokens of each.

    All weights once, of the embedding one row a sequence, of the routed experts as many as are expected where each
    token chooses any with the same probability; and the cache, in BF16.
    """
    c = config
    active = 1 - (1 - c.num_experts_per_tok / c.n_routed_experts) ** batch if c.n_routed_experts else 0.0
    total = batch * context * c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim) * CACHE_BYTES
    experts = 0
    for spec in architecture(c).specs():
        if spec.role.startswith("routed."):
            experts += nbytes(spec)
        elif spec.role == "embed" and not c.tie_word_embeddings:
            total += batch * nbytes(spec) // c.vocab_size
        else:
            total += nbytes(spec)
    return total + round(active * experts)
