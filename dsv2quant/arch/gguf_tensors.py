"""The tensors of a DeepSeek-V2 GGUF file, each with the weights of the checkpoint that it is made of.

Names and shapes are those of llama.cpp's conversion/deepseek.py (DeepseekV2Model.modify_tensors) and
gguf-py/gguf/tensor_mapping.py; the order is llama-quantize's (src/llama-model-loader.h, weight_name_comparer).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.deepseek_v2 import TensorSpec, layer_specs, model_specs

_MODEL = {"embed": "token_embd", "norm": "output_norm", "lm_head": "output"}
_NORMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_a_layernorm": "attn_q_a_norm",
    "kv_a_layernorm": "attn_kv_a_norm",
}  # fmt: skip
_LINEARS = {
    "q_proj": "attn_q", "q_a_proj": "attn_q_a", "q_b_proj": "attn_q_b", "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "o_proj": "attn_output", "router": "ffn_gate_inp",
}  # fmt: skip
_FFNS = {"dense": "", "shared": "_shexp", "routed": "_exps"}
K_B, V_B = "attn_k_b", "attn_v_b"  # the halves of kv_b_proj


@dataclass(frozen=True)
class Tensor:
    """One tensor: name, shape [..., rows, cols] (numpy's order, the reverse of ggml's), the weights it is made of, and
    its layer.

    It is one weight as it is, or the routed experts' stacked [experts, rows, cols], or a half of kv_b_proj per head:
    `attn_k_b` [heads, kv_lora_rank, qk_nope_head_dim], transposed, or `attn_v_b` [heads, v_head_dim, kv_lora_rank].
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
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def matrices(self) -> int:
        """How many matrices [rows, cols] it stacks."""
        return self.shape[0] if len(self.shape) == 3 else 1


def model_tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor in the order of the file: those of no layer by name, then layer by layer, by name."""
    tensors = [
        Tensor(f"{_MODEL[spec.role]}.weight", spec.shape, (spec,), None)
        for spec in model_specs(config)
        if spec.layer is None
    ]
    tensors.sort(key=lambda tensor: tensor.name)
    for layer in range(config.num_hidden_layers):
        tensors += sorted(_layer_tensors(config, layer), key=lambda tensor: tensor.name)
    return tensors


def _layer_tensors(config: ModelConfig, layer: int) -> Iterator[Tensor]:
    experts: dict[str, list[TensorSpec]] = {}
    for spec in layer_specs(config, layer):
        leaf, suffix = spec.name.split(".")[-2:]
        if spec.role == "kv_b_proj":
            yield from _halves(config, layer, spec)
            continue
        if spec.role == "norm":
            name = _NORMS[leaf]
        elif spec.role == "bias":
            name = _LINEARS[leaf]
        elif spec.role in _LINEARS:
            name = _LINEARS[spec.role]
        else:
            ffn, projection = spec.role.split(".")
            name = f"ffn_{projection.removesuffix('_proj')}{_FFNS[ffn]}"
        if spec.expert is not None:
            experts.setdefault(name, []).append(spec)
        else:
            yield Tensor(f"blk.{layer}.{name}.{suffix}", spec.shape, (spec,), layer)
    for name, specs in experts.items():
        yield Tensor(f"blk.{layer}.{name}.weight", (len(specs), *specs[0].shape), tuple(specs), layer)


def _halves(config: ModelConfig, layer: int, spec: TensorSpec) -> Iterator[Tensor]:
    heads, rank = config.num_attention_heads, config.kv_lora_rank
    shapes = {K_B: (heads, rank, config.qk_nope_head_dim), V_B: (heads, config.v_head_dim, rank)}
    for name, shape in shapes.items():
        yield Tensor(f"blk.{layer}.{name}.weight", shape, (spec,), layer)


ARCHITECTURE = "deepseek2"
