"""Where consumers depart from what an artifact says: how each quantizes the activations that meet a weight.

transformers 5.23: integrations/compressed_tensors.py fake-quantizes inputs of `Linear` modules alone, which routed
experts are not, and of kv_b_proj, whose input has four dimensions there, with one scale for each sequence; what has
quant_method fp8 is decoded (finegrained_fp8.py), where no GPU multiplies FP8. vLLM and SGLang do as the artifact says.
"""

from __future__ import annotations

from typing import Literal

from dsv2quant.checkpoint.weights import Weight
from dsv2quant.formats.schemes import CODECS

Serving = Literal["vllm", "sglang", "transformers", "llama.cpp"]


def activation(weight: Weight, serving: Serving | None, on_gpu: bool) -> str | None:
    """The granularity, as `reference.quantize_activation` has it, at which a consumer quantizes what meets a weight;
    None: not at all. Without one it is what the scheme says."""
    codec = CODECS.get(weight.scheme)
    if codec is None:
        return None
    said = codec.activation
    if serving != "transformers" or said is None:
        return said
    if weight.spec.expert is not None or (codec.quant_method == "fp8" and not on_gpu):
        return None
    return said.replace("token", "sequence") if weight.spec.role == "kv_b_proj" else said
