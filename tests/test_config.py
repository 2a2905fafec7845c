"""config.json in every spelling."""

from __future__ import annotations

import json

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2quant.arch.config import ModelConfig, Yarn
from dsv2quant.arch.deepseek_v2 import CAUSAL_LM
from dsv2quant.arch.families import model_config
from dsv2quant.checkpoint.weights import check_quantization
from dsv2quant.errors import InputError


def parse(**changes: object) -> ModelConfig:
    return model_config({k: v for k, v in (tiny.LITE | changes).items() if v != "absent"}, "config.json")


def test_rope_scaling_and_rope_parameters_are_the_same():
    yarn = {k: v for k, v in tiny.YARN.items() if k != "type"}
    old = parse(rope_scaling={"type": "yarn", **yarn}, rope_theta=5000)
    renamed = parse(rope_scaling={"rope_type": "yarn", **yarn}, rope_theta=5000)
    new = parse(
        rope_scaling="absent", rope_theta="absent", rope_parameters={"rope_type": "yarn", "rope_theta": 5000, **yarn}
    )
    assert old == renamed == new
    assert old.yarn == Yarn(40.0, 32, 32.0, 1.0, 0.707, 0.707)
    assert old.trained_context == 32


def test_without_yarn():
    default = {"rope_type": "default", "rope_theta": 10000.0}
    for rope in ({"rope_scaling": None}, {"rope_scaling": "absent", "rope_parameters": default}):
        config = parse(**rope)
        assert config.yarn is None
        assert config.trained_context == config.max_position_embeddings == 1280


def test_yarn_defaults_are_deepseeks():
    config = parse(rope_scaling={"type": "yarn", "factor": 4})
    assert config.yarn == Yarn(4.0, 4096, 32.0, 1.0, 1.0, 0.0)


def test_absent_keys_take_deepseeks_defaults():
    config = model_config({"architectures": [CAUSAL_LM]}, "config.json")
    assert (config.hidden_size, config.q_lora_rank, config.kv_lora_rank, config.num_hidden_layers) == (
        4096,
        1536,
        512,
        30,
    )
    assert (config.n_routed_experts, config.n_shared_experts, config.moe_layer_freq) == (0, 0, 1)
    assert not config.is_moe(29)
    assert config.dtype is None


def test_null_query_latent_means_direct_queries():
    assert parse(q_lora_rank=None).q_lora_rank is None
    assert parse(q_lora_rank="absent").q_lora_rank == 1536


@pytest.mark.parametrize("spelling", ["greedy", "gready", None])
def test_greedy_has_one_group(spelling):
    config = parse(topk_method=spelling, n_group=4, topk_group=2)
    assert (config.n_group, config.topk_group) == (1, 1)


def test_dense_and_moe_layers():
    config = parse(first_k_dense_replace=2, moe_layer_freq=2, num_hidden_layers=6)
    assert [layer for layer in range(6) if config.is_moe(layer)] == [2, 4]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_spellings(key):
    assert parse(**({"torch_dtype": "absent"} | {key: "torch.float16"})).dtype == "float16"


def test_what_transformers_saves_parses_the_same(tmp_path):
    raw = tiny.V2 | {"n_routed_experts": 64, "n_shared_experts": 2}
    tiny.transformers_config(raw).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved
    saved["architectures"] = [CAUSAL_LM]
    ours, theirs = model_config(raw, ""), model_config(saved, "")
    assert {k: v for k, v in vars(ours).items() if k != "dtype"} == {
        k: v for k, v in vars(theirs).items() if k != "dtype"
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "model_type is 'deepseek_v2' .supported: llama"),
        ({"architectures": ["DeepseekV4ForCausalLM"]}, "architectures.*supported: DeepseekV2ForCausalLM"),
        ({"architectures": ["VL2"], "language_config": {"use_mla": False}}, "language model of language_config"),
        ({"use_mla": False, "num_key_value_heads": 3}, "num_key_value_heads is 3 .it must divide"),
        ({"use_mla": False}, "rope type is 'yarn'"),
        ({"num_hidden_layers": 1024, "n_routed_experts": 4096}, "1,024 × 4,096 .*no model has more"),
        ({"id2label": 5}, "id2label is 5"),
        ({"routed_scaling_factor": 10**400}, "finite"),
        ({"routed_scaling_factor": 10**5000}, "too large to show"),
        ({"hidden_size": [[1] * 999]}, r"\.\.\. \(it must be an integer"),
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "from 1 to 1024"),
        ({"n_routed_experts": -1}, "n_routed_experts"),
        ({"hidden_act": "gelu"}, "supported: silu"),
        ({"scoring_func": "sigmoid"}, "supported: softmax"),
        ({"topk_method": "noaux_tc"}, "scoring_func is 'softmax' .supported: sigmoid"),
        ({"topk_method": "best"}, "topk_method"),
        ({"topk_method": "group_limited_greedy", "n_group": 3}, "divide the 8 routed experts"),
        ({"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 3}, "topk_group"),
        ({"num_experts_per_tok": 9}, "1 to 8"),
        ({"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 2}, "1 to 2"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "supported: yarn, default"),
        ({"rope_scaling": tiny.YARN | {"attention_factor": 2.0}}, "attention_factor"),
        ({"rope_scaling": tiny.YARN | {"factor": 0.5}}, "at least 1"),
        ({"rope_scaling": tiny.YARN | {"original_max_position_embeddings": "4k"}}, "positive integer"),
        ({"rope_theta": float("nan")}, "finite"),
        ({"rope_theta": 1.0}, "greater than 1"),
        ({"qk_rope_head_dim": 7}, "even"),
        ({"mlp_bias": True}, "FFN biases are not supported"),
        ({"norm_topk_prob": "no"}, "true or false"),
        ({"torch_dtype": "int8"}, "dtype"),
        ({"quantization_config": []}, "an object"),
    ],
)
def test_what_is_not_understood_is_an_error(changes, message):
    with pytest.raises(InputError, match=message):
        parse(**changes)


@pytest.mark.parametrize("name", ["v3", "glm4"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_nextn_predict_layers": 65}, "num_nextn_predict_layers is 65 .*from 0 to 64"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1"),
        ({"num_hidden_layers": 12, "num_nextn_predict_layers": 5, "n_routed_experts": 4096}, "17 × 4,096 .*no model"),
    ],
)
def test_layers_for_prediction_are_counted(name, changes, message):
    with pytest.raises(InputError, match=message):
        model_config(tiny.FAMILY[name] | changes, "config.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([10**400, -(10**400), 1 << 31, 1e308, "yarn", "default", "silu", [["silu"]]]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "factor", "0"]), inner),
    max_leaves=4,
)  # fmt: skip
KEYS = sorted({*tiny.LITE, "id2label", "num_labels", "use_mla", "mlp_bias", "dtype", "rope_parameters", "text_config"})


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3), st.booleans())
def test_no_value_is_more_than_an_error(changes, yarn):
    if yarn:  # let the values meet YaRN's own keys, too
        changes = {
            "rope_scaling": tiny.YARN
            | {"factor": 4}
            | dict.fromkeys(("mscale", "beta_fast"), next(iter(changes.values())))
        }
    try:
        config = parse(**changes)
    except InputError:
        return
    assert all(
        type(v) in (int, float, bool, str)
        for v in vars(config).values()
        if v is not None and v != config.yarn and v != config.quantization
    )
    assert 0 < config.rope_theta < float("inf")


@pytest.mark.parametrize("quantization", [{}, {"quant_method": []}, {"quant_method": "gptq", "bits": {}},
                                          {"quant_method": "awq", "version": 1, "bits": 4}, {"bits": 4}])  # fmt: skip
def test_a_quantization_that_is_not_understood_is_an_error(quantization):
    with pytest.raises(InputError):
        check_quantization(quantization, "")
