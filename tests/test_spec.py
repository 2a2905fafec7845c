"""What a tensor says of itself, against statements that are independent of `arch/`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tiny
from gguf import MODEL_ARCH, get_tensor_name_map

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.arch.spec import Router, TensorSpec
from dsv2quant.planning.smoothing import smoothing_pairs

CONFIGS = {"lite": tiny.LITE, "v2": tiny.V2 | {"attention_bias": True}, "grouped": tiny.GROUPED}
# vLLM 0.33.0, deepseek_v2.py: the class of each module, and what of a weight [out, in] such a class splits over GPUs.
CLASSES = {
    "embed_tokens": "VocabParallelEmbedding", "lm_head": "ParallelLMHead", "mlp.gate": "ReplicatedLinear",
    "q_proj": "ColumnParallelLinear", "q_a_proj": "ReplicatedLinear", "kv_a_proj_with_mqa": "ReplicatedLinear",
    "q_b_proj": "ColumnParallelLinear", "kv_b_proj": "ColumnParallelLinear", "o_proj": "RowParallelLinear",
    "gate_proj": "MergedColumnParallelLinear", "up_proj": "MergedColumnParallelLinear",
    "down_proj": "RowParallelLinear",
}  # fmt: skip
SPLIT = {
    "VocabParallelEmbedding": "rows", "ParallelLMHead": "rows", "ColumnParallelLinear": "rows",
    "MergedColumnParallelLinear": "rows", "RowParallelLinear": "columns", "ReplicatedLinear": None,
}  # fmt: skip
# DeepseekV2DecoderLayer.forward of DeepSeek's modeling_deepseek.py: what each module is applied to, in its layer.
INPUTS = {
    r"self_attn\.(q_proj|q_a_proj|kv_a_proj_with_mqa)": "input_layernorm",
    r"self_attn\.q_b_proj": "self_attn.q_a_layernorm",
    r"self_attn\.kv_b_proj": "self_attn.kv_a_layernorm",
    r"self_attn\.o_proj": "values",
    r"mlp\.(gate|gate_proj|up_proj|shared_experts\.(gate|up)_proj)": "post_attention_layernorm",
    r"mlp\.experts\.(\d+)\.(gate|up)_proj": r"post_attention_layernorm, of expert \1's tokens",
    r"(mlp.*)\.down_proj": r"\1's activation",
}
Weights = dict[str, np.ndarray]


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return model_config(request.param, "config.json")


def linears(config: ModelConfig) -> list[TensorSpec]:
    return [s for s in architecture(config).specs() if s.layer is not None and s.role not in ("norm", "bias")]


def read_by(spec: TensorSpec) -> str:
    module = spec.module.removeprefix(f"model.layers.{spec.layer}.")
    matches = ((re.fullmatch(pattern, module), what) for pattern, what in INPUTS.items())
    return next(match.expand(what) for match, what in matches if match)


def test_a_site_is_one_input_and_an_input_one_site(config: ModelConfig) -> None:
    by_site, by_input = {}, {}
    for spec in linears(config):
        key = (spec.layer, read_by(spec))
        assert by_site.setdefault(spec.site, key) == key
        assert by_input.setdefault(key, spec.site) == spec.site
    modules = {spec.module for spec in linears(config)}
    assert modules >= by_site.keys()
    assert all(s.site is None for s in architecture(config).specs() if s.layer is None or s.role in ("norm", "bias"))


def test_parallel_axes_are_those_of_vllms_classes(config: ModelConfig) -> None:
    for spec in architecture(config).specs():
        named = spec.module.endswith(tuple(CLASSES)) and spec.role != "bias"
        wanted = SPLIT[next(c for name, c in CLASSES.items() if spec.module.endswith(name))] if named else None
        assert spec.parallel == wanted, spec.name


def test_what_vllm_packs_is_fused(config: ModelConfig) -> None:
    """`packed_modules_mapping` of deepseek_v2.py, and FusedMoE's parameters w13_weight and w2_weight."""
    packed = {"gate_up_proj": ["gate_proj", "up_proj"]}
    if config.q_lora_rank is not None:
        packed["fused_qkv_a_proj"] = ["q_a_proj", "kv_a_proj_with_mqa"]
    specs = {spec.module: spec for spec in linears(config)}
    together: set[str] = set()
    for spec in specs.values():
        parent, _, leaf = spec.module.rpartition(".")
        for module, members in packed.items():
            if leaf == members[0]:
                group = [specs[f"{parent}.{member}"] for member in members]
                name = f"{parent}.{module}" if spec.expert is None else f"model.layers.{spec.layer}.mlp.experts.w13"
                assert [member.fused_as.names[0] for member in group] == [name, name]
                assert [member.fused_as.is_last for member in group] == [False, True]
                assert {member.fused_as.rows for member in group} == {sum(member.shape[0] for member in group)}
                together |= {member.module for member in group}
    for spec in specs.values():
        if spec.role == "routed.down_proj":
            assert spec.fused_as.names == (f"model.layers.{spec.layer}.mlp.experts.w2",)
        elif spec.module not in together:  # alone, if at all
            assert spec.fused_as is None or spec.fused_as.rows == spec.shape[0]


def test_gguf_names_are_those_of_ggufs_own_map(config: ModelConfig) -> None:
    names = get_tensor_name_map(MODEL_ARCH.DEEPSEEK2, config.num_hidden_layers)
    for spec in architecture(config).specs():
        stacked = re.sub(r"experts\.\d+\.", "experts.", spec.name)
        assert spec.gguf_name == names.get_name(stacked, try_suffixes=(".weight", ".bias")), spec.name


def test_what_stays_is_all_but_the_linears_of_layers(config: ModelConfig) -> None:
    kept = {spec.module for spec in architecture(config).specs() if spec.keep and spec.role != "bias"}
    norms = {module for module in kept if module.endswith("norm")}
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    assert kept - norms == {"model.embed_tokens", "lm_head", *(f"model.layers.{n}.mlp.gate" for n in layers)}
    assert len(norms) == 1 + (3 + (config.q_lora_rank is not None)) * config.num_hidden_layers


def test_the_router_is_the_configurations() -> None:
    wanted = Router(3, 4, 2, scale=16.0)
    assert architecture(model_config(tiny.V2, "config.json")).router == wanted
    dense = tiny.LITE | {"n_routed_experts": 0, "num_experts_per_tok": 0}
    assert architecture(model_config(dense, "config.json")).router is None


def decoder_layer(c: ModelConfig, layer: int, weights: Weights, x: np.ndarray) -> dict[str, np.ndarray]:
    """What a layer makes of x [tokens, hidden], before the router chooses, and without rotation, which is of each
    head's channels among themselves."""
    at = f"model.layers.{layer}"

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        y: np.ndarray = x @ weights[f"{at}.{name}.weight"].T
        return y + weights.get(f"{at}.{name}.bias", 0)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True)) * weights[f"{at}.{name}.weight"]

    def ffn(name: str, x: np.ndarray) -> np.ndarray:
        gate = linear(f"{name}.gate_proj", x)
        return linear(f"{name}.down_proj", gate / (1 + np.exp(-gate)) * linear(f"{name}.up_proj", x))

    h, heads = norm("input_layernorm", x), c.num_attention_heads
    latent_query = c.q_lora_rank is not None
    q = linear("self_attn.q_proj", h) if not latent_query else linear(
        "self_attn.q_b_proj", norm("self_attn.q_a_layernorm", linear("self_attn.q_a_proj", h))
    )  # fmt: skip
    latent, k_pe = np.split(linear("self_attn.kv_a_proj_with_mqa", h), [c.kv_lora_rank], -1)
    kv = linear("self_attn.kv_b_proj", norm("self_attn.kv_a_layernorm", latent)).reshape(len(x), heads, -1)
    k, v = np.split(kv, [c.qk_nope_head_dim], -1)
    keys = np.concatenate([k, np.broadcast_to(k_pe[:, None], (len(x), heads, k_pe.shape[-1]))], -1)
    scores = np.exp(np.einsum("qhd,khd->hqk", q.reshape(len(x), heads, -1), keys) * c.qk_head_dim**-0.5)
    mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(len(x), -1)
    x = x + linear("self_attn.o_proj", mixed)
    h = norm("post_attention_layernorm", x)
    ffns = ["mlp.shared_experts", *(f"mlp.experts.{e}" for e in range(c.n_routed_experts))]
    made = {name: ffn(name, h) for name in (ffns if c.is_moe(layer) else ["mlp"])}
    return made | {"attention": x} | ({"router": linear("mlp.gate", h)} if c.is_moe(layer) else {})


def scaled(weights: Weights, spec: TensorSpec, by: Any) -> None:
    weights[spec.name] = weights[spec.name] * by


@pytest.mark.parametrize("layer", [0, 1])
def test_smoothing_leaves_a_layer_as_it_is(config: ModelConfig, layer: int) -> None:
    """By scales of any size, in float64: all pairs at once; and a pair's half alone does not."""
    rng = np.random.default_rng(layer)
    specs = architecture(config).layer(layer)
    weights = {s.name: rng.normal(size=s.shape) * (s.shape[-1] ** -0.5 if len(s.shape) > 1 else 1) for s in specs}
    x = rng.normal(size=(5, config.hidden_size))
    want, smooth = decoder_layer(config, layer, weights, x), dict(weights)
    pairs = smoothing_pairs(config, layer)
    assert {spec for pair in pairs for spec in pair.consumers} == {s for s in specs if s.role not in ("norm", "bias")}
    for pair in pairs:
        scales = np.exp(rng.normal(size=pair.consumers[0].shape[1]))
        half, rows = dict(weights), np.ones(pair.producer.shape[0])
        rows[slice(None) if pair.rows is None else pair.rows] = 1 / scales
        for spec in pair.consumers:
            scaled(smooth, spec, scales)
        scaled(smooth, pair.producer, rows if len(pair.producer.shape) == 1 else rows[:, None])
        scaled(half, pair.consumers[-1], scales)
        off = decoder_layer(config, layer, half, x)
        assert any(abs(off[name] - want[name]).max() > 1e-3 for name in want), pair.consumers[-1].name
    found = decoder_layer(config, layer, smooth, x)
    for name in want:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-9, atol=1e-12)
