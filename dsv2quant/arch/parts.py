"""The parts that models are made of: each lists its tensors, and says what each is to the others.

Names are those of the published checkpoints (`model.layers.N.mlp.experts.E.gate_proj.weight`); transformers 5 fuses
experts in memory only and saves the same names. `norm` is the module of the norm whose output a part reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dsv2quant.arch.spec import KV_B, Fused, Heads, Router, TensorSpec


def embedding(vocabulary: int, hidden: int) -> TensorSpec:
    return TensorSpec(
        "model.embed_tokens.weight", "embed", (vocabulary, hidden), parallel="rows", gguf_name="token_embd.weight"
    )


def final_norm(hidden: int) -> TensorSpec:
    return TensorSpec("model.norm.weight", "norm", (hidden,), gguf_name="output_norm.weight")


def language_head(vocabulary: int, hidden: int) -> TensorSpec:
    return TensorSpec("lm_head.weight", "lm_head", (vocabulary, hidden), parallel="rows", gguf_name="output.weight")


def score_head(labels: int, hidden: int) -> TensorSpec:
    return TensorSpec("score.weight", "score", (labels, hidden))


def layer_norm(module: str, size: int, layer: int, gguf: str) -> TensorSpec:
    """A layer's norm; `gguf` is its name in a GGUF file, without the layer."""
    return TensorSpec(f"{module}.weight", "norm", (size,), layer, gguf_name=f"blk.{layer}.{gguf}.weight")


def prediction_ends(layer: int, vocabulary: int, hidden: int) -> Iterator[TensorSpec]:
    """What a layer for multi-token prediction has beside a decoder layer (arXiv:2412.19437, section 2.2): the norms of
    the embedding and of the hidden state that `eh_proj` joins, and a head; embedding and head may be the model's."""
    at = f"model.layers.{layer}"
    yield TensorSpec(
        f"{at}.embed_tokens.weight", "embed", (vocabulary, hidden), layer, parallel="rows", is_optional=True
    )
    for norm in ("enorm", "hnorm"):
        yield TensorSpec(f"{at}.{norm}.weight", "norm", (hidden,), layer)
    yield TensorSpec(f"{at}.eh_proj.weight", "eh_proj", (hidden, 2 * hidden), layer)
    yield TensorSpec(f"{at}.shared_head.norm.weight", "norm", (hidden,), layer)
    yield TensorSpec(
        f"{at}.shared_head.head.weight", "lm_head", (vocabulary, hidden), layer, parallel="rows", is_optional=True
    )


@dataclass(frozen=True)
class GQA:
    """Plain attention: each of `kv_heads` heads of keys and values serves as many heads of queries. `width` is that of
    a head, and `bias` that of all projections. `gguf_pairs` says whether a GGUF file has a head's rows of queries and
    keys in another order (`TensorSpec.gguf_heads`)."""

    hidden: int
    heads: int
    kv_heads: int
    width: int
    bias: bool
    gguf_pairs: bool

    def specs(self, layer: int, norm: str) -> Iterator[TensorSpec]:
        at = f"model.layers.{layer}.self_attn"
        heads = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        rows = sum(heads.values()) * self.width
        for name, count in heads.items():
            module, gguf = f"{at}.{name}_proj", f"blk.{layer}.attn_{name}"
            order = count if self.gguf_pairs and name != "v" else None
            yield TensorSpec(
                f"{module}.weight", f"{name}_proj", (count * self.width, self.hidden), layer, site=f"{at}.q_proj",
                parallel="rows", parts=count, fused_as=Fused((f"{at}.qkv_proj",), rows, name == "v"),
                producer=f"{norm}.weight", gguf_name=f"{gguf}.weight", gguf_heads=order,
            )  # fmt: skip
            if self.bias:
                yield TensorSpec(
                    f"{module}.bias", "bias", (count * self.width,), layer, gguf_name=f"{gguf}.bias", gguf_heads=order
                )
        module = f"{at}.o_proj"
        yield TensorSpec(
            f"{module}.weight", "o_proj", (self.hidden, self.heads * self.width), layer, site=module,
            parallel="columns",
            # of several heads that share values, each has columns of its own for the same rows
            producer=f"{at}.v_proj.weight" if self.kv_heads == self.heads else None,
            gguf_name=f"blk.{layer}.attn_output.weight",
        )  # fmt: skip
        if self.bias:
            yield TensorSpec(f"{module}.bias", "bias", (self.hidden,), layer, gguf_name=f"blk.{layer}.attn_output.bias")


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention: keys and values, and with `q_rank` queries too, come from normalised latents.

    `nope`, `rope` and `values` are a head's widths: of what is not rotated of its queries and keys, of what is, and of
    its values. `bias` is that of the projections to latents and of the output.
    """

    hidden: int
    heads: int
    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    values: int
    bias: bool

    def specs(self, layer: int, norm: str) -> Iterator[TensorSpec]:
        at = f"model.layers.{layer}.self_attn"
        kv_a, q_norm, kv_norm = f"{at}.kv_a_proj_with_mqa", f"{at}.q_a_layernorm", f"{at}.kv_a_layernorm"
        kv_rows, head = self.kv_rank + self.rope, self.nope + self.rope

        def linear(
            role: str, gguf: str, rows: int, cols: int, producer: str,
            *, site: str | None = None, parallel: Literal["rows", "columns"] | None = None, fused: Fused | None = None,
            heads: Heads | None = None, bias: bool = False,
        ) -> Iterator[TensorSpec]:  # fmt: skip
            module, name = f"{at}.{role}", f"blk.{layer}.{gguf}"
            yield TensorSpec(
                f"{module}.weight", role, (rows, cols), layer, site=site or module, parallel=parallel, fused_as=fused,
                producer=f"{producer}.weight", heads=heads, gguf_name=f"{name}.weight",
            )  # fmt: skip
            if bias:
                yield TensorSpec(f"{module}.bias", "bias", (rows,), layer, gguf_name=f"{name}.bias")

        def fused(is_last: bool) -> Fused:
            # vLLM DeepSeekV2FusedQkvAProjLinear, SGLang fused_qkv_a_proj_with_mqa; without a query latent of kv_a alone
            names = f"{at}.fused_qkv_a_proj", f"{at}.fused_qkv_a_proj_with_mqa"
            return Fused(names, kv_rows + (self.q_rank or 0), is_last)

        if self.q_rank is None:
            yield from linear("q_proj", "attn_q", self.heads * head, self.hidden, norm, site=kv_a, parallel="rows")
        else:
            yield from linear(
                "q_a_proj", "attn_q_a", self.q_rank, self.hidden, norm, site=kv_a, fused=fused(False), bias=self.bias
            )
            yield layer_norm(q_norm, self.q_rank, layer, "attn_q_a_norm")
            yield from linear("q_b_proj", "attn_q_b", self.heads * head, self.q_rank, q_norm, parallel="rows")
        yield from linear(
            "kv_a_proj_with_mqa", "attn_kv_a_mqa", kv_rows, self.hidden, norm,
            fused=fused(True), bias=self.bias,
        )  # fmt: skip
        yield layer_norm(kv_norm, self.kv_rank, layer, "attn_kv_a_norm")
        yield from linear(
            "kv_b_proj", KV_B, self.heads * (self.nope + self.values), self.kv_rank, kv_norm,
            parallel="rows", heads=Heads(self.heads, self.nope),
        )  # fmt: skip
        yield from linear(
            "o_proj", "attn_output", self.hidden, self.heads * self.values, f"{at}.kv_b_proj",
            parallel="columns", bias=self.bias,
        )  # fmt: skip


@dataclass(frozen=True)
class FFN:
    """down(silu(gate(x)) · up(x)); `kind` is 'dense', 'shared' or 'routed'."""

    kind: str
    hidden: int
    width: int

    def specs(self, layer: int, norm: str, expert: int | None = None) -> Iterator[TensorSpec]:
        mlp = f"model.layers.{layer}.mlp"
        at = mlp + {"dense": "", "shared": ".shared_experts", "routed": f".experts.{expert}"}[self.kind]
        suffix = {"dense": "", "shared": "_shexp", "routed": "_exps"}[self.kind]
        # The engines' names of all experts' matrices, or of one FFN's; gate and up are one in both.
        gate_up, down = (f"{at}.gate_up_proj", None) if expert is None else (f"{mlp}.experts.w13", f"{mlp}.experts.w2")
        for name in ("gate", "up"):
            yield TensorSpec(
                f"{at}.{name}_proj.weight", f"{self.kind}.{name}_proj", (self.width, self.hidden), layer, expert,
                site=f"{mlp}.gate" if self.kind == "shared" else f"{at}.gate_proj",  # the router's own input
                parallel="rows", fused_as=Fused((gate_up,), 2 * self.width, name == "up"),
                producer=f"{norm}.weight", gguf_name=f"blk.{layer}.ffn_{name}{suffix}.weight",
            )  # fmt: skip
        yield TensorSpec(
            f"{at}.down_proj.weight", f"{self.kind}.down_proj", (self.hidden, self.width), layer, expert,
            site=f"{at}.down_proj", parallel="columns", fused_as=None if down is None else Fused((down,), self.hidden),
            # not gate_proj: SiLU is not linear
            producer=f"{at}.up_proj.weight", gguf_name=f"blk.{layer}.ffn_down{suffix}.weight",
        )  # fmt: skip


@dataclass(frozen=True)
class MoE:
    """`count` routed experts, of which `router` chooses, and shared ones as one FFN."""

    router: Router
    count: int
    routed: FFN
    shared: FFN | None

    def specs(self, layer: int, norm: str) -> Iterator[TensorSpec]:
        module = f"model.layers.{layer}.mlp.gate"
        yield TensorSpec(
            f"{module}.weight", "router", (self.count, self.routed.hidden), layer, site=module,
            producer=f"{norm}.weight", gguf_name=f"blk.{layer}.ffn_gate_inp.weight",
        )  # fmt: skip
        if self.router.bias:
            yield TensorSpec(
                f"{module}.e_score_correction_bias", "router_bias", (self.count,), layer,
                gguf_name=f"blk.{layer}.exp_probs_b.bias",
            )  # fmt: skip
        for expert in range(self.count):
            yield from self.routed.specs(layer, norm, expert)
        if self.shared is not None:
            yield from self.shared.specs(layer, norm)
