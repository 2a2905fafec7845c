"""The model: resident, or streamed with one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from dsv2quant.arch.config import ModelConfig
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.model.attention import Rope
from dsv2quant.model.cache import KVCache
from dsv2quant.model.load import DecoderLayer, Ends, Hidden, Loader, LoadOptions


class Block(Protocol):
    """What evaluation needs of a layer."""

    def __call__(self, x: torch.Tensor, rope: torch.Tensor) -> Hidden: ...

    def decoded(self, x: torch.Tensor, rope: torch.Tensor, cache: KVCache) -> Hidden: ...


Layer = TypeVar("Layer", bound=Block, covariant=True)
Decode = Callable[[torch.Tensor], torch.Tensor]


class LayerLoader(Protocol[Layer]):
    """Builds a model's parts when asked for."""

    @property
    def config(self) -> ModelConfig: ...

    def ends(self) -> Ends: ...

    def layer(self, index: int) -> Layer: ...

    def kv_scale(self, layer: int) -> torch.Tensor | None: ...


class Runtime(Generic[Layer]):
    """The layers of a model, whichever they are, and what they share.

    Resident models load every layer when made. Streamed ones load a layer whenever they come to it: that pays where
    many windows go through a layer at once, as in evaluation. `loaded` is called with the layers that are resident.
    """

    def __init__(
        self, loader: LayerLoader[Layer], options: LoadOptions, stream: bool, loaded: Callable[[int], object]
    ) -> None:
        self.options, self.config = options, loader.config
        self._loader = loader
        self.ends = loader.ends()
        self._rope = Rope(self.config, torch.device(options.device))
        self._resident: list[Layer] | None = None if stream else []
        if self._resident is not None:
            for index in range(self.config.num_hidden_layers):
                self._resident.append(loader.layer(index))
                loaded(1)

    def layers(self, first: int = 0) -> Iterator[Layer]:
        """The layers in order, from number `first` on."""
        if self._resident is not None:
            yield from self._resident[first:]
            return
        for index in range(first, self.config.num_hidden_layers):
            yield self._loader.layer(index)

    def rope(self, first: int, count: int) -> torch.Tensor:
        """The rotation table of positions first … first + count − 1."""
        return self._rope.table(torch.arange(first, first + count, device=self.options.device))

    def caches(self, batch: int, capacity: int) -> list[KVCache]:
        """An empty cache per layer for `capacity` tokens."""
        return [self.cache(layer, batch, capacity) for layer in range(self.config.num_hidden_layers)]

    def cache(self, layer: int, batch: int, capacity: int) -> KVCache:
        """An empty cache of one layer, in FP8 under the layer's own scales where the checkpoint has one."""
        dtype = self.options.kv_cache or self.options.dtype
        device = torch.device(self.options.device)
        return KVCache(self.config, batch, capacity, dtype, device, self._loader.kv_scale(layer))


class Model(Runtime[DecoderLayer]):
    """A forward pass over a checkpoint, quantized or not, in plain torch: the reference."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: LoadOptions | None = None,
        *,
        stream: bool = False,
        loaded: Callable[[int], object] = lambda layers: None,
    ) -> None:
        options = options or LoadOptions()
        super().__init__(Loader(checkpoint, options), options, stream, loaded)

    @torch.inference_mode()
    def forward(
        self, tokens: torch.Tensor, caches: Sequence[KVCache] | None = None, *, absorbed: bool = False
    ) -> torch.Tensor:
        """Logits [batch, new, vocab] of tokens [batch, new], which continue what the caches hold.

        `absorbed` attends over latents without expanding them, as decoding does; the default expands, as prefill does.
        """
        return self.ends.logits(self.hidden(tokens, caches, absorbed))

    @torch.inference_mode()
    def next_logits(self, tokens: torch.Tensor, caches: Sequence[KVCache], *, absorbed: bool = False) -> torch.Tensor:
        """The last row of `forward`, [batch, vocab]: those of a whole prompt would not fit in memory."""
        return self.ends.logits(self.hidden(tokens, caches, absorbed)[:, -1])

    def decoder(self, caches: Sequence[KVCache]) -> Decode:
        """What takes the next token of each sequence, [batch], and gives its logits, [batch, vocab], by absorbed
        attention; the caches grow with it."""
        return lambda tokens: self.next_logits(tokens.unsqueeze(1), caches, absorbed=True)

    @torch.inference_mode()
    def hidden(
        self, tokens: torch.Tensor, caches: Sequence[KVCache] | None = None, absorbed: bool = False
    ) -> torch.Tensor:
        """Hidden states [batch, new, hidden] behind the last layer, of tokens as `forward` takes them."""
        x = self.ends.embed(tokens.to(self.options.device))
        rope = self.rope(caches[0].length if caches else 0, tokens.shape[1])
        for index, layer in enumerate(self.layers()):
            x, _ = layer(x, rope, caches[index] if caches else None, absorbed)
        return x
