"""The scale of an FP8 KV cache under MLA.

An MLA cache holds one row per token: the normalised latent, then the rotated RoPE key, k_pe. vLLM stores both under one
scale, k_scale (csrc/cache_kernels.cu, concat_and_cache_mla), so it must cover both; transformers with
compressed-tensors takes k_scale for the latent and v_scale for k_pe (compressed_tensors/modeling/kvcache.py). One value
for both serves either. llm-compressor calibrates k_scale on the latent alone, and k_pe may then be clipped.

A RoPE pair (a, b) turns with the position and keeps its length: √(a² + b²) bounds both elements at every position,
those that calibration never reached included, and no smaller bound does.
"""

from __future__ import annotations

import numpy as np

from dsv2quant.formats.fp8 import scale_of


def kv_scale(latent_amax: float, k_pe_radius: float) -> np.float32:
    """The KV-cache scale of a layer: the larger of the latent's largest magnitude and the longest RoPE pair, / 448.

    The latent is `kv_a_layernorm`'s output; `k_pe_radius` is max √(a² + b²) over the pairs of k_pe as cached, that is
    after YaRN's magnitude where that is not 1. Raises ValueError where either is NaN or beyond float32.
    """
    return scale_of(float(np.maximum(latent_amax, k_pe_radius)))  # unlike max(), keeps a NaN
