"""The other families against transformers' own classes: logits of prefill and decoding, and every artifact's weights.

Where transformers has no class the reference is the published code in float64 (plain_moe_reference.py).
"""

from __future__ import annotations

import pytest
import tiny
import torch
from plain_moe_reference import logits as plain_moe_logits
from test_runtime import TOLERANCE, relative_error

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.model.runtime import Model

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
