"""The operations of the fused layers: by a kernel on a CUDA device, elsewhere by its torch reference. What they take
and give is said with the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from dsv2quant.kernels import (
    activations,
    fp8_experts,
    fp8_gemm,
    gguf_experts,
    gguf_gemm,
    int4_experts,
    int4_gemm,
    latents,
    prompts,
    reference,
    reference_attention,
    routing,
)
from dsv2quant.kernels import append_keys as keys
from dsv2quant.kernels import gqa_decode as plain_attention
from dsv2quant.kernels import mla_decode as latent_attention
from dsv2quant.kernels import mla_prefill as prompt_attention

P = ParamSpec("P")
R = TypeVar("R")


def _either(kernel: Callable[P, R], reference: Callable[..., Any]) -> Callable[P, R]:
    """`kernel` where the first argument, a tensor, is on a CUDA device."""

    def operation(*args: P.args, **others: P.kwargs) -> R:
        on_device = args[0].is_cuda  # type: ignore[attr-defined]
        return kernel(*args, **others) if on_device else reference(*args, **others)

    return operation


quantize_activation = _either(activations.quantize_activation, reference.quantize_activation)
fp8_matmul = _either(fp8_gemm.matmul, reference.fp8_matmul)
fp8_linear = _either(fp8_gemm.linear, reference.fp8_linear)
int4_linear = _either(int4_gemm.linear, reference.linear_int4)
gguf_linear = _either(gguf_gemm.linear, reference.linear_gguf)

add_norm = _either(activations.add_norm, reference.add_norm)
silu_mul = _either(activations.silu_mul, reference.silu_mul)
silu_mul_codes = _either(activations.silu_mul_codes, reference.silu_mul_codes)
append_latents = _either(latents.append_latents, reference_attention.append_latents)
append_prompt = _either(prompts.append_prompt, reference_attention.append_prompt)
prompt_keys = _either(prompts.prompt_keys, reference_attention.prompt_keys)
absorb_k = _either(latents.absorb_k, reference_attention.absorb_k)
absorb_v = _either(latents.absorb_v, reference_attention.absorb_v)
mla_decode = _either(latent_attention.mla_decode, reference_attention.mla_decode)
mla_prefill = _either(prompt_attention.mla_prefill, reference_attention.mla_prefill)
append_keys = _either(keys.append_keys, reference_attention.append_keys)
gqa_decode = _either(plain_attention.gqa_decode, reference_attention.gqa_decode)

router_logits = _either(routing.router_logits, reference.router_logits)
route_and_sort = _either(routing.route_and_sort, reference.route_and_sort)
fp8_gate_up = _either(fp8_experts.gate_up, reference.gate_up)
fp8_down = _either(fp8_experts.down, reference.down)
fp8_experts_of_codes = _either(fp8_experts.experts_of_codes, reference.experts_of_codes)
int4_experts_of = _either(int4_experts.experts, reference.experts_int4)
gguf_product = _either(gguf_experts.experts_product, reference.experts_product)
