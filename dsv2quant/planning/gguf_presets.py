"""Presets: mixes of our own, of no more bytes than one of llama-quantize's, chosen without a look at the weights.

llama-quantize's mixes were made for models without latent attention. They leave attn_kv_a_mqa, which makes all that is
cached of a token, at the default type, and give routed ffn_down, a third of the model, the extra bits; where its rows
are not multiples of 256 (DeepSeek-V2-Lite) these become the wider types of 32.

A preset spends the same bytes so that the sum over tensors of WEIGHT, by kind, times ERROR, by type, is least: as
`search` does, which measures both of the model at hand. These here are geometric means of two small models, a
DeepSeek-V2 and a DeepSeek-V3, which for most kinds agree within a quarter (benchmarks/gguf_presets.py --costs, and its
results). Any llama.cpp loads what comes of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.spec import GgufTensor
from dsv2quant.errors import UsageError
from dsv2quant.formats.gguf import blocks
from dsv2quant.formats.gguf.file_types import PRESETS
from dsv2quant.planning.gguf_types import Choice, Overrides, choose, fall_back, is_tied, quantizable
from dsv2quant.storage.gguf import SIZES, padded

# KLD of a layer's tensor at one relative error, over that of a layer's routed ffn_down. What is not in layers, below,
# counts as often as there are layers: the deeper a model, the less is any one layer of what comes out. attn_q, which no
# measured model has, makes what attn_q_a and attn_q_b make together.
WEIGHT = {
    "attn_kv_a_mqa": 1.6, "attn_output": 0.88, "attn_v_b": 0.87, "attn_k_b": 0.13, "attn_q_a": 0.24, "attn_q_b": 0.31,
    "attn_q": 0.55, "ffn_down": 5.4, "ffn_gate": 3.0, "ffn_up": 2.9, "ffn_down_exps": 1.0, "ffn_gate_exps": 0.93,
    "ffn_up_exps": 0.72, "ffn_down_shexp": 0.32, "ffn_gate_shexp": 0.30, "ffn_up_shexp": 0.25,
}  # fmt: skip
ENDS = {"output": 1.0, "token_embd": 1.4}
# KLD of a tensor in a type, with an importance matrix, over that in Q4_K.
ERROR = {
    "IQ1_M": 24.0, "IQ2_XXS": 14.0, "IQ2_XS": 11.0, "IQ2_S": 8.2, "IQ3_XXS": 4.7, "IQ3_S": 3.0, "Q3_K": 3.1,
    "IQ4_XS": 1.08, "IQ4_NL": 1.08, "Q4_K": 1.0, "Q5_0": 0.42, "Q5_1": 0.33, "Q5_K": 0.35, "Q6_K": 0.13, "Q8_0": 0.04,
}  # fmt: skip
_FEW = ("IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
_WIDE = ("IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_RAGGED = ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0")  # of rows that are not whole blocks of 256


def choose_preset(
    tensors: Sequence[GgufTensor],
    preset: str,
    config: ModelConfig,
    *,
    has_imatrix: bool,
    overrides: Overrides,
) -> list[Choice]:
    """(type, reason) of every tensor, as `gguf_types.choose`; `overrides` are not counted in the file's size.

    Raises UsageError for a model without latent attention or experts, for which presets are not made.
    """
    stock = PRESETS[preset]
    if not config.is_mla or not config.n_routed_experts:
        what = f"{preset} is a mix for latent attention and routed experts, and the model lacks one of them"
        raise UsageError(what, fix=f"give {stock}")
    room = sum(map(_nbytes, tensors, choose(tensors, stock, config, has_imatrix=has_imatrix)))
    parts = [_Part(tensor, stock, config.num_hidden_layers) for tensor in tensors]
    _spend(parts, room)
    tied = is_tied(tensors)
    return [(quantizable(part.tensor) and overrides.of(part.tensor, tied=tied)) or part.choice for part in parts]


class _Part:
    """A tensor, what it may be, the narrowest first, and the place in this ladder where it stands."""

    def __init__(self, tensor: GgufTensor, stock: str, layers: int) -> None:
        self.tensor, self.at = tensor, 0
        self.ladder = _ladder(tensor, stock)
        self.weight = ENDS[tensor.kind] * layers if tensor.kind in ENDS else WEIGHT.get(tensor.kind, 0.0)
        self.sizes = [_nbytes(tensor, choice) for choice in self.ladder]

    @property
    def choice(self) -> Choice:
        return self.ladder[self.at]

    def extra(self, place: int) -> int:
        """Bytes that a place takes more than where it stands: none, where both are padded to the same."""
        return self.sizes[place] - self.sizes[self.at]

    def cost(self, place: int) -> float:
        return self.weight * ERROR[self.ladder[place][0]]

    def step(self, room: int) -> tuple[float, int] | None:
        """The place, of those that fit, that takes most cost away for a byte, behind how much, negative."""
        fitting = (place for place in range(self.at + 1, len(self.ladder)) if self.extra(place) <= room)
        steps = [((self.cost(p) - self.cost(self.at)) / max(1, self.extra(p)), p) for p in fitting]
        return min(steps, default=None)


def _ladder(tensor: GgufTensor, stock: str) -> list[Choice]:
    """What a tensor may be, the narrowest first. The embedding and the output have no importance, without which types
    below 3 bits are none."""
    if not quantizable(tensor):
        return [("F32", None)]
    if tensor.shape[-1] % SIZES["Q4_K"].values:
        ragged = [fall_back(tensor, "Q4_K", {"Q4_K": kind}) for kind in _RAGGED]
        return list(dict.fromkeys(ragged))
    if not stock.startswith("IQ"):
        lowest: tuple[str, ...] = ("Q3_K",)
    else:
        lowest = _FEW[-1:] if tensor.kind in ENDS else _FEW
    return [(kind, None) for kind in (*lowest, *_WIDE)]


def _spend(parts: Sequence[_Part], room: int) -> None:
    """Take all up from the lowest place, always by the step that is worth most, while any fits into `room` bytes."""
    room -= sum(part.sizes[0] for part in parts)
    heap = [(*step, number) for number, part in enumerate(parts) if (step := part.step(room))]
    heapq.heapify(heap)
    while heap:
        _, place, number = heapq.heappop(heap)
        part = parts[number]
        if part.extra(place) <= room:
            room -= part.extra(place)
            part.at = place
        if step := part.step(room):  # what did not fit comes again as what does
            heapq.heappush(heap, (*step, number))


def _nbytes(tensor: GgufTensor, choice: Choice) -> int:
    return padded(blocks.nbytes(choice[0], tensor.shape))
