"""GGUF weights on a CUDA device: their values, and products with them against float64. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from gguf_weights import error, random_blocks, random_choices, random_weight

from dsv2quant.kernels.gguf_experts import experts_product
from dsv2quant.kernels.gguf_gemm import Config, choose, dequantize, linear
from dsv2quant.kernels.gguf_layout import SPECS, GgufWeight, blocks_of, from_blocks
from dsv2quant.kernels.reference import dequantize_gguf, sort_pairs
from dsv2quant.kernels.reference import experts_product as experts_twin
from dsv2quant.kernels.routing import choose_block
from dsv2quant.kernels.routing import sort_pairs as sort_on_device

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = {"q_b": (24576, 1536), "kv_a": (576, 5120), "down": (5120, 12288), "lite_o": (2048, 2048)}
# A BF16 result is off by 2^-9 at most, 1.95e-3, and by 1.6e-3 where many have a share; a BF16 weight's rounding adds as
# much. MMA units truncate the sums they add to: 2^-22 of products of codes with 128 added, which are 30 times the
# result, and 600 times one of the twentieth part, which may be most of a single token's 200.
EXACT, ROUNDED = 2.1e-3, 3e-3
SUMS = 1e-5
FLOAT = 2e-5  # of float32 results: sums of 128 + code, of which most is taken away again


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def columns_of(name: str, blocks: int = 3) -> int:
    """So many blocks of 256, of types with blocks of 32 a number that does not fill 128."""
    return 256 * blocks - (96 if SPECS[name].values == 32 else 0)


def product(x: torch.Tensor, weight: GgufWeight, config: Config | None = None) -> float:
    """The error of `linear` into an output full of NaN."""
    out = torch.full((len(x), weight.rows), torch.nan, dtype=x.dtype, device="cuda")
    linear(x, weight, out, config)
    assert int(weight.arrivals.abs().sum()) == 0
    return error(out, x.double() @ dequantize_gguf(weight).double().T)


@pytest.mark.parametrize("name", SPECS)
def test_values_and_bytes(name: str) -> None:
    """`dequantize` is the reference, bit for bit, which tests/test_gguf_kernels.py compares with ggml's decoding."""
    for shape in ((200, columns_of(name)), (3, 72, columns_of(name))):
        blocks = random_blocks(name, shape, "cuda")
        weight = from_blocks(name, blocks, shape[-1])
        assert torch.equal(blocks_of(weight), blocks)
        expected = dequantize_gguf(weight)
        assert torch.equal(dequantize(weight, torch.float32).view(torch.int32), expected.view(torch.int32))
        assert torch.equal(dequantize(weight), expected.bfloat16())


@pytest.mark.parametrize("name", SPECS)
def test_every_type(name: str) -> None:
    weight = random_weight(name, (200, columns_of(name)), "cuda")
    for tokens in (1, 16, 64, 300):
        x = torch.randn(tokens, weight.columns, device="cuda").bfloat16()
        assert product(x, weight) < (EXACT if choose(tokens, 200, weight.columns, SPECS[name].group) else ROUNDED), (
            tokens
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K"])
def test_shapes(name: str, shape: str) -> None:
    weight = random_weight(name, SHAPES[shape], "cuda")
    for tokens in (1, 7, 16, 32, 64, 100, 128, 129):
        x = torch.randn(tokens, weight.columns, device="cuda").bfloat16()
        assert product(x, weight) < (EXACT if tokens <= 128 else ROUNDED), tokens


@pytest.mark.parametrize(
    "config",
    [
        Config(64, 16, 1, 4, 3),
        Config(128, 8, 2, 4, 3),
        Config(128, 16, 2, 4, 4),
        Config(64, 32, 3, 4, 2),
        Config(128, 64, 1, 8, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["Q5_0", "Q4_K", "Q6_K"])
def test_configurations(name: str, config: Config) -> None:
    weight = random_weight(name, (1360, columns_of(name, 7)), "cuda")
    for tokens in (5, 64, 2 * config.tokens + 5):
        x = torch.randn(tokens, weight.columns, device="cuda").bfloat16()
        assert product(x, weight, config) < EXACT


def test_a_split_sums_in_order_also_in_a_graph() -> None:
    """The same bits each time, whichever program is last."""
    weight = random_weight("Q4_K", (2048, 12288), "cuda")
    x = torch.randn(16, 12288, device="cuda").bfloat16()
    first = linear(x, weight, config=Config(64, 16, 8, 4, 4))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear(x, weight, config=Config(64, 16, 8, 4, 4))
    for _ in range(50):
        graph.replay()
        assert torch.equal(captured, first)


@pytest.mark.parametrize("tokens", [1, 8, 64, 300, 1000])
@pytest.mark.parametrize(("name", "shape"), [("Q4_K", (1408, 2048)), ("Q8_0", (2048, 1408)), ("Q6_K", (200, 768))])
def test_experts(name: str, shape: tuple[int, int], tokens: int) -> None:
    """One row of x for all of a token's experts and BF16 out; one for each, weighted, and float32 out."""
    stack = random_weight(name, (16, *shape), "cuda")
    chosen = random_choices(tokens, 6, 16, "cuda")
    block = choose_block(tokens, 6, 16)
    routes = sort_pairs(chosen, 16, block)
    x = torch.randn(tokens, shape[1], device="cuda").bfloat16()
    torch.empty(tokens * 6, shape[0], device="cuda").fill_(torch.nan)  # what the result's memory is likely to hold
    assert error(experts_product(x, routes, 6, stack), experts_twin(x.double(), routes, 6, stack)) < EXACT
    x = torch.randn(tokens * 6, shape[1], device="cuda").bfloat16()
    weights = torch.rand(tokens, 6, device="cuda")
    got = experts_product(x, routes, 1, stack, weights)
    assert got.dtype == torch.float32
    assert error(got, experts_twin(x, routes, 1, stack, weights)) < SUMS
    assert int(stack.arrivals.abs().sum()) == 0


def test_experts_in_a_graph() -> None:
    """Routes that change between replays, as a captured step has them."""
    stack = random_weight("Q4_K", (16, 1408, 2048), "cuda")
    x, chosen = torch.randn(8, 2048, device="cuda").bfloat16(), random_choices(8, 6, 16, "cuda")
    experts_product(x, sort_on_device(chosen, 16, 16), 6, stack)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = experts_product(x, sort_on_device(chosen, 16, 16), 6, stack)
    for shift in (0, 3):
        chosen.copy_((random_choices(8, 6, 16, "cuda") + shift) % 16)
        got.fill_(torch.nan)
        graph.replay()
        assert error(got, experts_twin(x.double(), sort_pairs(chosen, 16, 16), 6, stack)) < EXACT
