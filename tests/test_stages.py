"""A layer's stages: which linears are applied to what, in data order, against one token and one head at a time in
float64; and weights that are replaced on the way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tiny
import torch
from test_runtime import routed_in_float64

from dsv2quant.arch.config import ModelConfig
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.model.layers import Linear, Stage, finish
from dsv2quant.model.load import DecoderLayer, Loader, LoadOptions
from dsv2quant.model.runtime import Model

BATCH, TOKENS = 2, 7
# Sums of up to 96 float32 products of order 1, through one layer.
TOLERANCE = 1e-5

Expected = tuple[list[str], np.ndarray, np.ndarray | None]  # modules, their input [tokens, columns], routing weights


@pytest.fixture(
    scope="module", params=["lite", "v2", "v2 without shared experts"], ids=lambda name: name.replace(" ", "-")
)
def model(request, tmp_path_factory):
    """(the model, its weights in float64)."""
    raw = {"lite": tiny.LITE, "v2": tiny.V2}.get(
        request.param, tiny.V2 | {"n_shared_experts": None, "attention_bias": True}
    )
    raw = raw | {"rope_scaling": None}
    weights = tiny.random_weights(raw, dtype=torch.float32)
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("stages") / "m", raw, weights)
    return Model(open_checkpoint(folder)), {name: tensor.double().numpy() for name, tensor in weights.items()}


def hidden(width: int) -> torch.Tensor:
    return torch.randn(BATCH, TOKENS, width, generator=torch.Generator().manual_seed(1))


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def turned(row: np.ndarray, position: int, theta: float) -> np.ndarray:
    """A row of interleaved pairs, rotated."""
    out = row.copy()
    for pair in range(len(row) // 2):
        angle = position * theta ** (-2 * pair / len(row))
        a, b = row[2 * pair : 2 * pair + 2]
        out[2 * pair : 2 * pair + 2] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return out


class Plain:
    """A layer in float64, in the order of the paper; what is applied to what is noted in `seen`."""

    def __init__(self, config: ModelConfig, index: int, weights: dict[str, np.ndarray], absorbed: bool) -> None:
        self.c, self.at, self.weights, self.absorbed = config, f"model.layers.{index}", weights, absorbed
        self.moe = config.is_moe(index)
        self.seen: list[Expected] = []

    def see(self, x: np.ndarray, *modules: str, routed: np.ndarray | None = None) -> None:
        self.seen.append(([f"{self.at}.{module}" for module in modules], x, routed))

    def linear(self, module: str, x: np.ndarray) -> np.ndarray:
        bias = self.weights.get(f"{self.at}.{module}.bias", 0.0)
        return x @ self.weights[f"{self.at}.{module}.weight"].T + bias

    def norm(self, module: str, x: np.ndarray) -> np.ndarray:
        return norm(x, self.weights[f"{self.at}.{module}.weight"])

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = x + self.attention(self.norm("input_layernorm", x))
        normed = self.norm("post_attention_layernorm", x)
        return x + (self.mixture(normed) if self.moe else self.ffn("mlp", normed))

    def attention(self, x: np.ndarray) -> np.ndarray:
        c = self.c
        if c.q_lora_rank is None:
            self.see(x, "self_attn.q_proj", "self_attn.kv_a_proj_with_mqa")
            q = self.linear("self_attn.q_proj", x)
        else:
            self.see(x, "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
            q = self.norm("self_attn.q_a_layernorm", self.linear("self_attn.q_a_proj", x))
            self.see(q, "self_attn.q_b_proj")
            q = self.linear("self_attn.q_b_proj", q)
        both = self.linear("self_attn.kv_a_proj_with_mqa", x)
        latent = self.norm("self_attn.kv_a_layernorm", both[:, : c.kv_lora_rank])
        self.see(latent, "self_attn.kv_b_proj")
        kv = self.linear("self_attn.kv_b_proj", latent).reshape(len(x), c.num_attention_heads, -1)
        q = q.reshape(len(x), c.num_attention_heads, -1)
        n, context = c.qk_nope_head_dim, np.zeros((len(x), c.num_attention_heads, c.v_head_dim))
        mixed = np.zeros((len(x), c.num_attention_heads, c.kv_lora_rank))
        keys = np.array([turned(row, i % TOKENS, c.rope_theta) for i, row in enumerate(both[:, c.kv_lora_rank :])])
        for token in range(len(x)):
            before = slice(token - token % TOKENS, token + 1)
            for head in range(c.num_attention_heads):
                turned_query = turned(q[token, head, n:], token % TOKENS, c.rope_theta)
                scores = kv[before, head, :n] @ q[token, head, :n] + keys[before] @ turned_query
                shares = np.exp((scores - scores.max()) / np.sqrt(c.qk_head_dim))
                shares /= shares.sum()
                context[token, head] = shares @ kv[before, head, n:]
                mixed[token, head] = shares @ latent[before]
        if self.absorbed:
            self.see(q[:, :, :n], "self_attn.kv_b_proj")
            self.see(mixed, "self_attn.kv_b_proj")
        self.see(context.reshape(len(x), -1), "self_attn.o_proj")
        return self.linear("self_attn.o_proj", context.reshape(len(x), -1))

    def ffn(self, at: str, x: np.ndarray, routed: np.ndarray | None = None) -> np.ndarray:
        self.see(x, f"{at}.gate_proj", f"{at}.up_proj", routed=routed)
        gate = self.linear(f"{at}.gate_proj", x)
        h = gate / (1 + np.exp(-gate)) * self.linear(f"{at}.up_proj", x)
        self.see(h, f"{at}.down_proj", routed=routed)
        return self.linear(f"{at}.down_proj", h)

    def mixture(self, x: np.ndarray) -> np.ndarray:
        self.see(x, "mlp.gate")
        shares = routed_in_float64(x, self.weights[f"{self.at}.mlp.gate.weight"], self.c)
        out = np.zeros_like(x)
        for expert in range(self.c.n_routed_experts):
            (tokens,) = shares[:, expert].nonzero()
            if len(tokens):
                routed = shares[tokens, expert]
                out[tokens] += routed[:, None] * self.ffn(f"mlp.experts.{expert}", x[tokens], routed)
        return out + self.ffn("mlp.shared_experts", x) if self.c.n_shared_experts else out


def assert_close(found: torch.Tensor, want: np.ndarray) -> None:
    assert found.shape == want.shape
    assert np.linalg.norm(found.double().numpy() - want) < TOLERANCE * np.linalg.norm(want)


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_stages_are_the_linears_and_their_inputs_in_data_order(index, absorbed, model):
    runtime, weights = model
    layer = list(runtime.layers())[index]
    x = hidden(runtime.config.hidden_size)
    seen: list[Stage] = []
    with torch.inference_mode():
        out, chosen = finish(layer.stages(x, runtime.rope(0, TOKENS), absorbed=absorbed), seen.append)
    plain = Plain(runtime.config, index, weights, absorbed)
    want = plain(x.flatten(0, 1).double().numpy())
    assert [[linear.module for linear in stage.linears] for stage in seen] == [modules for modules, *_ in plain.seen]
    for stage, (_, inputs, routed) in zip(seen, plain.seen, strict=True):
        # Halves of kv_b_proj are applied by heads: [batch, heads, tokens, columns].
        found = stage.x if stage.half is None else stage.x.transpose(1, 2)
        assert_close(found.reshape(inputs.shape), inputs)
        assert (stage.routed is None) == (routed is None)
        if routed is not None:
            assert_close(stage.routed, routed)
    assert [stage.half for stage in seen if stage.half] == ["k", "v"] * absorbed
    assert_close(out.flatten(0, 1), want)
    assert (chosen is not None) == runtime.config.is_moe(index)


def every(part: object) -> Iterator[Linear]:
    if isinstance(part, Linear):
        yield part
    elif isinstance(part, list):
        for item in part:
            yield from every(item)
    elif hasattr(part, "__dict__"):
        yield from every(list(vars(part).values()))


@pytest.mark.parametrize("index", [0, 1])
def test_what_follows_uses_the_weights_that_a_stage_is_given(index, model):
    runtime, _ = model
    loader = Loader(runtime._loader.checkpoint, LoadOptions())
    rope, x = runtime.rope(0, TOKENS), hidden(runtime.config.hidden_size)
    layer, changed = loader.layer(index), loader.layer(index)
    other = {linear.module: linear for linear in every(changed)}
    for i, linear in enumerate(other.values()):
        linear.weight = linear.weight * (
            1 + 0.1 * torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(i))
        )

    def replace(stage: Stage) -> None:
        for linear in stage.linears:
            linear.weight = other[linear.module].weight

    def run(layer: DecoderLayer) -> torch.Tensor:
        return layer(x, rope)[0]

    with torch.inference_mode():
        before = run(layer)
        made, _ = finish(layer.stages(x, rope), replace)
        assert torch.equal(made, run(changed))
        assert torch.equal(made, run(layer))
        assert not torch.equal(made, before)
