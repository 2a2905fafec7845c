"""`quantization_config` of INT4 artifacts in compressed-tensors' layout, as compressed-tensors matches it."""

from __future__ import annotations

import pytest
import tiny
import torch

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan


def planned(name: str, group_size: int | None = None):
    """(plan of dsv2-mini, its quantization_config)."""
    asked = recipe.builtin(name, method="rtn", group_size=group_size)
    made = make_plan(open_checkpoint(tiny.MINI), asked, for_targets=("vllm", "transformers"))
    return made, made.config["quantization_config"]


@pytest.mark.parametrize(
    ("group_size", "declared"),
    [
        (64, {"strategy": "group", "group_size": 64}),
        (32, {"strategy": "group", "group_size": 32}),
        (0, {"strategy": "channel"}),
    ],
)
def test_config_of_int4_alone(group_size, declared):
    made, config = planned("int4-pure", group_size)
    assert len(made.schemes) == 1
    assert config == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", **declared, "symmetric": True, "dynamic": False},
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": config["ignore"],
    }
    assert set(config["ignore"]) == {
        "lm_head",
        *(f"model.layers.{i}.self_attn.kv_b_proj" for i in range(4)),
        *(f"model.layers.{i}.mlp.gate" for i in range(1, 4)),
    }


def test_config_of_mixed_schemes_names_each_groups_format():
    _, config = planned("int4-mixed")
    # SGLang takes only this word for experts in INT4; each group's own format overrides it everywhere else.
    assert config["format"] == "pack-quantized"
    experts, rest = config["config_groups"].values()
    assert (experts["format"], experts["input_activations"]) == ("pack-quantized", None)
    assert (rest["format"], rest["input_activations"]["strategy"]) == ("float-quantized", "token")
    # transformers finds the experts' group by the word, and the other one by its absence.
    assert all("experts" in target for target in experts["targets"])
    assert not any("experts" in target for target in rest["targets"])
    assert {f"model.layers.{i}.self_attn.kv_b_proj" for i in range(4)} <= set(config["ignore"])


@pytest.mark.parametrize(
    ("name", "group_size"), [("int4-pure", 64), ("int4-pure", 128), ("int4-experts", 64), ("int4-mixed", 128)]
)
def test_compressed_tensors_finds_every_modules_scheme(name, group_size):
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    made, raw = planned(name, group_size)
    config = QuantizationConfig.model_validate(raw)
    linear = torch.nn.Linear(1, 1)
    for line in made.entries:
        if len(line.spec.shape) != 2 or line.spec.role == "embed":
            continue
        groups = [
            g for g in config.config_groups.values() if is_match(line.spec.module, linear, g.targets, config.ignore)
        ]
        found = [(g.weights.num_bits, g.weights.strategy, g.weights.group_size) for g in groups]
        size = line.scheme.removeprefix("int4-g")
        want = {"bf16": [], "fp8-channel": [(8, "channel", None)]}.get(line.scheme)
        assert found == ([(4, "group", int(size))] if want is None else want), line.spec.module
