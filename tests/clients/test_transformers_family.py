"""The other families against transformers' own classes: logits of prefill and decoding, and every artifact's weights.

Where transformers has no class the reference is the published code in float64 (plain_moe_reference.py).
"""

from __future__ import annotations

import pytest
import static
import tiny
import torch
from plain_moe_reference import logits as plain_moe_logits
from test_runtime import TOLERANCE, relative_error
from test_transformers import load, their_weight

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.formats.schemes import UNQUANTIZED
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan

MODELS = {
    "llama": tiny.LLAMA,
    "as many heads of keys": tiny.LLAMA | {"num_key_value_heads": 4},
    "no RoPE scaling": tiny.LLAMA | {"rope_scaling": None, "rope_theta": 500.0},
    "biases": tiny.LLAMA | {"attention_bias": True},
    "tied": tiny.LLAMA | {"tie_word_embeddings": True},
    "wide heads": tiny.LLAMA | {"head_dim": 32},
    "v3": tiny.V3,
    "no groups": tiny.V3 | {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "rope_scaling": None},
    "one expert a token": tiny.V3 | {"num_experts_per_tok": 1},
    "not normalised": tiny.V3 | {"norm_topk_prob": False},
    "glm": tiny.GLM4,
}
OWN = {
    "deepseek-moe": tiny.DEEPSEEK_MOE,
    "normalised": tiny.DEEPSEEK_MOE | {"norm_topk_prob": True},
    "fewer heads of keys": tiny.DEEPSEEK_MOE | {"num_key_value_heads": 2},
    "no latents": tiny.PLAIN_V2,
}


@pytest.fixture(scope="module", params=[*MODELS, *OWN], ids=lambda name: name.replace(" ", "-"))
def expected(request, tmp_path_factory):
    """(checkpoint, tokens, the logits of these)."""
    raw = MODELS.get(request.param) or OWN[request.param]
    weights = tiny.random_weights(raw, dtype=torch.float32)
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "m", raw, weights)
    tokens = torch.randint(0, raw["vocab_size"], (3, 40), generator=torch.Generator().manual_seed(1))
    if request.param in OWN:
        want = plain_moe_logits(raw, weights, tokens)
    else:
        from transformers import AutoModelForCausalLM

        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert type(theirs).__name__ == raw["architectures"][0]
        with torch.inference_mode():
            want = theirs(tokens).logits
    return open_checkpoint(folder), tokens, want


def test_prefill(expected):
    checkpoint, tokens, want = expected
    assert relative_error(Model(checkpoint).forward(tokens), want) < TOLERANCE


def test_decoding_token_by_token(expected):
    checkpoint, tokens, want = expected
    model = Model(checkpoint)
    caches = model.caches(3, 40)
    parts = [model.forward(tokens[:, :10], caches)]
    parts += [model.forward(tokens[:, i : i + 1], caches, absorbed=True) for i in range(10, 40)]
    assert relative_error(torch.cat(parts, 1), want) < TOLERANCE


# Columns for whole groups and blocks of 128: with several groups `dequantize=True` takes the first for all linears.
WIDE = {
    "llama": tiny.LLAMA | {"hidden_size": 256, "intermediate_size": 384},
    "v3": tiny.V3 | {
        "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128,
        "kv_lora_rank": 128, "v_head_dim": 32,
    },
}  # fmt: skip
SCHEMES = ("fp8-block", "fp8-channel", "fp8-tensor", "fp8-static", "int4-pure", "int8", "w4a8")


@pytest.fixture(scope="module", params=WIDE)
def wide(request, tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("wide") / request.param, WIDE[request.param])


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_our_decode(name, wide, tmp_path):
    out = tmp_path / "out"
    if name == "fp8-static":
        static.write(wide, out, name, for_targets=("transformers",))
    else:
        method = "rtn" if name in ("int4-pure", "w4a8") else None
        plan = make_plan(open_checkpoint(wide), recipe.builtin(name, method=method), for_targets=("transformers",))
        convert(plan, out, command="")
    checkpoint = open_checkpoint(out)
    theirs = load(out, torch.float32, name != "fp8-block")
    with torch.inference_mode():
        assert theirs(torch.arange(8)[None]).logits.isfinite().all()
    state = theirs.state_dict()  # after the first forward pass, which is when compressed-tensors decompresses
    quantized = 0
    for weight in checkpoint.weights:
        if weight.spec.is_prediction:  # transformers leaves such layers out
            continue
        # INT4 and INT8 are multiplied in the scales' dtype, BF16.
        integers = weight.scheme.startswith("int")
        ours = checkpoint.decode(weight, torch.bfloat16 if integers or weight.scheme == "w4a8-g128" else torch.float32)
        got = their_weight(state, weight.spec.name)
        assert torch.equal(got, ours.to(got.dtype)), weight.spec.name
        quantized += weight.scheme not in UNQUANTIZED
    assert quantized > 10


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_dense_models_load_gptqs_and_awqs_layouts(layout, tmp_path):
    """gptqmodel 7.7 and optimum 2.3, which transformers needs for them, are no part of the test extra."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    from transformers import AutoModelForCausalLM

    source = tiny.write_checkpoint(tmp_path / "source", WIDE["llama"])
    asked = recipe.builtin("int4-pure", method="rtn", group_size=64, layout=layout)
    convert(make_plan(open_checkpoint(source), asked), tmp_path / "out", command="")
    dtype = torch.float16 if layout == "awq" else torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, device_map="cpu").eval()
    checkpoint = open_checkpoint(tmp_path / "out")
    if layout == "gptq":
        modules = dict(theirs.named_modules())
        for weight in (weight for weight in checkpoint.weights if weight.scheme == "gptq-g64"):
            got = modules[weight.spec.module].dequantize_weight().T
            assert torch.equal(got.float(), checkpoint.decode(weight, torch.float32)), weight.spec.name
    tokens = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        want = theirs(tokens).logits
    # Activations of 8 or 11 bits in three layers
    assert relative_error(Model(checkpoint, LoadOptions(weight_only=True)).forward(tokens), want) < 0.02
