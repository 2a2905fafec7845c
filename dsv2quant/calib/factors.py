"""The quantized model with a factor at each group's scale and each weight of norms and routers, and how far its
distributions are from the unquantized model's, differentiably.

INT4 weights are held as codes. A layer's are expanded while it computes, and once more for its gradient: one layer is
there in float32 at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dsv2quant.calib.layerwise import copied, every_linear
from dsv2quant.checkpoint.dtypes import torch_dtype
from dsv2quant.formats.codec import to_bf16
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.layers import RMSNorm
from dsv2quant.model.load import DecoderLayer, Ends, Loader
from dsv2quant.planning.plan import Entry, Plan

Parts = dict[str, np.ndarray]  # what is stored of a weight, by suffix
Stored = Callable[[Entry], Parts]


class Factor(NamedTuple):
    """What m multiplies: `base` [rows, groups] are scales of `codes` (int8 [rows, columns]), or weights that are none.
    `put` gives the model the values."""

    entry: Entry
    base: torch.Tensor
    codes: torch.Tensor | None
    put: Callable[[torch.Tensor], None]

    def apply(self, m: torch.Tensor) -> None:
        """Have the model compute with base · e^m."""
        values = self.base * m.view_as(self.base).exp()
        if self.codes is not None:
            groups = self.codes.unflatten(1, (values.shape[1], -1))
            values = (groups.float() * values.unsqueeze(-1)).flatten(1)
        self.put(values)

    def stored(self, m: torch.Tensor) -> tuple[Factor, Parts]:
        """With base · e^m as it is stored for a base, and the weight's parts."""
        values = (self.base * m.view_as(self.base).exp()).cpu().numpy()
        integers = CODECS[self.entry.scheme].integers
        if integers is None or self.codes is None:
            bits = to_bf16(values)
            parts, numbers = {"weight": bits}, torch.from_numpy(bits).view(torch.bfloat16).float()
        else:
            if not integers.holds(np.abs(values)):  # at the end of float16's range
                values = self.base.cpu().numpy()
            scales = np.copysign(integers.storable(np.abs(values)), values)
            parts, numbers = integers.pack(self.codes.cpu().numpy(), scales), torch.from_numpy(scales)
        return self._replace(base=numbers.to(m.device)), parts


@dataclass(frozen=True)
class Whole:
    """The quantized model, what is trained of each of its layers and of the final norm, and the ends of the unquantized
    one. A layer's quantized weights exist while it computes."""

    layers: list[DecoderLayer]
    ends: Ends
    ideal: Ends
    rope: torch.Tensor
    factors: list[list[Factor]]

    @property
    def count(self) -> int:
        """How many m there are."""
        return sum(factor.base.numel() for factors in self.factors for factor in factors)

    def split(self, m: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """m, flat, as `factors` are."""
        parts = iter(m.split([factor.base.numel() for factors in self.factors for factor in factors]))
        return [tuple(itertools.islice(parts, len(factors))) for factors in self.factors]

    def divergence(self, m: torch.Tensor, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """KL(unquantized ‖ quantized) in nats, the mean over all positions of windows ids [windows, ctx], of which the
        unquantized model's last hidden states are `hidden` [windows, ctx, hidden]."""
        x, (*of_layers, of_norm) = self.ends.embed(ids), self.split(m)
        for index, parts in enumerate(of_layers):
            x = checkpoint(self._layer, index, x, *parts, use_reentrant=False, preserve_rng_state=False)
        with torch.no_grad():
            wanted = self.ideal.logits(hidden).log_softmax(-1).flatten(0, 1)
        _apply(self.factors[-1], of_norm)
        found = self.ends.logits(x).log_softmax(-1).flatten(0, 1)
        return F.kl_div(found, wanted, reduction="batchmean", log_target=True)

    def _layer(self, index: int, x: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        factors = self.factors[index]
        _apply(factors, parts)
        x, _ = self.layers[index](x, self.rope)
        for factor in factors:
            factor.put(factor.base)  # lets go of the weight
        return x


def _apply(factors: Sequence[Factor], parts: Sequence[torch.Tensor]) -> None:
    for factor, part in zip(factors, parts, strict=True):
        factor.apply(part)


def whole_model(plan: Plan, loader: Loader, rope: torch.Tensor, stored: Stored) -> Whole:
    """The model that the plan's artifact holds."""
    ideal = loader.ends()
    ends: Ends = copied(ideal)
    head = {"model.norm": ends.norm, "lm_head": ends.head, "score": ends.head}
    layers: list[DecoderLayer] = []
    factors: list[list[Factor]] = []
    for index in range(plan.checkpoint.config.num_hidden_layers):
        layer = loader.layer(index)
        modules = {linear.module: linear for linear in every_linear(layer)} | dict(_norms(index, layer))
        factors.append(_factors([entry for entry in plan.entries if entry.spec.layer == index], modules, stored))
        layers.append(layer)
    factors.append(_factors([entry for entry in plan.entries if entry.spec.layer is None], head, stored))
    return Whole(layers, ends, ideal, rope, factors)


def _factors(entries: Sequence[Entry], modules: Mapping[str, Any], stored: Stored) -> list[Factor]:
    """What is trained of these weights, which `modules` get as they are stored: of INT4 when it is computed with."""
    factors = []
    for entry in entries:
        spec, codec = entry.spec, CODECS[entry.scheme]
        module = modules.get(spec.module)
        if module is None or not spec.name.endswith(".weight"):
            continue
        parts, device, put = stored(entry), module.weight.device, partial(setattr, module, "weight")
        if codec.integers is not None:
            codes, scales = (torch.from_numpy(x).to(device) for x in codec.integers.unpack(parts))
            factors.append(Factor(entry, scales, codes, put))
            put(scales)
            continue
        tensors = {
            p.suffix: torch.from_numpy(parts[p.suffix]).view(torch_dtype(p.dtype)).to(device)
            for p in codec.layout(spec.shape)
        }
        put(codec.decode(tensors, torch.float32))
        if isinstance(module, RMSNorm) or spec.role == "router":
            factors.append(Factor(entry, module.weight, None, put))
    return factors


def _norms(index: int, layer: DecoderLayer) -> Iterator[tuple[str, RMSNorm]]:
    """A layer's norms by their modules' names."""
    at = f"model.layers.{index}"
    yield f"{at}.input_layernorm", layer.input_layernorm
    yield f"{at}.post_attention_layernorm", layer.post_attention_layernorm
    for name in ("q_a_layernorm", "kv_a_layernorm"):
        norm = getattr(layer.attention, name, None)
        if norm is not None:
            yield f"{at}.self_attn.{name}", norm
