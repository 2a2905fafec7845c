"""Random models: what is stored is what the codecs make of the same weights, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.bench.model import MODELS, RandomWeights, configuration, matrices
from dsv2quant.formats.int4 import FewBits, Int4
from dsv2quant.formats.int8 import Int8
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning import recipe

GROUPED = model_config(tiny.GROUPED_V2 | {"attention_bias": True}, "config.json")
BITS = {"BF16": np.uint16, "F8_E4M3": np.uint8, "I8": np.int8, "I32": np.int32, "F32": np.float32, "I64": np.int64}


def bits(parts: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    views = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}
    return {suffix: part.view(views.get(part.dtype, part.dtype)).numpy() for suffix, part in parts.items()}


def same(parts: dict[str, torch.Tensor], expected: dict[str, np.ndarray]) -> None:
    found = bits(parts)
    assert found.keys() == expected.keys()
    for suffix, part in found.items():
        assert part.dtype == expected[suffix].dtype, suffix
        np.testing.assert_array_equal(part, expected[suffix], suffix)


@pytest.mark.parametrize("name", ["fp8-block", "fp8-channel", "int4-mixed", "int4-pure", "int8", "w4a8"])
def test_parts_are_those_of_the_codecs(name):
    chosen = recipe.builtin(name, group_size=32 if name.startswith("int4") else None)
    source, plain = RandomWeights(GROUPED, chosen, "cpu"), RandomWeights(GROUPED, None, "cpu")
    met = set()
    for spec in architecture(GROUPED).specs():
        if spec.layer not in (0, 1) or (spec.expert or 0) > 1 or len(spec.shape) < 2:
            continue
        scheme, parts = source.stored(spec.module)
        assert scheme == source.scheme(spec.module)
        (given,) = bits(plain.stored(spec.module)[1]).values()
        codec = CODECS[scheme]
        same(parts, codec.encode([given])[0])
        assert {suffix: part.shape for suffix, part in parts.items()} == {
            p.suffix: p.shape for p in codec.layout(spec.shape)
        }
        assert source.activation(scheme) == codec.activation
        met.add(scheme)
    assert met == chosen.schemes


INTEGERS = [Int4(32), Int4(64), Int4(128), Int4(None), FewBits(3, 32), FewBits(3, 128), FewBits(2, 64), Int8()]


@pytest.mark.parametrize("codec", INTEGERS, ids=lambda codec: codec.name)
def test_integers_of_awkward_weights(codec):
    """Zeros, ties, outliers, subnormals, and rows far apart in size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 256, generator=generator) * torch.exp2(torch.arange(24) - 12.0)[:, None]
    x[0] = 0
    x[1, 128:] = 0
    x[2] = torch.arange(-128, 128) / 2 * 0.5
    x[3] *= 1e-36
    x[:, 7] *= 20
    x = x.bfloat16().float()
    same(codec.encode_tensor(x), codec.encode([x.numpy()])[0])


def test_a_name_has_its_weight_whatever_was_made_before():
    config = configuration("v2-lite")
    name, other = "model.layers.1.mlp.experts.3.down_proj", "model.layers.1.mlp.experts.4.down_proj"
    one, two = RandomWeights(config, None, "cpu"), RandomWeights(config, None, "cpu")
    two.stored(other)
    first = one.stored(name)[1]["weight"]
    assert torch.equal(first, two.stored(name)[1]["weight"])
    assert not torch.equal(first, one.stored(other)[1]["weight"])
    assert not torch.equal(first, RandomWeights(config, None, "cpu", seed=1).stored(name)[1]["weight"])
    assert math.isclose(first.float().std(), 1408**-0.5, rel_tol=0.01)


def test_plain_tensors():
    source = RandomWeights(GROUPED, recipe.builtin("fp8-block"), "cpu")
    assert source.plain("model.norm.weight", torch.float32).tolist() == [1.0] * 128
    assert not source.plain("model.layers.0.self_attn.q_a_proj.bias").any()
    router = source.plain("model.layers.1.mlp.gate.weight", torch.float32)
    assert router.shape == (16, 128)
    assert router.dtype == torch.float32
    assert source.plain("model.layers.1.self_attn.o_proj.biases") is None
    assert source.plain("score.weight") is None
    assert source.kv_scale(0) is None


def test_schemes_that_need_more_than_a_weight_are_refused():
    with pytest.raises(ValueError, match="fp8-tensor"):
        RandomWeights(GROUPED, recipe.builtin("fp8-tensor"), "cpu").stored("model.layers.0.self_attn.o_proj")


def test_activations_keep_their_size():
    source = RandomWeights(model_config(tiny.LITE, "config.json"), None, "cpu")
    embedded = source.plain("model.embed_tokens.weight", torch.float32)
    x = embedded / embedded.pow(2).mean(-1, keepdim=True).sqrt()
    for module in ("gate_proj", "up_proj"):
        weight = source.stored(f"model.layers.0.mlp.{module}")[1]["weight"].float()
        assert 0.8 < (x @ weight.T).std() < 1.2


@pytest.mark.parametrize("model", MODELS)
def test_published_configurations_give_the_known_number_of_parameters(model):
    """235.7 and 15.7 billion (arXiv:2405.04434, table 9 and appendix B)."""
    total = sum(spec.size for spec in architecture(configuration(model)).specs())
    assert round(total / 1e9, 1) == {"v2": 235.7, "v2-lite": 15.7}[model]


def test_matrices_that_share_an_input_are_one():
    assert matrices(configuration("v2")) == {
        "q_a + kv_a": (2112, 5120), "q_b": (24576, 1536), "kv_b": (32768, 512), "o": (5120, 16384),
        "shared gate + up": (6144, 5120), "shared down": (5120, 3072),
        "dense gate + up": (24576, 5120), "dense down": (5120, 12288),
    }  # fmt: skip
    assert matrices(configuration("v2-lite"), unit=128) == {
        "q + kv_a": (3712, 2048), "kv_b": (4096, 512), "o": (2048, 2048),
        "shared gate + up": (5632, 2048), "shared down": (2048, 2816),
        "dense gate + up": (22016, 2048), "dense down": (2048, 10944),
    }  # fmt: skip
