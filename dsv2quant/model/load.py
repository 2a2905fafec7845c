"""The layers of the torch runtime, and what stands before the first and behind the last; their weights, decoded from a
checkpoint one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.weights import Weight
from dsv2quant.errors import UsageError
from dsv2quant.formats.declared import activations_quantized
from dsv2quant.formats.fp8 import INPUT_SCALE
from dsv2quant.kernels.reference import multiplies_bf16
from dsv2quant.model.attention import GroupedAttention, LatentAttention
from dsv2quant.model.cache import KV_DTYPES, Cache
from dsv2quant.model.layers import FFN, Linear, MoE, RMSNorm, Stages, finish
from dsv2quant.model.serving import Serving, activation, decode, takes_cache_scales

Backend = Literal["torch", "kernels"]
LATENT_NORM_EPS = 1e-6  # DeepSeek gives the latents' norms the class default, whatever rms_norm_eps says


@dataclass(frozen=True)
class LoadOptions:
    """Where and how to compute. `weight_only` leaves activations unquantized. `scale_dtype` rounds the scales of all
    but the routed experts first, as transformers' default load of compressed-tensors does. `kv_cache` is the dtype of
    the latent cache, `dtype` where it is None. `backend` is 'torch', the reference, which decodes weights, or
    'kernels', Triton's, which take them as they are stored: see fused_model.py. `serving` names the consumer whose
    departures from what an artifact says the torch backend makes, too: see serving.py. `calibrates` lets a CPU
    compute linear layers in BF16 where it multiplies that."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    weight_only: bool = False
    scale_dtype: torch.dtype | None = None
    kv_cache: torch.dtype | None = None
    backend: Backend = "torch"
    serving: Serving | None = None
    calibrates: bool = False


def default_dtype(device: str) -> torch.dtype:
    """What to compute in where nothing else is asked for."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def choose_backend(asked: str, device: str, dtype: torch.dtype, departs: bool = False) -> Backend:
    """'torch' or 'kernels', for 'auto' the latter where they can be had: not where what is computed `departs` from what
    the artifact says. Raises UsageError where they can't and are asked for."""
    able = dtype == torch.bfloat16 and not departs and runs_kernels(device)
    if asked == "kernels" and not able:
        fix = "they need a Hopper GPU as --device, bfloat16, and neither --weight-only nor --as: take --backend torch"
        raise UsageError("--backend kernels can't be had", fix=fix)
    return "kernels" if able and asked != "torch" else "torch"


def runs_kernels(device: str) -> bool:
    """Whether this is a GPU with the units that the kernels are for: a Hopper, or what came after."""
    return device != "cpu" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (9, 0)


def load_options(
    device: str, dtype: str, backend: str, kv_cache: str, weight_only: bool = False, serving: str | None = None
) -> LoadOptions:
    """How a model is loaded, of options as they are spelled. Raises UsageError for a backend that can't be had."""
    computed = default_dtype(device) if dtype == "auto" else getattr(torch, dtype)
    chosen = choose_backend(backend, device, computed, weight_only or serving is not None)
    return LoadOptions(
        computed, device, weight_only, kv_cache=KV_DTYPES.get(kv_cache), backend=chosen,
        serving=serving,  # type: ignore[arg-type]
    )  # fmt: skip


Hidden = tuple[torch.Tensor, torch.Tensor | None]  # states behind a layer, and the experts it chose, if it has any


@dataclass
class DecoderLayer:
    """Pre-norm attention and FFN, each added to the residual stream."""

    input_layernorm: RMSNorm
    attention: LatentAttention | GroupedAttention
    post_attention_layernorm: RMSNorm
    ffn: FFN | MoE

    def __call__(
        self, x: torch.Tensor, rope: torch.Tensor, cache: Cache | None = None, absorbed: bool = False
    ) -> Hidden:
        """x [batch, new, hidden] → (the same shape, chosen experts [tokens, k] or None in a dense layer)."""
        return finish(self.stages(x, rope, cache, absorbed))

    def stages(
        self, x: torch.Tensor, rope: torch.Tensor, cache: Cache | None = None, absorbed: bool = False
    ) -> Stages[Hidden]:
        """The stages of `__call__`."""
        attended = yield from self.attention.stages(self.input_layernorm(x), rope, cache, absorbed)
        return (yield from self.feed_forward(x + attended))

    def feed_forward(self, x: torch.Tensor) -> Stages[Hidden]:
        """The stages behind attention, for hidden states x [..., hidden]."""
        normed = self.post_attention_layernorm(x)
        if isinstance(self.ffn, FFN):
            return x + (yield from self.ffn.stages(normed)), None
        out, chosen = yield from self.ffn.stages(normed)
        return x + out, chosen

    def decoded(self, x: torch.Tensor, rope: torch.Tensor, cache: Cache) -> Hidden:
        """One token after the other into the empty `cache`, as decoding does: x [batch, new, hidden] → (the same shape,
        chosen experts [batch, new, k] or None)."""
        steps = [self(x[:, t : t + 1], rope[t : t + 1], cache, absorbed=True) for t in range(x.shape[1])]
        chosen = [experts for _, experts in steps if experts is not None]  # [batch, k] of each token
        return torch.cat([out for out, _ in steps], 1), torch.stack(chosen, 1) if chosen else None


@dataclass
class Ends:
    """Embedding [vocab, hidden], final norm, and head: a linear layer with a row for each token, or each label of a
    classifier."""

    embedding: torch.Tensor
    norm: RMSNorm
    head: Callable[[torch.Tensor], torch.Tensor]

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self.embedding)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states behind the last layer, [..., hidden] → [..., vocab], in x's dtype."""
        return self.head(self.norm(x))


class Loader:
    """Decodes weights by name. Layers are built when asked for and belong to the caller."""

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions) -> None:
        self.checkpoint, self.options, self.config = checkpoint, options, checkpoint.config
        self._by_name = {weight.spec.name: weight for weight in checkpoint.weights}
        quantized = activations_quantized(checkpoint.config.quantization) or options.serving == "llama.cpp"
        self._activations = quantized and not options.weight_only

    def ends(self) -> Ends:
        c = self.checkpoint.config
        embedding = self.tensor("model.embed_tokens.weight")
        tied = "model.embed_tokens.weight"
        head = next((name for name in ("score.weight", "lm_head.weight") if name in self._by_name), tied)
        matrix = embedding if head == tied else self.tensor(head)
        projection = Linear(matrix, activation=self._activation(self._by_name[head]))
        return Ends(embedding, self._norm("model.norm", c.rms_norm_eps), projection)

    def layer(self, index: int) -> DecoderLayer:
        c, at = self.checkpoint.config, f"model.layers.{index}"
        return DecoderLayer(
            input_layernorm=self._norm(f"{at}.input_layernorm", c.rms_norm_eps),
            attention=self._attention(c, f"{at}.self_attn"),
            post_attention_layernorm=self._norm(f"{at}.post_attention_layernorm", c.rms_norm_eps),
            ffn=self._moe(c, f"{at}.mlp") if c.is_moe(index) else self._ffn(f"{at}.mlp"),
        )

    def kv_scale(self, layer: int) -> torch.Tensor | None:
        """As the checkpoint's, where it is served with them."""
        if not takes_cache_scales(self.options.serving, self.config):
            return None
        return self.checkpoint.kv_scale(layer, self.options.device)

    def _attention(self, c: ModelConfig, at: str) -> LatentAttention | GroupedAttention:
        if not c.is_mla:
            q, k, v, o = (self.linear(f"{at}.{name}_proj") for name in "qkvo")
            return GroupedAttention(c, q, k, v, o)
        latent_query = c.q_lora_rank is not None
        return LatentAttention(
            config=c,
            kv_a_proj_with_mqa=self.linear(f"{at}.kv_a_proj_with_mqa"),
            kv_a_layernorm=self._norm(f"{at}.kv_a_layernorm", LATENT_NORM_EPS),
            kv_b_proj=self.linear(f"{at}.kv_b_proj"),
            o_proj=self.linear(f"{at}.o_proj"),
            q_proj=None if latent_query else self.linear(f"{at}.q_proj"),
            q_a_proj=self.linear(f"{at}.q_a_proj") if latent_query else None,
            q_a_layernorm=self._norm(f"{at}.q_a_layernorm", LATENT_NORM_EPS) if latent_query else None,
            q_b_proj=self.linear(f"{at}.q_b_proj") if latent_query else None,
        )

    def _moe(self, c: ModelConfig, at: str) -> MoE:
        routing = architecture(c).router
        assert routing is not None
        bias = self.tensor(f"{at}.gate.e_score_correction_bias", torch.float32) if routing.bias else None
        return MoE(
            routing=routing,
            router=Linear(self.tensor(f"{at}.gate.weight", torch.float32), module=f"{at}.gate"),
            router_bias=bias,
            experts=[self._ffn(f"{at}.experts.{expert}") for expert in range(c.n_routed_experts)],
            shared=self._ffn(f"{at}.shared_experts") if c.n_shared_experts else None,
        )

    def _ffn(self, at: str) -> FFN:
        return FFN(*(self.linear(f"{at}.{name}") for name in ("gate_proj", "up_proj", "down_proj")))

    def linear(self, module: str) -> Linear:
        weight = self._by_name[f"{module}.weight"]
        o = self.options
        granularity = self._activation(weight)
        # Where activations are quantized the product is taken in float32: see `reference.linear`.
        dtype = o.dtype if granularity is None else torch.float32
        bias = self.tensor(f"{module}.bias") if f"{module}.bias" in self._by_name else None
        input_scale = None
        if granularity == "static":
            stored = self.checkpoint.tensor(weight.parts[INPUT_SCALE], o.device)
            input_scale = stored.to(o.scale_dtype or torch.float32).float().reshape(1)
        return Linear(
            self.tensor(f"{module}.weight", dtype),
            bias,
            granularity,
            input_scale,
            module,
            o.calibrates and multiplies_bf16(),
        )

    def _activation(self, weight: Weight) -> str | None:
        o = self.options
        return activation(weight, o.serving, o.device != "cpu") if self._activations else None

    def _norm(self, module: str, eps: float) -> RMSNorm:
        return RMSNorm(self.tensor(f"{module}.weight"), eps)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        o, weight = self.options, self._by_name[name]
        scale_dtype = None if weight.spec.role.startswith("routed.") else o.scale_dtype
        return decode(self.checkpoint, weight, o.serving, dtype or o.dtype, o.device, scale_dtype)
