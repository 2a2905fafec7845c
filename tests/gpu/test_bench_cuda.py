"""What `dsv2quant bench` does on a CUDA device. Skipped without a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

from dsv2quant.bench.kernels import OPERATIONS, decide, time_all
from dsv2quant.bench.model import RandomWeights, configuration
from dsv2quant.formats.schemes import CODECS
from dsv2quant.kernels.int4_gemm import linear
from dsv2quant.kernels.int4_layout import from_compressed_tensors
from dsv2quant.kernels.reference import dequantize_int4
from dsv2quant.planning import recipe

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)

MODULES = {
    "int4-g128": "model.layers.1.mlp.experts.3.down_proj",
    "fp8-channel": "model.layers.0.self_attn.q_proj",
    "fp8-block": "model.layers.0.self_attn.kv_a_proj_with_mqa",
}


@pytest.mark.parametrize("scheme", MODULES)
def test_random_weights_are_the_codecs(scheme: str) -> None:
    """Division on the device rounds as on the CPU."""
    config, module = configuration("v2-lite"), MODULES[scheme]
    chosen = recipe.builtin("fp8-block" if scheme == "fp8-block" else "int4-mixed")
    found, parts = RandomWeights(config, chosen).stored(module)
    assert found == scheme
    weight = RandomWeights(config, None).stored(module)[1]["weight"].cpu()
    (expected,) = CODECS[scheme].encode([weight.view(torch.uint16).numpy()])
    assert parts.keys() == expected.keys()
    for suffix, part in parts.items():
        want = torch.from_numpy(expected[suffix])
        assert torch.equal(part.cpu().view(want.dtype), want), suffix


def test_a_random_expert_is_multiplied_by() -> None:
    module = MODULES["int4-g128"]
    _, parts = RandomWeights(configuration("v2-lite"), recipe.builtin("int4-mixed")).stored(module)
    weight = from_compressed_tensors(parts)
    x = torch.randn(3, weight.columns, device="cuda").bfloat16()
    expected = x.double() @ dequantize_int4(weight, torch.float32).double().T
    assert (linear(x, weight).double() - expected).norm() / expected.norm() < 2e-3


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_shape_is_tuned(name: str) -> None:
    """Every candidate gives the same product, or it would have no time."""
    operation = OPERATIONS[name]
    rows, columns, tokens = 1024, 2048, 4
    weights, x = operation.random_weights(rows, columns, 2), operation.random_tokens(tokens, columns)
    ruled = operation.rule(tokens, rows, columns)
    shares = [ruled, *operation.candidates(tokens, rows, columns)]
    times = time_all({share: operation.calls(weights, x, share) for share in shares})
    assert 0.5 < min(times.values()) <= times[ruled] < 200
    assert decide(times, ruled) in times
