"""What is said of a model: its tensors and what each is to the others, its router, and the object that holds them.

Parts (parts.py) say it, decoder.py puts parts together, and all that needs to know asks `Architecture`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

LINEAR_ROLES = (
    "q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj",
    *(f"{ffn}.{p}" for ffn in ("dense", "shared", "routed") for p in ("gate_proj", "up_proj", "down_proj")),
)  # fmt: skip
ROLES = (*LINEAR_ROLES, "embed", "lm_head", "score", "router", "router_bias", "eh_proj", "norm", "bias")
CACHING_ROLES = ("kv_a_proj_with_mqa", "k_proj")  # beside these a layer's KV-cache scales are stored

KV_B, K_B, V_B = "attn_kv_b", "attn_k_b", "attn_v_b"  # kv_b_proj and its halves in GGUF


@dataclass(frozen=True)
class Fused:
    """The matrix that engines make of linears with one input, whose rows follow one another there.

    `names` are those under which vLLM and SGLang know its module, vLLM's first; `rows` counts all members' rows, and
    `is_last` says whether this member's come last. A member may be alone.
    """

    names: tuple[str, ...]
    rows: int
    is_last: bool = True


@dataclass(frozen=True)
class Heads:
    """A matrix's rows by head: of each of `count` heads `keys` rows that make keys, and then those that make values."""

    count: int
    keys: int


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the unquantized model; weights are [out, in]. It is the same tensor where the first five agree.

    `layer`, `expert`    None where there is none
    `site`               the module under whose name its input is measured: linears that share an input share it
    `parallel`           what tensor parallelism cuts (vLLM's layer classes); None: each GPU has all of it
    `parts`              into how many at most: several of more GPUs have the same one then
    `fused_as`           what engines fuse it into
    `producer`           the tensor whose rows, or a norm's elements, make its input channels one by one, so that either
                         may be scaled against the other. Of a producer with `heads` the rows of the values do
    `heads`              of the matrix whose halves absorbed attention takes apart
    `gguf_name`          its name in a GGUF file, where experts share a stack; None: no such file can hold it
    `gguf_heads`         in a GGUF file the rows of each of so many heads are in another order: row i and row i + half,
                         which RoPE turns together, side by side (llama.cpp conversion/llama.py, LlamaModel.permute)
    `is_prediction`      whether it is of a layer for multi-token prediction, behind the model's own
    `is_optional`        whether a checkpoint may lack it: then it is the model's own of that role
    """

    name: str
    role: str
    shape: tuple[int, ...]
    layer: int | None = None
    expert: int | None = None
    site: str | None = field(default=None, compare=False)
    parallel: Literal["rows", "columns"] | None = field(default=None, compare=False)
    parts: int | None = field(default=None, compare=False)
    fused_as: Fused | None = field(default=None, compare=False)
    producer: str | None = field(default=None, compare=False)
    heads: Heads | None = field(default=None, compare=False)
    gguf_name: str | None = field(default=None, compare=False)
    gguf_heads: int | None = field(default=None, compare=False)
    is_prediction: bool = field(default=False, compare=False)
    is_optional: bool = field(default=False, compare=False)

    @property
    def keep(self) -> bool:
        """Whether it stays as it is: no consumer loads it quantized."""
        return self.role not in LINEAR_ROLES

    @property
    def plain_scheme(self) -> str:
        """The scheme that it has unquantized: its numbers must keep float32's digits, or not."""
        return "f32" if self.role == "router_bias" else "bf16"

    def part_name(self, suffix: str) -> str:
        """The name of one of its parts, as formats/ calls them by suffix."""
        return self.name if suffix == "weight" else f"{self.module}.{suffix}"

    @property
    def module(self) -> str:
        """The module that holds the tensor: the name without `.weight` or `.bias`."""
        return self.name.rpartition(".")[0]

    @property
    def parent(self) -> str:
        """The module around that one: a layer's attention, an FFN or an expert."""
        return self.module.rpartition(".")[0]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Router:
    """How a token's experts are chosen and weighted: of the `topk_group` best of `groups` groups the `k` best experts.

    `score`        makes scores of logits: 'softmax' over all experts, or each one's 'sigmoid'
    `bias`         whether a correction bias of each expert is added to its score for the choice, and for it alone
    `group_score`  what a group is chosen by: its experts' largest score ('max'), or the sum of the two largest ('top2')
    `normalise`    whether the chosen experts' scores, which are their weights, are divided by their sum
    `scale`        what weights are then multiplied by
    """

    k: int
    groups: int = 1
    topk_group: int = 1
    normalise: bool = False
    scale: float = 1.0
    score: Literal["softmax", "sigmoid"] = "softmax"
    group_score: Literal["max", "top2"] = "max"
    bias: bool = False

    def check(self, experts: int) -> None:
        """Raise ValueError where there is no such choice among so many experts."""
        what = f"{self.k} of {experts} experts, of {self.topk_group} of {self.groups} groups"
        if experts % self.groups or not 0 < self.topk_group <= self.groups or not 0 < self.k <= experts:
            raise ValueError(f"{what}: no such choice")
        if self.bias and self.k > experts // self.groups * self.topk_group:
            raise ValueError(f"{what}: those groups have fewer experts, and a bias chooses among no others")
        if self.group_score == "top2" and 1 < self.groups == experts:
            raise ValueError(f"{what}: a group has one expert, and is chosen by two")


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file: name, shape [..., rows, cols] (numpy's order, the reverse of ggml's), the weights it
    is made of, and its layer.

    It is one weight as it is, or the routed experts' stacked [experts, rows, cols], or a half of kv_b_proj per head:
    `attn_k_b` [heads, kv_lora_rank, qk_nope_head_dim], transposed, or `attn_v_b` [heads, v_head_dim, kv_lora_rank].
    Names and shapes are those of llama.cpp's conversion/deepseek.py (DeepseekV2Model.modify_tensors) and
    gguf-py/gguf/tensor_mapping.py.
    """

    name: str
    shape: tuple[int, ...]
    specs: tuple[TensorSpec, ...]
    layer: int | None

    @property
    def kind(self) -> str:
        """The name without its layer and '.weight': 'ffn_down_exps'."""
        return self.name.rpartition(".")[0].rpartition(".")[2]

    @property
    def role(self) -> str:
        """Of its weights."""
        return self.specs[0].role

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def matrices(self) -> int:
        """How many matrices [rows, cols] it stacks."""
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass(frozen=True)
class Architecture:
    """A model: the tensors before and behind its layers, those of each layer, its router, if it has any, and the
    tensors of its layers for prediction."""

    before: tuple[TensorSpec, ...]
    layers: int
    layer: Callable[[int], list[TensorSpec]]
    behind: tuple[TensorSpec, ...]
    router: Router | None
    prediction: Callable[[], list[TensorSpec]]

    def specs(self) -> list[TensorSpec]:
        """Every tensor in reading order: embedding, layers, final norm, head, layers for prediction."""
        layers = (spec for layer in range(self.layers) for spec in self.layer(layer))
        return [*self.before, *layers, *self.behind, *self.prediction()]

    def gguf_tensors(self) -> list[GgufTensor]:
        """Every tensor of a GGUF file in llama-quantize's order (src/llama-model-loader.h, weight_name_comparer): those
        of no layer by name, then layer by layer, by name."""
        named: dict[str, list[TensorSpec]] = {}
        for spec in self.specs():
            if spec.gguf_name is not None:
                named.setdefault(spec.gguf_name, []).append(spec)
        tensors = [tensor for name, specs in named.items() for tensor in _gguf_tensors(name, specs)]
        return sorted(tensors, key=lambda tensor: (-1 if tensor.layer is None else tensor.layer, tensor.name))


def _gguf_tensors(name: str, specs: Sequence[TensorSpec]) -> Iterator[GgufTensor]:
    spec = specs[0]
    shapes: Iterable[tuple[str, tuple[int, ...]]] = ((name, spec.shape),)
    if spec.expert is not None:
        shapes = ((name, (len(specs), *spec.shape)),)
    elif spec.heads is not None:
        rows, rank = spec.shape
        heads, keys = spec.heads.count, spec.heads.keys
        halves = {K_B: (heads, rank, keys), V_B: (heads, rows // heads - keys, rank)}
        shapes = ((name.replace(KV_B, half), shape) for half, shape in halves.items())
    for own, shape in shapes:
        yield GgufTensor(own, shape, tuple(specs), spec.layer)
