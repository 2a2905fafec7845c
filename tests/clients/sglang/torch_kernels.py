"""SGLang without a GPU: kernels become products with decoded weights, in torch.

What SGLang does before stays its own: the configuration it reads, which scheme it chooses for which module, the tensors
it makes room for, how it loads, splits and fuses them; and routing. What it makes of them behind loading (repacking,
requantizing kv_b_proj to one scale) and activations in FP8 need the GPU's kernels.

For sglang 0.5.16: srt/layers/quantization/, srt/models/deepseek_common/. sitecustomize.py calls `register` in each process.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from packed import awq, codes, grouped, scaled

QUANTIZATION = "sglang.srt.layers.quantization"
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
LINEAR = {
    "fp8": "Fp8LinearMethod", "compressed_tensors.compressed_tensors": "CompressedTensorsLinearMethod",
    "gptq.gptq": "GPTQMarlinLinearMethod", "awq.awq": "AWQLinearMethod",
}  # fmt: skip
EXPERTS = {
    "fp8": "Fp8MoEMethod", "compressed_tensors.compressed_tensors": "CompressedTensorsFusedMoEMethod",
    "gptq.gptq": "GPTQMarlinMoEMethod", "awq.awq": "AWQMoEMethod",
}  # fmt: skip


def decoded(layer: torch.nn.Module, prefix: str = "") -> torch.Tensor:
    """Weights […, out, in] in float32, of a linear layer or, with a prefix, of its experts' w13 or w2."""

    def get(name: str) -> Any:
        return getattr(layer, prefix + name, None)

    if get("qweight") is not None:
        packed, scales, zeros = get("qweight"), get("scales"), get("qzeros")
        if packed.shape[-1] * 8 == scales.shape[-1]:
            return awq(packed, scales, zeros)
        return grouped(codes(packed, -2).transpose(-2, -1), scales.transpose(-2, -1))
    weight, scale = get("weight_packed"), get("weight_scale")
    if weight is not None and prefix:  # experts come as [experts, in/8, out] and [experts, groups, out]
        return grouped(codes(weight, -2).transpose(-2, -1), scale.transpose(-2, -1))
    if weight is not None:
        return grouped(codes(weight, -1), scale)
    weight, scale = get("weight"), get("weight_scale_inv") if scale is None else scale
    if prefix and scale.ndim == 2:  # a scale for each expert's gate, and for its up
        return scaled(weight, scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1).unsqueeze(-1))
    if not prefix and scale.ndim == 1:  # a scale for each matrix that is fused
        return scaled(weight, torch.cat([s.expand(n) for s, n in zip(scale, layer.logical_widths, strict=True)])[:, None])
    return scaled(weight, scale)


def decode_linear(self: Any, layer: torch.nn.Module) -> None:
    layer.decoded = decoded(layer)


def apply_linear(self: Any, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer.decoded.to(x.dtype), bias)


def decode_experts(self: Any, layer: torch.nn.Module) -> None:
    for prefix in ("w13_", "w2_"):
        setattr(layer, f"{prefix}weight", torch.nn.Parameter(decoded(layer, prefix), requires_grad=False))


def make_runner(self: Any, layer: torch.nn.Module, moe_runner_config: Any) -> None:
    self.moe_runner_config = moe_runner_config


def apply_experts(self: Any, layer: torch.nn.Module, dispatch_output: Any) -> Any:
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    x, topk = dispatch_output.hidden_states, dispatch_output.topk_output
    return StandardCombineInput(hidden_states=moe_forward_native(layer, x, topk, self.moe_runner_config))


def absorbed(self: Any, *args: Any, **kwargs: Any) -> None:
    """`post_load_weights`: what attention absorbs of kv_b_proj, as it is stored."""
    for layer in self.model.layers:
        attention, kv_b = layer.self_attn, layer.self_attn.kv_b_proj
        weight = kv_b.weight if hasattr(kv_b, "weight") and kv_b.weight.element_size() > 1 else decoded(kv_b)
        parts = [attention.qk_nope_head_dim, attention.v_head_dim]
        keys, values = weight.unflatten(0, (-1, sum(parts))).split(parts, 1)
        attention.w_kc, attention.w_vc = keys.contiguous(), values.transpose(1, 2).contiguous()


def register() -> None:
    """Put them where SGLang looks methods up."""
    for names, made in (
        (LINEAR, {"process_weights_after_loading": decode_linear, "apply": apply_linear}),
        (EXPERTS, {"process_weights_after_loading": decode_experts, "apply": apply_experts, "create_moe_runner": make_runner}),
    ):
        for module, name in names.items():
            kind = getattr(import_module(f"{QUANTIZATION}.{module}"), name)
            for method, function in made.items():
                assert hasattr(kind, method), f"{name} has no {method}: it is another version of SGLang's"
                setattr(kind, method, function)
    tensors = import_module(f"{QUANTIZATION}.compressed_tensors.compressed_tensors").CompressedTensorsConfig
    configs = [
        tensors, import_module(f"{QUANTIZATION}.fp8").Fp8Config, import_module(f"{QUANTIZATION}.gptq.gptq").GPTQMarlinConfig,
        import_module(f"{QUANTIZATION}.awq.awq").AWQMarlinConfig,
    ]  # fmt: skip
    for config in configs:
        config.get_supported_act_dtypes = classmethod(lambda cls: FLOATS)
    tensors._check_scheme_supported = lambda *args, **asked: True
    handlers = import_module("sglang.srt.models.deepseek_common.attention_backend_handler")
    handlers.AttentionBackendRegistry.register("torch_native", handlers._dispatch_mla_subtype)
    loader = import_module("sglang.srt.models.deepseek_common.deepseek_weight_loader")
    loader.DeepseekV2WeightLoaderMixin.post_load_weights = absorbed
