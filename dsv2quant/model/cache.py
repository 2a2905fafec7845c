"""The cache of a layer: what attention keeps of the tokens before."""

from __future__ import annotations

from typing import Protocol

import torch

from dsv2quant.arch.config import ModelConfig

KV_DTYPES = {
    "float32": torch.float32, "bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
KV_NAMES = {dtype: name for name, dtype in KV_DTYPES.items()}


class Cache(Protocol):
    """Where what a layer caches of its tokens goes."""

    def append(
        self, first: torch.Tensor, second: torch.Tensor, *, as_stored: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take [batch, new, ·], and return everything taken so far, in the same dtype."""


class KVCache:
    """What a layer caches, both parts side by side in `store` [batch, capacity, sum of the widths], of which the first
    `length` tokens are filled: latents and rotated keys, or rotated keys and values of all heads
    (`ModelConfig.cached_widths`).

    FP8 is what vLLM stores (csrc/cache_kernels.cu, concat_and_cache_mla): x / `scale` in float32, rounded to nearest
    even and saturated; it is read back as code · scale in float32, rounded to the dtype of what comes in. Both parts of
    a latent cache have one scale, float32 [1], keys and values one each, [2]; None is 1. Other dtypes only round.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        scale: torch.Tensor | None = None,
    ) -> None:
        self._widths = config.cached_widths
        self.store = torch.empty(batch, capacity, sum(self._widths), dtype=dtype, device=device)
        self.scale = torch.ones(1 if config.is_mla else 2, device=device) if scale is None else scale
        self.length = 0

    def append(
        self, first: torch.Tensor, second: torch.Tensor, *, as_stored: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add [batch, new, ·] and return everything cached, in the same dtype.

        Decoding reads all of it `as_stored`. Prefill sees the new tokens as they were computed and only earlier ones
        through the cache (vLLM v1/attention/backends/mla). Raises ValueError beyond the capacity.
        """
        end = self.room(first.shape[1])
        known = []
        stores, scales = self.store.split(self._widths, -1), self.scale.expand(2)
        for store, new, scale in zip(stores, (first, second), scales, strict=True):
            store[:, self.length : end] = self._encoded(new, scale)
            if store.dtype == new.dtype:
                known.append(store[:, :end])
            elif as_stored:
                known.append(self._decoded(store[:, :end], new.dtype, scale))
            else:
                known.append(torch.cat([self._decoded(store[:, : self.length], new.dtype, scale), new], 1))
        self.length = end
        return known[0], known[1]

    def room(self, new: int) -> int:
        """The length with so many more tokens. Raises ValueError beyond the capacity."""
        end = self.length + new
        if end > self.store.shape[1]:
            raise ValueError(f"the cache holds {self.store.shape[1]} tokens, {end} were asked for")
        return end

    def known(self, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Both parts of the first tokens, [batch, count, ·], as they are read back."""
        parts = self.store[:, :count].split(self._widths, -1)
        return [self._decoded(part, dtype, scale) for part, scale in zip(parts, self.scale.expand(2), strict=True)]

    def _encoded(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        dtype = self.store.dtype
        if dtype.itemsize > 1:
            return x.to(dtype)
        largest = torch.finfo(dtype).max
        return (x.float() / scale).clamp(-largest, largest).to(dtype)

    @staticmethod
    def _decoded(stored: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
        return stored.to(dtype) if stored.dtype.itemsize > 1 else (stored.float() * scale).to(dtype)
