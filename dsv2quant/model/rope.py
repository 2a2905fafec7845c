"""Rotary position embedding: plain RoPE, and YaRN with DeepSeek's mscale."""

from __future__ import annotations

import math

import torch

from dsv2quant.config import ModelConfig, Yarn


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 · mscale · ln(factor) + 1 (arXiv:2309.00071, eq. 22, with DeepSeek's mscale; `yarn_get_mscale`)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """1/√(qk head dim), times mscale(mscale_all_dim)² under YaRN (`DeepseekV2Attention.__init__`)."""
    scale = config.qk_head_dim**-0.5
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= yarn_mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


class Rope:
    """Rotates interleaved pairs (2i, 2i+1) of the last dimension, which has qk_rope_head_dim elements."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        dim = config.qk_rope_head_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        frequencies = 1.0 / config.rope_theta**exponents  # [dim/2], radians per position
        self._magnitude = 1.0
        if config.yarn is not None:
            yarn = config.yarn
            frequencies = _yarn_frequencies(frequencies, yarn, dim, config.rope_theta)
            self._magnitude = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        self._frequencies = frequencies.to(device)

    def table(self, positions: torch.Tensor) -> torch.Tensor:
        """Complex rotations [tokens, dim/2] of integer positions [tokens]."""
        angles = positions.float()[:, None] * self._frequencies
        return torch.polar(torch.full_like(angles, self._magnitude), angles)

    @staticmethod
    def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rotate x [..., tokens, dim] in float32; back in x's dtype."""
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def _yarn_frequencies(frequencies: torch.Tensor, yarn: Yarn, dim: int, theta: float) -> torch.Tensor:
    """Blend extrapolated and interpolated frequencies: pairs that turn more than beta_fast times over the original
    context keep theirs, those under beta_slow turns are divided by the factor (`DeepseekV2YarnRotaryEmbedding`)."""

    def pair_with(turns: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), dim - 1)
    span = high - low or 0.001
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return frequencies / yarn.factor * interpolated + frequencies * (1 - interpolated)
