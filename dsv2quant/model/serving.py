"""Where consumers depart from what an artifact says: how each quantizes the activations that meet a weight, what it
makes of a weight, and whether it takes the scales of a KV cache.

transformers 5.23: integrations/compressed_tensors.py fake-quantizes inputs of `Linear` modules alone, which routed
experts are not, and of kv_b_proj, whose input has four dimensions there, with one scale for each sequence; what has
quant_method fp8 is decoded (finegrained_fp8.py), where no GPU multiplies FP8.

vLLM 0.26: W4A8 is multiplied in FP8 (`W4A8.decode_as_vllm`); of a latent KV cache it drops the scales, because its
quantization methods make some for `Attention` and not for `MLAAttention` (compressed_tensors.py, get_quant_method).
SGLang drops them, too, and all of compressed-tensors, whose `get_quant_method` knows no attention (0.5.16, run: the
same log-probabilities with them and without; 0.5.23, read).
"""

from __future__ import annotations

from typing import Literal

import torch

from dsv2quant.arch.config import ModelConfig
from dsv2quant.checkpoint.checkpoint import Checkpoint, Weight
from dsv2quant.formats.schemes import CODECS, SERVED
from dsv2quant.planning.options import SERVERS
from dsv2quant.storage.gguf import SIZES

Serving = Literal["vllm", "sglang", "transformers", "llama.cpp"]


def activation(weight: Weight, serving: Serving | None, on_gpu: bool) -> str | None:
    """The granularity, as `reference.quantize_activation` has it, at which a consumer quantizes what meets a weight;
    None: not at all. Without one it is what the scheme says."""
    if serving == "llama.cpp" and (block := SIZES.get(weight.scheme.upper())) is not None:
        if block.values == 1 or weight.spec.role == "kv_b_proj":
            return None
        return "q8_k" if block.values == 256 else "q8_0"
    codec = CODECS.get(weight.scheme)
    if codec is None:
        return None
    said = codec.activation
    if serving != "transformers" or said is None:
        return said
    if weight.spec.expert is not None or (codec.quant_method == "fp8" and not on_gpu):
        return None
    return said.replace("token", "sequence") if weight.spec.role == "kv_b_proj" else said


def decode(
    checkpoint: Checkpoint, weight: Weight, serving: Serving | None, dtype: torch.dtype, device: str,
    scale_dtype: torch.dtype | None,
) -> torch.Tensor:  # fmt: skip
    """A weight as a consumer multiplies with it; else as `Checkpoint.decode`."""
    if serving is not None and (serving, weight.scheme) in SERVED:
        return SERVED[serving, weight.scheme](checkpoint.parts(weight, device), dtype)
    return checkpoint.decode(weight, dtype, device, scale_dtype)


def takes_cache_scales(serving: Serving | None, config: ModelConfig) -> bool:
    """Whether a consumer's FP8 cache has the artifact's scales, and not 1."""
    if serving == "sglang" and (config.quantization or {}).get("quant_method") == "compressed-tensors":
        return False
    return not (serving in SERVERS and config.is_mla)
