"""Building the kernels' layers: weights as they are stored, fused where they share an input."""

from __future__ import annotations

import torch

from dsv2quant.model.attention import halves
from dsv2quant.model.decoder import Ends
from dsv2quant.model.experts import load_experts
from dsv2quant.model.fused import FusedAttention, FusedFFN, FusedLayer, FusedMoE
from dsv2quant.model.linear import RMSNorm
from dsv2quant.model.load import LATENT_NORM_EPS
from dsv2quant.model.quantized import PlainLinear, dequantized, load_linear, load_projections
from dsv2quant.model.source import Source


class FusedLoader:
    """Layers for the kernels. They compute in BF16."""

    def __init__(self, source: Source) -> None:
        self.source, self.config = source, source.config

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
            attention=self._attention(f"{at}.self_attn"),
            post_attention_norm=self._norm(f"{at}.post_attention_layernorm", c.rms_norm_eps),
            ffn=self._moe(f"{at}.mlp") if c.is_moe(index) else self._ffn(f"{at}.mlp"),
        )

    def kv_scale(self, layer: int) -> torch.Tensor | None:
        return self.source.kv_scale(layer)

    def _attention(self, at: str) -> FusedAttention:
        c = self.config
        latent_query = c.q_lora_rank is not None
        kv_b = load_linear(self.source, f"{at}.kv_b_proj")
        plain = kv_b.weight if isinstance(kv_b, PlainLinear) else dequantized(self.source, f"{at}.kv_b_proj")
        w_k, w_v = halves(c, plain)
        first = "q_a_proj" if latent_query else "q_proj"
        return FusedAttention(
            config=c,
            qkv_a=load_projections(self.source, [f"{at}.{first}", f"{at}.kv_a_proj_with_mqa"]),
            q_norm=self._norm(f"{at}.q_a_layernorm", LATENT_NORM_EPS) if latent_query else None,
            q_b=load_projections(self.source, [f"{at}.q_b_proj"]) if latent_query else None,
            kv_norm=self._norm(f"{at}.kv_a_layernorm", LATENT_NORM_EPS),
            kv_b=kv_b,
            w_k=w_k,
            w_v=w_v,
            o=load_projections(self.source, [f"{at}.o_proj"]),
        )

    def _moe(self, at: str) -> FusedMoE:
        router = self.source.plain(f"{at}.gate.weight", torch.float32)
        assert router is not None
        return FusedMoE(
            config=self.config,
            router=router,
            experts=load_experts(self.source, f"{at}.experts"),
            shared=self._ffn(f"{at}.shared_experts") if self.config.n_shared_experts else None,
        )

    def _ffn(self, at: str) -> FusedFFN:
        return FusedFFN(
            load_projections(self.source, [f"{at}.gate_proj", f"{at}.up_proj"]),
            load_projections(self.source, [f"{at}.down_proj"]),
        )

    def _norm(self, module: str, eps: float) -> RMSNorm:
        weight = self.source.plain(f"{module}.weight")
        assert weight is not None
        return RMSNorm(weight, eps)
