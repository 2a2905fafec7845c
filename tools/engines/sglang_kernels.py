"""Compiles for sm_90 what SGLang 0.5.16 would compile when it is first run: some minutes each for the two of Marlin.

    TVM_FFI_CACHE_DIR=FOLDER python tools/engines/sglang_kernels.py

needs no GPU. FOLDER then stands in for SGLang's cache on a machine with Hopper GPUs: its names hold hashes of sources,
of the architecture and of tvm-ffi. What is missing there is compiled there.
"""

import importlib

import torch
from sglang.jit_kernel.utils import override_jit_cuda_arch

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
# By module of sglang.jit_kernel: a function that loads a kernel, and its arguments for BF16 and DeepSeek's widths.
KERNELS = [
    ("activation", "_jit_activation_module", BF16),
    ("clamp_position", "_jit_clamp_position_module", torch.int32),
    ("clamp_position", "_jit_clamp_position_module", torch.int64),
    ("concat_mla", "_jit_concat_mla_k_module"),
    ("concat_mla", "_jit_concat_mla_absorb_q_module"),
    ("gptq_marlin_repack", "_jit_gptq_marlin_repack_module"),
    ("awq_marlin_repack", "_jit_awq_marlin_repack_module"),
    ("moe_align", "_jit_moe_align_module", torch.int32),
    ("moe_fused_gate", "_jit_moe_fused_gate_module"),
    ("moe_topk_sigmoid", "_jit_moe_topk_sigmoid_module", torch.float32),
    ("norm", "_jit_fused_add_rmsnorm_module", BF16, False),
    ("per_tensor_quant_fp8", "_jit_per_tensor_quant_fp8_module", False, BF16),
    ("per_tensor_quant_fp8", "_jit_per_tensor_quant_fp8_module", True, BF16),
    ("per_tensor_quant_fp8", "_jit_per_tensor_quant_fp8_module", False, torch.float32),
    ("per_tensor_quant_fp8", "_jit_per_tensor_absmax_fp8_module", BF16),
    ("per_token_group_quant_8bit", "_jit_per_token_group_quant_8bit_module", BF16, E4M3, 128),
    ("per_token_group_quant_8bit_v2", "_jit_module", BF16, E4M3, True),
    ("resolve_future_token_ids", "_jit_resolve_future_token_ids_module", torch.int32),
    ("resolve_future_token_ids", "_jit_resolve_future_token_ids_module", torch.int64),
    ("rope", "_jit_rotary_embedding_module"),
    *(("rope", "_jit_fused_rope_module", neox, width, BF16) for neox, width in ((False, 64), (True, 64), (True, 128))),
    ("set_mla_kv_buffer", "_jit_set_mla_kv_buffer_module", 1024, 128, True),
    ("set_mla_kv_buffer", "_jit_set_mla_kv_buffer_module", 512, 64, True),
    *(("kvcache", "_jit_kvcache_module", width) for width in (128, 256, 512, 1024, 2048)),
    ("gptq_marlin", "_jit_gptq_marlin_module", BF16),
    ("moe_wna16_marlin", "_jit_moe_wna16_marlin_module", BF16),
]

if __name__ == "__main__":
    with override_jit_cuda_arch(9, 0, "a"):
        for module, function, *arguments in KERNELS:
            getattr(importlib.import_module(f"sglang.jit_kernel.{module}"), function)(*arguments)
            print(module, *arguments, flush=True)
