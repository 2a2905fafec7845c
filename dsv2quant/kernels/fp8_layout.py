"""How FP8 weights of a layer's experts lie, for the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Fp8Experts(NamedTuple):
    """Experts of one layer, stacked; I is the intermediate width, H the hidden. Scales are float32: of blocks of
    128 × 128, of channels, or of whole matrices."""

    gate_up: torch.Tensor  # e4m3 [E, 2, I, H]: gate's rows, then up's
    gate_up_scales: torch.Tensor  # [E, 2, ⌈I/128⌉, ⌈H/128⌉] | [E, 2, I, 1] | [E, 2, 1, 1]
    down: torch.Tensor  # e4m3 [E, H, I]
    down_scales: torch.Tensor  # [E, ⌈H/128⌉, ⌈I/128⌉] | [E, H, 1] | [E, 1, 1]
