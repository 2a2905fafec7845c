"""The INT4 experts' kernels on a CUDA device, in DeepSeek-V2's shapes, against float64. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from int4_cases import error
from int4_experts_cases import random_choice, random_experts

from dsv2quant.kernels.int4_experts import Config, down, gate_up
from dsv2quant.kernels.int4_layout import Int4Experts
from dsv2quant.kernels.reference import down_int4, gate_up_int4, sort_pairs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODELS = {"V2-Lite": (64, 2048, 1408, 6), "V2": (20, 5120, 1536, 6), "mini": (16, 256, 128, 4)}  # experts, …, k
# A BF16 result alone is off by 2^-8 / √3 of its last bit's place: 1.6e-3. Float32 sums of exact products: 2^-24 · √K.
ROUNDED, EXACT = 2e-3, 1e-5


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[Int4Experts, int]:
    *shape, k = MODELS[request.param]
    return random_experts(*shape, 128, device="cuda"), k


def check(
    stack: Int4Experts,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    block: int,
    config: Config | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Both kernels for tokens of size 1, each given what the other was, into memory that was full of NaN."""
    tokens, k = chosen.shape
    routes = sort_pairs(chosen, len(stack.down.words), block)
    x = torch.randn(tokens, stack.gate_up.columns, device="cuda").to(dtype)
    for size in (tokens * k * stack.gate_up.rows, 2 * tokens * k * stack.down.rows):
        torch.full((size,), torch.nan, dtype=dtype, device="cuda")
    h = gate_up(x, routes, k, stack, config and config._replace(split=1))
    assert error(h, gate_up_int4(x, routes, k, stack)) < ROUNDED
    outputs = down(h, weights, routes, stack, config)
    sums = outputs.unflatten(1, (k, -1)).sum(2)
    assert error(sums, down_int4(h, weights, routes, stack)) < EXACT


@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 64, 300])
def test_models(model: tuple[Int4Experts, int], tokens: int) -> None:
    stack, k = model
    weights, chosen = random_choice(tokens, len(stack.down.words), k, "cuda")
    check(stack, weights, chosen, 16 if tokens <= 64 else 64)


@pytest.mark.parametrize("block", [16, 64])
def test_all_tokens_to_the_same_experts(model: tuple[Int4Experts, int], block: int) -> None:
    stack, k = model
    weights, chosen = random_choice(70, k, k, "cuda")
    check(stack, weights, chosen, block)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_groups(group: int | None, zeros: bool) -> None:
    """Rows that blocks of 64 don't fill, and whole rows that blocks of columns don't."""
    for dtype in (torch.bfloat16, torch.float16):
        stack = random_experts(5, 640 if group else 616, 384 if group else 328, group, zeros, dtype, "cuda")
        for block, tokens in ((16, 9), (64, 90)):
            check(stack, *random_choice(tokens, 5, 2, "cuda"), block, dtype=dtype)


@pytest.mark.parametrize(
    "config",
    [
        Config(64, 1, 4, 3), Config(64, 4, 4, 4), Config(64, 8, 4, 6), Config(64, 1, 8, 4), Config(128, 2, 4, 4),
        Config(128, 1, 4, 4), Config(128, 1, 8, 4), Config(64, 1, 4, 1, 4), Config(64, 2, 4, 1, 6),
        Config(64, 3, 4, 1, 8), Config(128, 1, 8, 1, 3),
    ],
    ids=str,
)  # fmt: skip
def test_configurations(config: Config) -> None:
    stack = random_experts(12, 2048, 1408, 128, device="cuda")
    for block, tokens in ((16, 2), (16, 50), (64, 50)):
        check(stack, *random_choice(tokens, 12, 6, "cuda"), block, config)


def test_in_a_graph_the_routes_may_change() -> None:
    stack = random_experts(16, 256, 128, 128, device="cuda")
    x = torch.randn(4, 256, device="cuda").bfloat16()
    weights, chosen = random_choice(4, 16, 4, "cuda")
    routes = sort_pairs(chosen, 16, 16)
    down(gate_up(x, routes, 4, stack), weights, routes, stack)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = down(gate_up(x, routes, 4, stack), weights, routes, stack)
    for _ in range(3):
        _, chosen = random_choice(4, 16, 4, "cuda")
        for at, value in zip(routes[:4], sort_pairs(chosen, 16, 16)[:4], strict=True):
            at.copy_(value)
        outputs.fill_(torch.nan)
        graph.replay()
        assert torch.equal(outputs, down(gate_up(x, routes, 4, stack), weights, routes, stack))
