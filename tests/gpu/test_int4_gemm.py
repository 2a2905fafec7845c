"""The INT4 kernels on a CUDA device, in DeepSeek-V2's shapes, against float64. Skipped without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from int4_cases import error, random_weight

from dsv2quant.kernels.int4_gemm import Config, Share, dequantize, linear
from dsv2quant.kernels.int4_held import Held
from dsv2quant.kernels.int4_layout import Int4Weight
from dsv2quant.kernels.reference import dequantize_int4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = {
    "q_b": (24576, 1536), "kv_b": (32768, 512), "o": (5120, 16384), "kv_a": (576, 5120), "expert": (1408, 2048),
    "expert down": (2048, 1408), "dense": (10944, 2048),
}  # fmt: skip
# A BF16 result alone is off by 2^-8 / √3 of its last bit's place: 1.6e-3; a BF16 weight's rounding adds as much.
EXACT, ROUNDED = 2e-3, 3e-3


def product(x: torch.Tensor, weight: Int4Weight, config: Share | None = None) -> float:
    """The error of `linear` into an output full of NaN."""
    out = torch.full((len(x), weight.rows), torch.nan, dtype=x.dtype, device="cuda")
    linear(x, weight, out, config)
    assert int(weight.arrivals.abs().sum()) == 0
    return error(out, x.double() @ dequantize_int4(weight, torch.float32).double().T)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    rows, columns = SHAPES[name]
    weight = random_weight(rows, columns, 128, device="cuda")
    for tokens in (1, 7, 16, 33, 64, 100, 256, 300):
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        assert product(x, weight) < (EXACT if tokens <= 64 else ROUNDED), tokens


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, 1408])
def test_groups(group: int, zeros: bool) -> None:
    weight = random_weight(576, 1408, group, zeros, ordered=zeros, device="cuda")
    copy = Int4Weight(*weight)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(weight, dtype), dequantize_int4(weight, dtype))
        for tokens in (3, 50, 300):
            x = torch.randn(tokens, 1408, device="cuda").to(dtype)
            assert product(x, copy) < (EXACT if tokens <= 64 else ROUNDED)


@pytest.mark.parametrize(
    "config",
    [
        Config(64, 16, 1, 4, 3), Config(128, 16, 2, 4, 4), Config(128, 32, 8, 8, 3), Config(256, 16, 4, 8, 3),
        Config(64, 64, 3, 4, 2), Config(128, 64, 1, 8, 3), Config(128, 128, 1, 8, 2),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(576, 5120), (10944, 2048), (1408, 2112)])
def test_configurations(config: Config, shape: tuple[int, int]) -> None:
    """Rows and columns that blocks don't fill, tokens in several programs."""
    group = 64 if shape[1] % 128 else 128
    weight = random_weight(*shape, group, device="cuda")
    for tokens in (5, 64, 2 * config.tokens + 5):
        assert product(torch.randn(tokens, shape[1], device="cuda").bfloat16(), weight, config) < EXACT


def test_a_split_sums_in_order() -> None:
    """The same bits each time, whichever program is last."""
    weight = random_weight(2048, 16384, 128, device="cuda")
    x = torch.randn(16, 16384, device="cuda").bfloat16()
    first = linear(x, weight, config=Config(128, 16, 16, 4, 3))
    for _ in range(50):
        assert torch.equal(linear(x, weight, config=Config(128, 16, 16, 4, 3)), first)


@pytest.mark.parametrize(
    ("shape", "group", "zeros", "share"),
    [
        ((2112, 5120), 128, False, Held(8, 5)), ((24576, 1536), 128, False, Held(1, 6)),
        ((32768, 512), 128, False, Held(1, 4)), ((5120, 3072), 64, True, Held(6, 4)),
        ((576, 5120), 32, True, Held(10, 4)), ((2048, 2816), 128, False, Held(5, 5)),
        ((10944, 2048), 128, True, Held(3, 4)), ((1408, 2112), 64, False, Held(4, 3)),
        ((200, 1400), 1400, True, Held(4, 3)), ((72, 64), 32, False, Held(3, 4)),
    ],
    ids=str,
)  # fmt: skip
def test_held(shape: tuple[int, int], group: int, zeros: bool, share: Held) -> None:
    """Parts and passes of unlike size, rows and columns that blocks don't fill, tokens in several programs."""
    weight = random_weight(*shape, group, zeros, device="cuda")
    for tokens in (1, 4, 16, 37):
        # Of few values the root mean square varies: by 1 / √n of itself at most, in one standard deviation.
        limit = EXACT * (1 + 3 / (tokens * shape[0]) ** 0.5)
        assert product(torch.randn(tokens, shape[1], device="cuda").bfloat16(), weight, share) < limit, tokens


def test_more_tokens_than_counters_for_a_split() -> None:
    with pytest.raises(ValueError, match="65 tokens are too many for a split of K"):
        linear(torch.zeros(65, 512, device="cuda").half(), random_weight(64, 512, 128, device="cuda"), None, Held(2, 2))


@pytest.mark.parametrize(
    "shares", [(Held(8, 5),), (Config(64, 16, 8, 4, 4),), (Held(1, 4), Config(64, 16, 1, 4, 4), Held(6, 4))]
)
@pytest.mark.parametrize("tokens", [1, 16])
def test_each_product_of_a_chain_waits_for_the_one_before(shares: tuple[Share, ...], tokens: int) -> None:
    """In a graph each may start while the one before it runs, whose output is its input, and whose counters and
    partial sums it takes over: replayed, it gives what calls one by one give, the same bits."""
    size, layers = 5120, 8
    first = random_weight(size, size, 128, device="cuda")
    low, high = -(2**31), 2**31 - 1
    weights = [
        first._replace(words=torch.randint(low, high, first.words.shape, dtype=torch.int32, device="cuda"))
        for _ in range(layers)
    ]  # of the same scales and counters
    x = torch.empty(tokens, size, device="cuda", dtype=torch.bfloat16)
    outs = [torch.empty_like(x) for _ in range(layers)]

    def chain(between: Callable[[], object]) -> None:
        value = x
        for i, weight in enumerate(weights):
            value = linear(value, weight, outs[i], shares[i % len(shares)])
            between()

    def renewed() -> None:
        x.normal_()
        for out in outs:
            out.fill_(torch.nan)
        torch.cuda.synchronize()

    renewed()
    chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(lambda: None)
    for replays in (1, 2) * 10:
        renewed()
        for _ in range(replays):
            graph.replay()
        found = torch.stack(outs)
        chain(torch.cuda.synchronize)
        assert bool(found.isfinite().all())
        assert torch.equal(found, torch.stack(outs))
    assert int(first.arrivals.abs().sum()) == 0
