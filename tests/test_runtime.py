"""The runtime against transformers' DeepSeek-V2, and its router against a float64 implementation."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.deepseek_v2 import SEQUENCE_CLASSIFICATION
from dsv2quant.arch.families import model_config
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.model.layers import route
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model

SHARPER = {"mscale": 1.0, "mscale_all_dim": 0.5}  # cos and sin are scaled too when the two differ
MODELS = {
    "lite": tiny.LITE,
    "lite without YaRN": tiny.LITE | {"rope_scaling": None},
    "v2": tiny.V2,
    "v2 without YaRN": tiny.V2 | {"rope_scaling": None, "rope_theta": 500.0},
    "v2 with biases": tiny.V2 | {"attention_bias": True},
    "unequal mscales": tiny.V2 | {"rope_scaling": tiny.YARN | SHARPER},
    "one expert a token": tiny.LITE | {"num_experts_per_tok": 1, "first_k_dense_replace": 0},
    "tied embeddings": tiny.LITE | {"tie_word_embeddings": True},
}
# float32 sums of up to 96 products of order 1 and of 16 layers' worth of roundings: 2^-24 · √(96 · 16) ≈ 2.3e-6.
TOLERANCE = 1e-5


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(" ", "-"))
def pair(request, tmp_path_factory):
    """(checkpoint, transformers' model, tokens)."""
    from transformers import DeepseekV2ForCausalLM

    raw = MODELS[request.param]
    folder = tiny.write_checkpoint(
        tmp_path_factory.mktemp("model") / "m", raw, tiny.random_weights(raw, dtype=torch.float32)
    )
    theirs = DeepseekV2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(0, raw["vocab_size"], (3, 50), generator=torch.Generator().manual_seed(1))
    return open_checkpoint(folder), theirs, tokens


@pytest.fixture(scope="module")
def expected(pair):
    _, theirs, tokens = pair
    with torch.inference_mode():
        return theirs(tokens).logits


def test_prefill(pair, expected):
    checkpoint, _, tokens = pair
    logits = Model(checkpoint).forward(tokens)
    assert logits.shape == expected.shape
    assert relative_error(logits, expected) < TOLERANCE


def test_prefill_in_parts_continues_the_cache(pair, expected):
    checkpoint, _, tokens = pair
    model = Model(checkpoint)
    caches = model.caches(3, 50)
    parts = [model.forward(part, caches) for part in tokens.split([20, 1, 29], 1)]
    assert relative_error(torch.cat(parts, 1), expected) < TOLERANCE


def test_decode_token_by_token_absorbed(pair, expected):
    checkpoint, _, tokens = pair
    model = Model(checkpoint)
    caches = model.caches(3, 50)
    parts = [model.forward(tokens[:, :10], caches)]
    parts += [model.forward(tokens[:, i : i + 1], caches, absorbed=True) for i in range(10, 50)]
    assert relative_error(torch.cat(parts, 1), expected) < TOLERANCE


def test_absorbed_prefill(pair, expected):
    checkpoint, _, tokens = pair
    assert relative_error(Model(checkpoint).forward(tokens, absorbed=True), expected) < TOLERANCE


def test_streamed_equals_resident(pair):
    checkpoint, _, tokens = pair
    assert torch.equal(Model(checkpoint, stream=True).forward(tokens), Model(checkpoint).forward(tokens))


def test_bfloat16_is_as_close_as_transformers_in_bfloat16(pair, expected):
    checkpoint, theirs, tokens = pair
    ours = relative_error(Model(checkpoint, LoadOptions(torch.bfloat16)).forward(tokens), expected)
    with torch.inference_mode():
        rounded = relative_error(theirs.to(torch.bfloat16)(tokens).logits, expected)
    theirs.to(torch.float32)
    # Both round every intermediate to 8 bits; a router near a tie may turn either way.
    assert ours < 2 * rounded


def test_a_full_cache_says_so(lite):
    model = Model(open_checkpoint(lite))
    with pytest.raises(ValueError, match="the cache holds 4 tokens, 5 were asked for"):
        model.forward(torch.zeros(1, 5, dtype=torch.long), model.caches(1, 4))


def test_a_classifiers_scores(tmp_path):
    from transformers import DeepseekV2ForSequenceClassification

    raw = tiny.LITE | {"architectures": [SEQUENCE_CLASSIFICATION], "pad_token_id": 2}
    folder = tiny.write_checkpoint(tmp_path / "m", raw, tiny.random_weights(raw, dtype=torch.float32))
    theirs = DeepseekV2ForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(3, 160, (2, 20))
    with torch.inference_mode():
        want = theirs(tokens).logits  # the score of the last token
    assert relative_error(Model(open_checkpoint(folder)).forward(tokens)[:, -1], want) < TOLERANCE


# transformers' router never reads norm_topk_prob, so the router has an oracle of its own.


def routed_in_float64(x: np.ndarray, router: np.ndarray, c: ModelConfig) -> np.ndarray:
    """DeepSeek-V2's `MoEGate`, one token at a time, as a dense [tokens, experts] matrix of weights."""
    dense = np.zeros((len(x), len(router)))
    for token, row in enumerate(x.astype(np.float64) @ router.astype(np.float64).T):
        scores = np.exp(row - row.max())
        scores /= scores.sum()
        allowed = scores.copy()
        size = len(router) // c.n_group
        best = sorted(range(c.n_group), key=lambda g: -scores[g * size : (g + 1) * size].max())[: c.topk_group]
        for expert in range(len(router)):
            if expert // size not in best:
                allowed[expert] = 0
        chosen = np.argsort(-allowed)[: c.num_experts_per_tok]
        weights = scores[chosen]
        if c.norm_topk_prob and c.num_experts_per_tok > 1:
            weights = weights / (weights.sum() + 1e-20)
        else:
            weights = weights * c.routed_scaling_factor
        dense[token, chosen] = weights
    return dense


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("per_token", [1, 3, 6])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (8, 3)])
def test_routing_equals_float64(normalised, per_token, groups):
    method = "group_limited_greedy" if groups[0] > 1 else "greedy"
    config = model_config(
        tiny.V2
        | {
            "n_routed_experts": 32,
            "topk_method": method,
            "n_group": groups[0],
            "topk_group": groups[1],
            "num_experts_per_tok": per_token,
            "norm_topk_prob": normalised,
        },
        "config.json",
    )
    generator = torch.Generator().manual_seed(per_token)
    x, router = torch.randn(200, 64, generator=generator), torch.randn(32, 64, generator=generator)
    weights, experts = route(x, router, architecture(config).router, None)
    dense = torch.zeros(200, 32).scatter_(1, experts, weights)
    want = routed_in_float64(x.numpy(), router.numpy(), config)
    np.testing.assert_array_equal(dense.numpy() > 0, want > 0)
    # softmax of logits of order √64 from float32 dot products of 64 terms: relative error ~ 64 · 2^-24 · 8
    np.testing.assert_allclose(dense.numpy(), want, rtol=3e-5)
