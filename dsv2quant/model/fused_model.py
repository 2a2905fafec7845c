"""The model on the kernels: quantized weights stay quantized, and a decoding step is one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dsv2quant.kernels import ops
from dsv2quant.model.cache import LatentCache
from dsv2quant.model.fused import FusedLayer, Step, Stream
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.load_fused import FusedLoader
from dsv2quant.model.runtime import Decode, Runtime
from dsv2quant.model.source import Source


class FusedModel(Runtime[FusedLayer]):
    """A DeepSeek-V2 forward pass in BF16 over weights as they are stored, by kernels on a CUDA device.

    On the CPU their torch twins take their place, which are slow, and right.
    """

    def __init__(
        self,
        source: Source,
        options: LoadOptions,
        *,
        stream: bool = False,
        loaded: Callable[[int], object] = lambda layers: None,
    ) -> None:
        super().__init__(FusedLoader(source), options, stream, loaded)

    @torch.inference_mode()
    def next_logits(self, tokens: torch.Tensor, caches: Sequence[LatentCache]) -> torch.Tensor:
        """The last logits [batch, vocab] of a prompt, tokens [batch, new], which continues what the caches hold."""
        x = self.ends.embed(tokens.to(self.options.device))
        rope = self.rope(caches[0].length, tokens.shape[1])
        for layer, cache in zip(self.layers(), caches, strict=True):
            x, _ = layer(x, rope, cache)
        return self.ends.logits(x[:, -1])

    def decoder(self, caches: Sequence[LatentCache]) -> Decode:
        """As Model's."""
        return Decoder(self, caches)


class Decoder:
    """A decoding step over caches; on a CUDA device a graph, recorded when this is made."""

    @torch.inference_mode()
    def __init__(self, model: FusedModel, caches: Sequence[LatentCache]) -> None:
        batch, capacity, _ = caches[0].store.shape
        device = torch.device(model.options.device)
        self._caches, self._capacity = caches, capacity
        self._layers = list(model.layers())
        self._ends = model.ends
        self._tokens = torch.zeros(batch, dtype=torch.long, device=device)
        self._positions = torch.full((batch,), caches[0].length, dtype=torch.int32, device=device)
        self._angles = torch.view_as_real(model.rope(0, capacity)).contiguous()  # [capacity, rope / 2, 2]
        self._graph = torch.cuda.CUDAGraph() if device.type == "cuda" else None
        if self._graph is not None and caches[0].length < capacity:
            self._step()  # compiles what is to be recorded; the real token will overwrite what this one leaves
            self._positions -= 1
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph):
                self._logits = self._step()

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [batch] → logits [batch, vocab], valid until the next call. Raises ValueError where the caches are
        full."""
        if self._caches[0].length == self._capacity:
            raise ValueError(f"the cache holds {self._capacity} tokens, {self._capacity + 1} were asked for")
        self._tokens.copy_(tokens)
        for cache in self._caches:
            cache.length += 1
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._logits

    def _step(self) -> torch.Tensor:
        stream = Stream(self._ends.embed(self._tokens))
        step = Step(self._positions, self._positions + 1, self._angles)
        for layer, cache in zip(self._layers, self._caches, strict=True):
            stream, _ = layer.decode(stream, cache, step)
        norm = self._ends.norm
        last = ops.add_norm(stream.x, norm.weight, norm.eps, addend=stream.addend, pairs=stream.pairs)
        logits = self._ends.head(last.normed)
        self._positions += 1
        return logits
