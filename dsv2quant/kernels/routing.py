"""Which tokens go to which expert, in the order in which grouped kernels take them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Routes(NamedTuple):
    """Pairs of a token and an expert it chose (number token · k + choice) by expert, cut into tiles of one expert's.

    Made on the device, without a look at its values: there are as many tiles as the worst choice of experts needs.
    """

    pairs: torch.Tensor  # int32 [tokens · k]: numbers of pairs, by expert, in order within an expert
    experts: torch.Tensor  # int32 [tiles]: a tile's expert; −1 of tiles that are not needed
    begins: torch.Tensor  # int32 [tiles]: its first place in `pairs`
    ends: torch.Tensor  # int32 [tiles]: one past its last
    block: int  # pairs in a tile, at most


def tiles_needed(pairs: int, experts: int, block: int) -> int:
    """Tiles of at most `block` pairs, whatever the experts."""
    return (pairs + min(pairs, experts) * (block - 1)) // block
