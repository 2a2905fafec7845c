"""Where consumers depart from what an artifact says: how each quantizes the activations that meet a weight.

transformers 5.23: integrations/compressed_tensors.py fake-quantizes inputs of `Linear` modules alone, which routed
experts are not, and of kv_b_proj, whose input has four dimensions there, with one scale for each sequence; what has
quant_method fp8 is decoded (finegrained_fp8.py), where no GPU multiplies FP8. vLLM and SGLang do as the artifact says.
llama.cpp 0c1e57098: on CPUs ggml quantizes what meets a quantized weight to Q8_K, where that has blocks of 256, else to
Q8_0 (ggml-cpu.c, `vec_dot_type`), also for kernels that reorder blocks (repack.cpp). Of kv_b_proj's halves that is the
input of absorbed attention, which prefill is not computed by here.
"""

from __future__ import annotations

from typing import Literal

from dsv2quant.checkpoint.weights import Weight
from dsv2quant.formats.schemes import CODECS
from dsv2quant.storage.gguf import SIZES

Serving = Literal["vllm", "sglang", "transformers", "llama.cpp"]


def activation(weight: Weight, serving: Serving | None, on_gpu: bool) -> str | None:
    """The granularity, as `reference.quantize_activation` has it, at which a consumer quantizes what meets a weight;
    None: not at all. Without one it is what the scheme says."""
    if serving == "llama.cpp":
        values = SIZES[weight.scheme.upper()].values
        return None if values == 1 or weight.spec.role == "kv_b_proj" else "q8_k" if values == 256 else "q8_0"
    codec = CODECS.get(weight.scheme)
    if codec is None:
        return None
    said = codec.activation
    if serving != "transformers" or said is None:
        return said
    if weight.spec.expert is not None or (codec.quant_method == "fp8" and not on_gpu):
        return None
    return said.replace("token", "sequence") if weight.spec.role == "kv_b_proj" else said
