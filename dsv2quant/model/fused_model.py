"""Building the kernels' layers: weights as they are stored, fused where they share an input.

The model on the kernels: quantized weights stay quantized, and a decoding step is one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dsv2quant.arch.decoder import architecture
from dsv2quant.kernels import ops
from dsv2quant.kernels.gqa_decode import MAX_GROUP, MAX_WIDTH
from dsv2quant.kernels.router import split
from dsv2quant.model.attention import halves
from dsv2quant.model.cache import KVCache
from dsv2quant.model.experts import load_experts
from dsv2quant.model.fused import (
    FusedFFN,
    FusedGroupedAttention,
    FusedLatentAttention,
    FusedLayer,
    FusedMoE,
    Step,
    Stream,
)
from dsv2quant.model.layers import RMSNorm
from dsv2quant.model.load import LATENT_NORM_EPS, Ends, LoadOptions
from dsv2quant.model.quantized import (
    PlainLinear,
    Projections,
    Source,
    dequantized,
    load_linear,
    load_projections,
    unsupported,
)
from dsv2quant.model.runtime import Decode, Runtime


class FusedLoader:
    """Layers for the kernels. They compute in BF16."""

    def __init__(self, source: Source) -> None:
        self.source, self.config = source, source.config
        self._model = architecture(source.config)
        by_input: dict[str | None, list[str]] = {}
        for spec in self._model.specs():
            if spec.expert is None and not spec.keep:
                by_input.setdefault(spec.site, []).append(spec.module)
        self._sharing = {module: modules for modules in by_input.values() for module in modules}

    def ends(self) -> Ends:
        embedding = self.source.plain("model.embed_tokens.weight")
        assert embedding is not None
        score = self.source.plain("score.weight")  # of a model that classifies sequences
        plain = embedding if score is None and self.config.tie_word_embeddings else score
        head = load_linear(self.source, "lm_head") if plain is None else PlainLinear(plain)
        return Ends(embedding, self._norm("model.norm", self.config.rms_norm_eps), head)

    def layer(self, index: int) -> FusedLayer:
        c, at = self.config, f"model.layers.{index}"
        return FusedLayer(
            input_norm=self._norm(f"{at}.input_layernorm", c.rms_norm_eps),
            attention=(self._latent if c.is_mla else self._grouped)(f"{at}.self_attn"),
            post_attention_norm=self._norm(f"{at}.post_attention_layernorm", c.rms_norm_eps),
            ffn=self._moe(f"{at}.mlp") if c.is_moe(index) else self._ffn(f"{at}.mlp"),
        )

    def kv_scale(self, layer: int) -> torch.Tensor | None:
        return self.source.kv_scale(layer)

    def _grouped(self, at: str) -> FusedGroupedAttention:
        c, group = self.config, self.config.num_attention_heads // self.config.num_key_value_heads
        if group > MAX_GROUP or c.v_head_dim > MAX_WIDTH:
            raise unsupported(self.source, f"{group} heads of {c.v_head_dim} share keys and values")
        return FusedGroupedAttention(c, self._projections(f"{at}.q_proj"), self._projections(f"{at}.o_proj"))

    def _latent(self, at: str) -> FusedLatentAttention:
        c = self.config
        latent_query = c.q_lora_rank is not None
        kv_b = load_linear(self.source, f"{at}.kv_b_proj")
        plain = kv_b.weight if isinstance(kv_b, PlainLinear) else dequantized(self.source, f"{at}.kv_b_proj")
        w_k, w_v = halves(c, plain)
        return FusedLatentAttention(
            config=c,
            qkv_a=self._projections(f"{at}.kv_a_proj_with_mqa"),
            q_norm=self._norm(f"{at}.q_a_layernorm", LATENT_NORM_EPS) if latent_query else None,
            q_b=self._projections(f"{at}.q_b_proj") if latent_query else None,
            kv_norm=self._norm(f"{at}.kv_a_layernorm", LATENT_NORM_EPS),
            kv_b=kv_b,
            w_k=w_k,
            w_v=w_v,
            o=self._projections(f"{at}.o_proj"),
        )

    def _moe(self, at: str) -> FusedMoE:
        router, routing = self.source.plain(f"{at}.gate.weight", torch.float32), self._model.router
        assert router is not None
        assert routing is not None
        return FusedMoE(
            routing=routing,
            router=router,
            router_parts=split(router),
            router_bias=self.source.plain(f"{at}.gate.e_score_correction_bias", torch.float32),
            experts=load_experts(self.source, f"{at}.experts"),
            shared=self._ffn(f"{at}.shared_experts") if self.config.n_shared_experts else None,
        )

    def _ffn(self, at: str) -> FusedFFN:
        return FusedFFN(self._projections(f"{at}.gate_proj"), self._projections(f"{at}.down_proj"))

    def _projections(self, module: str) -> Projections:
        """All that share the module's input."""
        return load_projections(self.source, self._sharing[module])

    def _norm(self, module: str, eps: float) -> RMSNorm:
        weight = self.source.plain(f"{module}.weight")
        assert weight is not None
        return RMSNorm(weight, eps)


class FusedModel(Runtime[FusedLayer]):
    """A forward pass in BF16 over weights as they are stored, by kernels on a CUDA device.

    On the CPU their torch references take their place, which are slow, and right.
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
    def next_logits(self, tokens: torch.Tensor, caches: Sequence[KVCache]) -> torch.Tensor:
        """The last logits [batch, vocab] of a prompt, tokens [batch, new], which continues what the caches hold."""
        batch, new = tokens.shape
        stream = Stream(self.ends.embed(tokens.to(self.options.device).flatten()))
        rope = self.rope(caches[0].length, new)
        for index, (layer, cache) in enumerate(zip(self.layers(), caches, strict=True), 1):
            rows = layer.normed(stream)
            del stream
            stream, _ = layer.prefill(rows, batch, rope, cache, last=index == len(caches))
        return self.ends.logits(stream.settled())

    def decoder(self, caches: Sequence[KVCache]) -> Decode:
        """As Model's."""
        return Decoder(self, caches)


class Decoder:
    """A decoding step over caches; on a CUDA device a graph, recorded when this is made."""

    @torch.inference_mode()
    def __init__(self, model: FusedModel, caches: Sequence[KVCache]) -> None:
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
