"""GGUF metadata: key by key what llama.cpp's converter and llama-quantize write, and back to config.json.

tests/golden/gguf_metadata.json was made by llama.cpp 0c1e57098 (with transformers 5.23) from the models of
gguf_models.py, whose main() makes it anew.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gguf import GGUFValueType
from gguf_models import GOLDEN, MODELS, Q8_0, described, edit, lite, v2
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.deepseek_v2 import SEQUENCE_CLASSIFICATION
from dsv2quant.arch.families import model_config
from dsv2quant.checkpoint.checkpoint import HfCheckpoint
from dsv2quant.checkpoint.gguf_config import config_json
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError
from dsv2quant.planning.gguf_keys import model_keys
from dsv2quant.planning.gguf_loadable import check_loadable
from dsv2quant.planning.gguf_metadata import model_metadata, warnings
from dsv2quant.storage.gguf import Value, array, check_numbers, f32, pack_header, read, string, u32

KNOWN = json.loads(GOLDEN.read_text(encoding="utf-8"))
LITE = tiny.LITE | {"num_hidden_layers": 27}


def config(raw: dict[str, Any]) -> ModelConfig:
    return model_config(raw, "config.json")


@pytest.mark.parametrize("name", MODELS)
def test_metadata_is_llama_cpps_key_by_key(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(MODELS[name](tmp_path))
    found = described(model_metadata(checkpoint, Q8_0))
    assert json.loads(json.dumps(found)) == KNOWN[name]


def test_hub_id_gives_the_name_not_the_snapshots_commit(tmp_path: Path) -> None:
    folder = lite(tmp_path).rename(tmp_path / "0f1e2d3c4b5a69788796a5b4c3d2e1f001234567")
    checkpoint = open_checkpoint(folder)
    checkpoint.model = "someone/Tiny-V2-Lite-Chat"
    found = described(model_metadata(checkpoint, Q8_0))
    assert json.loads(json.dumps(found)) == KNOWN["lite"]


def test_dropping_expert_groups_leaves_out_their_two_keys_only(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(v2(tmp_path))
    whole, dropped = (model_metadata(checkpoint, Q8_0, drop_expert_groups=drop) for drop in (False, True))
    assert [key for key in whole if key not in dropped] == [
        "deepseek2.expert_group_count",
        "deepseek2.expert_group_used_count",
    ]
    assert dropped == {key: whole[key] for key in dropped}


def test_greedy_routing_ignores_groups_that_the_config_names(tmp_path: Path) -> None:
    """The converter writes them, and llama.cpp would then route by groups, as the model never did."""
    folder = v2(tmp_path)
    edit(folder / "config.json", lambda raw: raw.update(topk_method="greedy"))
    metadata = model_metadata(open_checkpoint(folder), Q8_0)
    assert metadata["deepseek2.expert_group_count"].value == metadata["deepseek2.expert_group_used_count"].value == 1


def _packed(metadata: dict[str, Value], tmp_path: Path) -> dict[str, Value]:
    """As a file gives it back: floats rounded to float32."""
    path = tmp_path / "model.gguf"
    path.write_bytes(pack_header(metadata, []))
    return dict(read(path).metadata)


@pytest.mark.parametrize("name", MODELS)
def test_config_survives_the_round_trip(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(MODELS[name](tmp_path))
    metadata = _packed(model_metadata(checkpoint, Q8_0), tmp_path)
    back = config_json(metadata, "model.gguf", tied=checkpoint.config.tie_word_embeddings)
    again = model_config(back | {"torch_dtype": checkpoint.config.dtype}, "model.gguf")
    assert again == checkpoint.config
    assert back["bos_token_id"] == 0


@pytest.mark.parametrize("published", [0.707, 1.0, 0.1, 1.3])
@settings(max_examples=30, deadline=None)
@given(scale=st.decimals("0.001", "99", places=3), theta=st.integers(2, 10**6), eps=st.sampled_from([1e-5, 1e-6, 3e-7]))
def test_decimals_come_back_exactly(published: float, scale: Any, theta: int, eps: float) -> None:
    """GGUF rounds to float32; what was written with up to six digits is told from its neighbours."""
    pairs = {"expert_weights_scale": float(scale), "rope.freq_base": theta, "attention.layer_norm_rms_epsilon": eps}
    pairs["rope.scaling.yarn_log_multiplier"] = 0.1 * published
    metadata = {
        entry[0]: Value(GGUFValueType[entry[1]], entry[2])
        for entry in KNOWN["dsv2-mini"]
        if entry[1] in GGUFValueType.__members__
    }
    for key, number in pairs.items():
        metadata[f"deepseek2.{key}"] = Value(GGUFValueType.FLOAT32, float(np.float32(number)))
    back = config(config_json(metadata, "model.gguf"))
    assert (back.routed_scaling_factor, back.rope_theta, back.rms_norm_eps) == (float(scale), theta, eps)
    assert back.yarn is not None
    assert back.yarn.mscale == back.yarn.mscale_all_dim == published


REFUSED = {
    "attention biases": tiny.V2 | {"attention_bias": True},
    SEQUENCE_CLASSIFICATION: tiny.V2 | {"architectures": [SEQUENCE_CLASSIFICATION]},
    "no routed": tiny.V2 | {"n_routed_experts": None},
    "no shared": tiny.V2 | {"n_shared_experts": None},
    "1 routed experts": tiny.V2 | {"n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
    "moe_layer_freq is 2": tiny.V2 | {"moe_layer_freq": 2},
    "no q_lora_rank": tiny.LITE,
    "and a q_lora_rank": tiny.V2 | {"num_hidden_layers": 26},
    "513 layers": tiny.V2 | {"num_hidden_layers": 513},
    "norm_topk_prob": tiny.V2 | {"norm_topk_prob": True},
    "topk_group equals n_group": tiny.V2 | {"topk_group": 4},
    "one routed expert per group": tiny.V2
    | {"n_routed_experts": 4, "n_group": 4, "topk_group": 3, "num_experts_per_tok": 2},
    "original_max_position_embeddings is beyond 32 bits": tiny.V2
    | {"rope_scaling": tiny.YARN | {"original_max_position_embeddings": 2**40}},
    "beyond float32's range": tiny.V2 | {"routed_scaling_factor": 1e39},
    "mscale is 1.0": tiny.V2 | {"rope_scaling": tiny.YARN | {"mscale": 1.0}},
    "rope_interleave is false": tiny.V3 | {"rope_interleave": False},
    "has 4 heads of 16": tiny.DEEPSEEK_MOE | {"head_dim": 16},
    "scales RoPE": tiny.DEEPSEEK_MOE | {"rope_scaling": tiny.LLAMA["rope_scaling"]},
    "norm_topk_prob (llama.cpp's deepseek model": tiny.DEEPSEEK_MOE | {"norm_topk_prob": True},
    "2 heads of keys for 4 of queries": tiny.PLAIN_V2 | {"num_key_value_heads": 2},
    "rope_theta is 5000.0": tiny.PLAIN_V2 | {"rope_theta": 5000.0},
    "mscale_all_dim 0.0": tiny.V2 | {"rope_scaling": tiny.YARN | {"mscale": 0.0, "mscale_all_dim": 0.0}},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_would_refuse_or_get_wrong_is_an_error(what: str) -> None:
    with pytest.raises(InputError, match=re.escape(what)):
        check_loadable(config(REFUSED[what]), "model")


LOADABLE = {
    "V2": tiny.V2,
    "V2-Lite": LITE,
    "no YaRN": tiny.V2 | {"rope_scaling": None},
    "a factor of 1 scales nothing": tiny.V2 | {"rope_scaling": tiny.YARN | {"factor": 1, "mscale": 3}},
    "normalised": tiny.V2 | {"norm_topk_prob": True, "routed_scaling_factor": 1.0},
    "tied": tiny.V2 | {"tie_word_embeddings": True},
    **tiny.FAMILY,
    "normalised, and scaled": tiny.V3 | {"routed_scaling_factor": 2.5},
    "biases": tiny.LLAMA | {"attention_bias": True},
    "heads that are not hidden_size together": tiny.LLAMA | {"head_dim": 16},
    "48 layers with that vocabulary": tiny.LITE | {"num_hidden_layers": 48, "vocab_size": 128256},
}


@pytest.mark.parametrize("name", LOADABLE)
def test_what_llama_cpp_runs_is_taken(name: str) -> None:
    check_loadable(config(LOADABLE[name]), "model")


def test_groups_that_llama_cpp_routes_by_as_the_model_does_are_not_dropped() -> None:
    with pytest.raises(InputError, match="leave it out"):
        check_loadable(config(tiny.V3), "model", drop_expert_groups=True)


SAID = {"v3": {"family": "deepseek_v3"}, "glm4": {"family": "deepseek_v3", "architecture": "DeepseekV3ForCausalLM"}}


@pytest.mark.parametrize("said", [True, False], ids=["gating said", "gating not said"])
@pytest.mark.parametrize("name", tiny.FAMILY)
def test_configs_of_the_family_survive_the_round_trip(name: str, said: bool) -> None:
    """But for layers for prediction, and for the names of what has DeepSeek-V3's arithmetic."""
    raw = {key: value for key, value in tiny.FAMILY[name].items() if said or key != "scoring_func"}
    wanted = config(raw)
    keys = model_keys(wanted, raw, drop_expert_groups=False) | {"general.architecture": string(wanted.gguf)}
    found = config(config_json(keys, "model.gguf") | {"torch_dtype": "bfloat16"})
    assert found == replace(wanted, num_nextn_predict_layers=0, **SAID.get(name, {}))


def test_glm_routes_by_sigmoid_where_its_file_does_not_say_so() -> None:
    """As llama.cpp takes it, by its layers and vocabulary."""
    raw = {key: value for key, value in tiny.GLM4.items() if key != "scoring_func"}
    raw |= {"num_hidden_layers": 47, "vocab_size": 154880}
    keys = model_keys(config(raw), raw, drop_expert_groups=False)
    assert "deepseek2.expert_gating_func" not in keys
    keys["general.architecture"] = string("deepseek2")
    assert config(config_json(keys, "model.gguf")).scoring_func == "sigmoid"


def test_groups_that_limit_nothing_may_be_dropped() -> None:
    for name in ("topk_group equals n_group", "one routed expert per group"):
        check_loadable(config(REFUSED[name]), "model", drop_expert_groups=True)


def test_numbers_that_their_types_do_not_hold() -> None:
    for value in (u32(2**32), u32(-1), f32(float("nan")), f32(1e39)):
        with pytest.raises(InputError, match=r"model: tokenizer.ggml.bos_token_id would be .* \(it must fit"):
            check_numbers({"general.name": string("x"), "tokenizer.ggml.bos_token_id": value}, "model")
    check_numbers({"a": u32(2**32 - 1), "b": f32(3e38), "c": array([1, 2])}, "model")


def _v3(folder: Path) -> HfCheckpoint:
    return HfCheckpoint.of_folder(tiny.write_headers(folder / "v3", tiny.V3), "v3")


def test_warnings(tmp_path: Path) -> None:
    assert warnings(open_checkpoint(MODELS["dsv2-mini"](tmp_path))) == []
    folder = v2(tmp_path)
    assert ["--drop-expert-groups" in line for line in warnings(open_checkpoint(folder))] == [True]
    assert ["multi-token prediction" in line for line in warnings(_v3(tmp_path))] == [True]
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template + "{{ ' ' }}")
    assert ["after 'Assistant:'" in line for line in warnings(open_checkpoint(folder))] == [False, True]
    (folder / "chat_template.jinja").write_text("{% if %}")  # broken: no matter of a conversion
    assert len(warnings(open_checkpoint(folder))) == 1


def _card(text: str) -> Any:
    return lambda folder: (folder / "README.md").write_text(text)


def _generation(**values: object) -> Any:
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(values))


DAMAGED = {
    "not a model card": _card("---\nlicense: [mit\n---\n"),
    "general.version would be 2.0": _card("---\nversion: 2.0\n---\n"),
    "general.tags would be": _card("---\ntags: [1, two]\n---\n"),
    "general.languages would be": _card("---\nlanguage: [no]\n---\n"),
    "general.license would be": _card("---\nlicense: {name: mit}\n---\n"),
    "can't be read as a model card": _card("---\nlicense: [1, 2]\n---\n"),
    "general.sampling.temp would be '0.3'": _generation(temperature="0.3"),
    "general.sampling.top_k would be 5.5": _generation(top_k=5.5),
    "general.sampling.top_p would be inf": _generation(top_p=float("inf")),
    "generation_config.json: not valid JSON": lambda folder: (folder / "generation_config.json").write_text("{"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_side_files_are_one_clear_line(tmp_path: Path, what: str) -> None:
    folder = v2(tmp_path)
    DAMAGED[what](folder)
    with pytest.raises(InputError, match=re.escape(what)):
        model_metadata(open_checkpoint(folder), Q8_0)


def test_checkpoint_without_its_files_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(v2(tmp_path))
    checkpoint.folder = None
    with pytest.raises(InputError, match="was not downloaded"):
        model_metadata(checkpoint, Q8_0)
    assert len(warnings(checkpoint)) == 1


def _without(key: str) -> Any:
    return lambda metadata: metadata.pop(key)


def _with(key: str, value: Any) -> Any:
    return lambda metadata: metadata.update({key: Value(GGUFValueType.UINT32, value)})


FOREIGN = {
    "its architecture is 'qwen2'": _with("general.architecture", "qwen2"),
    "its architecture is None": _without("general.architecture"),
    "has no deepseek2.attention.key_length_mla": _without("deepseek2.attention.key_length_mla"),
    "has no deepseek2.rope.scaling.yarn_log_multiplier": _without("deepseek2.rope.scaling.yarn_log_multiplier"),
    "expert_gating_func is 3": _with("deepseek2.expert_gating_func", 3),
    "RoPE is scaled by 'longrope'": _with("deepseek2.rope.scaling.type", "longrope"),
    "key_length_mla is 8": _with("deepseek2.attention.key_length_mla", 8),
    "expert_feed_forward_length is [1, 2]": _with("deepseek2.expert_feed_forward_length", [1, 2]),
    "rope.freq_base is 'x'": _with("deepseek2.rope.freq_base", "x"),
    "expert_weights_scale is inf": _with("deepseek2.expert_weights_scale", float("inf")),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_other_models_files_are_one_clear_line(tmp_path: Path, what: str) -> None:
    metadata = model_metadata(open_checkpoint(v2(tmp_path)), Q8_0)
    FOREIGN[what](metadata)
    with pytest.raises(InputError, match=re.escape(what)):
        config_json(metadata, "model.gguf")
