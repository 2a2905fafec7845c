"""The runtime's passes over what an engine scored, under the engine's departures from the artifact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.evaluation import divergence
from dsv2quant.evaluation.divergence import TOKENS_TOGETHER, Pass, batches_of, run
from dsv2quant.formats.declared import activations_quantized
from dsv2quant.model.cache import KV_DTYPES, KVCache
from dsv2quant.model.completion import open_model
from dsv2quant.model.fused_model import FusedModel
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.model.serving import Serving
from dsv2quant.progress import Progress
from dsv2quant.text.tokenizer import Windows

OWN_WINDOWS = 4  # that the runtime's own rounding is measured on
# Of what an FP8 cache holds, clipped. On other text than was calibrated on, right scales clip 3e-4 at most (of an
# untrained model, calibrated on 2,048 tokens; of dsv2-mini 7e-6), scales halved 5e-3 at least.
MOST_CLIPPED = 1e-3


@dataclass(frozen=True)
class Runtime:
    """How the runtime computes what `engine` computes in `dtype` over `kv_cache`, both as engines name them."""

    engine: Serving
    dtype: str
    kv_cache: str
    device: str
    progress: Progress

    @property
    def decodes(self) -> bool:
        """Whether tokens are decoded over the cache, which is FP8."""
        return self.kv_cache.startswith("fp8")

    def model(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Model | FusedModel:
        """The model; one layer's weights are in memory at a time unless tokens are decoded."""
        in_bf16 = self.engine == "transformers" and self.dtype == "bfloat16"
        options = LoadOptions(
            dtype, self.device, kv_cache=KV_DTYPES.get(self.kv_cache), serving=self.engine,
            scale_dtype=torch.bfloat16 if in_bf16 else None,
        )  # fmt: skip
        return open_model(checkpoint, options, stream=not self.decodes, progress=self.progress)

    def own_dtype(self, checkpoint: Checkpoint) -> str:
        """What the runtime's own noise is measured in: the engine's dtype, but BF16 where activations are quantized. A
        code that falls the other way, be it in float32, has others fall so behind it, until most tokens are as far
        apart as BF16 makes them."""
        return "bfloat16" if activations_quantized(checkpoint.config.quantization) else self.dtype

    def passes(self, checkpoint: Checkpoint, windows: Windows) -> tuple[Pass, float, list[str]]:
        """The pass in float32 over windows; the runtime's own noise, the mean KLD in nats from it of a pass in the
        `own_dtype`, one window at a time; and what is wrong with the cache."""
        passed, faults = self.one(checkpoint, windows)
        few = Windows(windows.ids[:OWN_WINDOWS], windows.first)
        again, _ = self.one(checkpoint, few, getattr(torch, self.own_dtype(checkpoint)), batch=1)
        with self.progress(len(few.ids) * few.scored, "tok", "own noise") as advance:
            both = divergence.compare(again, passed.part(slice(0, len(few.ids))), few.ids, few.first, advance)
        return passed, float(both.kld.mean()), faults

    def one(
        self, checkpoint: Checkpoint, windows: Windows, dtype: torch.dtype = torch.float32, batch: int | None = None
    ) -> tuple[Pass, list[str]]:
        """A pass over windows in a dtype, and what is wrong with the cache."""
        model, ids = self.model(checkpoint, dtype), windows.ids
        with self.progress(ids.size * checkpoint.config.num_hidden_layers, "tok·layer", checkpoint.model) as advance:
            if self.decodes:
                assert isinstance(model, Model)
                return _decoded(model, windows, advance)
            together = batch or max(1, TOKENS_TOGETHER // ids.shape[1])
            return run(model, ids, batches_of(len(ids), together), advance), []


@torch.inference_mode()
def _decoded(model: Model, windows: Windows, advance: Callable[[int], object]) -> tuple[Pass, list[str]]:
    """The windows' scored tokens decoded one by one over the cache, behind a prefill of those before."""
    tokens, prompt = torch.from_numpy(windows.ids), windows.first + 1
    caches = model.caches(*tokens.shape)
    states = [model.hidden(tokens[:, :prompt], caches)]
    for place in range(prompt, tokens.shape[1]):
        states.append(model.hidden(tokens[:, place : place + 1], caches, absorbed=True))
        advance(len(tokens))
    return Pass(model.ends, torch.cat(states, 1), []), [*_clipped(caches)]


def _clipped(caches: list[KVCache]) -> list[str]:
    largest = torch.finfo(caches[0].store.dtype).max
    found = []
    for layer, cache in enumerate(caches):
        share = float((cache.store[:, : cache.length].float().abs() == largest).float().mean())
        if share > MOST_CLIPPED:
            scale = ", ".join(f"{value:.3g}" for value in cache.scale.flatten().tolist())
            found.append(
                f"the KV cache of layer {layer} clips {share:.2%} of what it holds: its scale, {scale}, is too small"
            )
    return found
