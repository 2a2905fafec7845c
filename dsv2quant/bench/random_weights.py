"""A model of random weights, quantized on the device as they are made: what `bench model` runs without a checkpoint.

Each weight is normal, as wide as keeps activations at the size they have (norms are 1), rounded to BF16 and encoded as
`convert` does by `rtn`; the same name and seed give the same weight on the same kind of device. One weight's
temporaries are in memory at a time.
"""

from __future__ import annotations

import zlib

import torch

from dsv2quant.config import ModelConfig
from dsv2quant.formats.codec import CODECS
from dsv2quant.formats.fp8 import Fp8, encode_tensor
from dsv2quant.formats.int4 import OFFSET, PACKED, Int4
from dsv2quant.names import Slot, model_slots
from dsv2quant.recipe import Recipe


class RandomWeights:
    """The weights of a configuration under a recipe, by the interface of model/source.py."""

    def __init__(self, config: ModelConfig, recipe: Recipe | None, device: str = "cuda", seed: int = 0) -> None:
        self.name, self.config = "random weights", config
        self.recipe, self.device, self.seed = recipe, device, seed
        self.dtype = torch.bfloat16
        self._slots = {slot.name: slot for slot in model_slots(config)}

    def scheme(self, module: str) -> str:
        """The recipe's, or bf16 where a weight's shape can't have it."""
        slot = self._slots[f"{module}.weight"]
        scheme = self.recipe.assign(slot)[0] if self.recipe else "bf16"
        return "bf16" if CODECS[scheme].refusal(slot.shape) else scheme

    def stored(self, module: str) -> tuple[str, dict[str, torch.Tensor]]:
        """A matrix' scheme and its parts by suffix, as formats/ names and shapes them."""
        slot = self._slots[f"{module}.weight"]
        scheme, weight = self.scheme(module), self._random(slot)
        codec = CODECS[scheme]
        if isinstance(codec, Fp8) and codec.grid != "tensor":
            codes, scales = encode_tensor(weight.float(), codec.grid)
            return scheme, {"weight": codes, codec.scale_suffix: scales}
        if type(codec) is Int4:
            return scheme, encode_int4(weight.float(), codec.group_size)
        if scheme != "bf16":
            raise ValueError(f"{scheme} is none of the schemes that random weights have")
        return scheme, {"weight": weight}

    def plain(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """A bias, norm, router, embedding or head in `dtype`, or None where the model has no such tensor."""
        slot = self._slots.get(name)
        return None if slot is None else self._random(slot).to(dtype or self.dtype)

    def activation(self, scheme: str) -> str | None:
        """How activations are quantized that meet weights of the scheme."""
        return CODECS[scheme].activation

    def kv_scale(self, layer: int) -> torch.Tensor | None:
        """None: an FP8 cache has scale 1."""
        return None

    def _random(self, slot: Slot) -> torch.Tensor:
        """In BF16."""
        if slot.role in ("norm", "bias"):
            return torch.full(slot.shape, float(slot.role == "norm"), dtype=torch.bfloat16, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(slot.name.encode(), self.seed))
        weight = torch.empty(slot.shape, dtype=torch.bfloat16, device=self.device)
        return weight.normal_(std=slot.shape[1] ** -0.5, generator=generator)


def encode_int4(x: torch.Tensor, group_size: int | None) -> dict[str, torch.Tensor]:
    """What `Int4.encode` makes of float32 [out, in] by `rtn`, on its device."""
    groups = x.unflatten(1, (-1, group_size or x.shape[1]))
    amax = groups.abs().amax(-1)
    # CUDA multiplies by the reciprocal of a scalar divisor, which rounds differently: a tensor.
    scales = (amax / torch.full_like(amax, 7.5)).bfloat16()
    scales = torch.where(scales > 0, scales, 1)
    nearest = (groups / scales.float().unsqueeze(-1)).round_().clamp_(-8, 7)
    nibbles = nearest.add_(OFFSET).to(torch.uint8).flatten(1)
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(torch.int32)
    return {PACKED: packed, "weight_scale": scales, "weight_shape": torch.tensor(x.shape)}
