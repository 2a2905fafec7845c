"""The KV cache of multi-head latent attention: one latent and one rotated key per token, shared by all heads."""

from __future__ import annotations

import torch

from dsv2quant.config import ModelConfig

KV_DTYPES = {
    "float32": torch.float32, "bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
KV_NAMES = {dtype: name for name, dtype in KV_DTYPES.items()}


class LatentCache:
    """The latents and rotated keys of one layer, side by side in `store` [batch, capacity, kv_lora_rank +
    qk_rope_head_dim], of which the first `length` tokens are filled.

    FP8 is what vLLM stores (csrc/cache_kernels.cu, concat_and_cache_mla): x / `scale` in float32, rounded to nearest
    even and saturated, with one scale (float32 [1]; None is 1) for both parts; it is read back as code · scale in
    float32, rounded to the dtype of what comes in. Other dtypes only round.
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
        self._widths = [config.kv_lora_rank, config.qk_rope_head_dim]
        self.store = torch.empty(batch, capacity, sum(self._widths), dtype=dtype, device=device)
        self.scale = torch.ones(1, device=device) if scale is None else scale
        self.length = 0

    def append(self, latent: torch.Tensor, k_pe: torch.Tensor, *, as_stored: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Add [batch, new, ·] and return everything cached, in the same dtype.

        Decoding reads all of it `as_stored`. Prefill sees the new tokens as they were computed and only earlier ones
        through the cache (vLLM v1/attention/backends/mla). Raises ValueError beyond the capacity.
        """
        end = self.length + latent.shape[1]
        if end > self.store.shape[1]:
            raise ValueError(f"the cache holds {self.store.shape[1]} tokens, {end} were asked for")
        known = []
        for store, new in zip(self.store.split(self._widths, -1), (latent, k_pe), strict=True):
            store[:, self.length : end] = self._encoded(new)
            if store.dtype == new.dtype:
                known.append(store[:, :end])
            elif as_stored:
                known.append(self._decoded(store[:, :end], new.dtype))
            else:
                known.append(torch.cat([self._decoded(store[:, : self.length], new.dtype), new], 1))
        self.length = end
        return known[0], known[1]

    def _encoded(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.store.dtype
        if dtype.itemsize > 1:
            return x.to(dtype)
        largest = torch.finfo(dtype).max
        return (x.float() / self.scale).clamp(-largest, largest).to(dtype)

    def _decoded(self, stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return stored.to(dtype) if stored.dtype.itemsize > 1 else (stored.float() * self.scale).to(dtype)
