"""Where the kernels' runtime gets a model's weights: as they are stored, on the device."""

from __future__ import annotations

from typing import Protocol

import torch

from dsv2quant.arch.config import ModelConfig
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.formats.quant_config import activations_quantized
from dsv2quant.formats.schemes import CODECS
from dsv2quant.kernels import gguf_layout


class Source(Protocol):
    """A model's weights by module, which a checkpoint has, or a benchmark makes up."""

    @property
    def name(self) -> str:
        """What errors call the model."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype:
        """That of plain weights, and of what is computed: BF16, the kernels' own; their references take float32,
        too."""

    def scheme(self, module: str) -> str:
        """A weight's scheme."""

    def stored(self, module: str) -> tuple[str, dict[str, torch.Tensor]]:
        """A weight's scheme and its parts by suffix, as formats/ names and shapes them; plain ones as 'bf16' with the
        one part 'weight', of GGUF's types ('q4_k') the one part `BLOCKS` of weights.py."""

    def plain(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """A bias, norm, router, embedding or head in `dtype`, or None where the model has no such tensor."""

    def activation(self, scheme: str) -> str | None:
        """How the activations are quantized that meet a weight: 'token', 'group128', 'static' or None."""

    def kv_scale(self, layer: int) -> torch.Tensor | None:
        """A layer's KV-cache scale, float32 [1]."""


class CheckpointSource:
    """The weights of a checkpoint, an artifact or a GGUF file. Blocks that have no kernel come as plain weights."""

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.name, self.config = checkpoint.model, checkpoint.config
        self._by_name = {weight.spec.name: weight for weight in checkpoint.weights}
        self._activations = activations_quantized(checkpoint.config.quantization)

    def scheme(self, module: str) -> str:
        weight = self._by_name[f"{module}.weight"]
        # A GGUF file has kv_b_proj in halves, of which one is transposed.
        as_blocks = len(weight.parts) == 1 and gguf_layout.supported(weight.scheme.upper())
        return weight.scheme if weight.scheme in CODECS or as_blocks else "bf16"

    def stored(self, module: str) -> tuple[str, dict[str, torch.Tensor]]:
        weight, scheme = self._by_name[f"{module}.weight"], self.scheme(module)
        if scheme == "bf16":
            return scheme, {"weight": self.checkpoint.decode(weight, self.dtype, self.device)}
        return scheme, self.checkpoint.parts(weight, self.device)

    def plain(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        weight = self._by_name.get(name)
        return None if weight is None else self.checkpoint.decode(weight, dtype or self.dtype, self.device)

    def activation(self, scheme: str) -> str | None:
        return CODECS[scheme].activation if self._activations and scheme in CODECS else None

    def kv_scale(self, layer: int) -> torch.Tensor | None:
        return self.checkpoint.kv_scale(layer, self.device)
