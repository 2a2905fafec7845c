"""Activations as they are served: rounded without codes, and once for all linear layers that quantize them alike."""

from __future__ import annotations

import pytest
import torch

from dsv2quant.arch.spec import Router
from dsv2quant.kernels import reference
from dsv2quant.kernels.reference import dequantize_activation, quantize_activation, round_e4m3, served_activation
from dsv2quant.model.layers import FFN, Linear, MoE, finish

GRANULARITIES = ("token", "group128", "static", "token-int8", "sequence", "q8_0")
SCALE = torch.tensor([0.01])


def test_e4m3_is_rounded_to_as_a_cast_rounds():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = codes[codes.isfinite()].unique()
    between = (values[1:] + values[:-1]) / 2  # ties, and what lies on either side of them
    near = [torch.nextafter(between, between + step) for step in (-1, 0, 1)]
    x = torch.cat([values, *near, torch.linspace(-448, 448, 100_003), torch.tensor([1e-30, -1e-40, 2**-10])])
    assert torch.equal(round_e4m3(x), x.to(torch.float8_e4m3fn).float())
    assert round_e4m3(torch.tensor([torch.nan])).isnan()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("columns", [256, 320])
def test_what_is_left_is_what_codes_and_scales_say(granularity, columns):
    x = torch.randn(2, 7, columns, generator=torch.Generator().manual_seed(0)) * 3
    x[0, 0] = 0
    scale = SCALE if granularity == "static" else None
    want = dequantize_activation(*quantize_activation(x, granularity, scale))
    assert torch.equal(served_activation(x, granularity, scale), want)


def moe(granularity: str, scales: list[torch.Tensor | None]) -> MoE:
    """Four experts, expert i under scale i, and a shared one under the first."""
    seeded = torch.Generator().manual_seed(1)

    def linear(rows: int, columns: int, scale: torch.Tensor | None) -> Linear:
        return Linear(torch.randn(rows, columns, generator=seeded), None, granularity, scale)

    def ffn(scale: torch.Tensor | None) -> FFN:
        return FFN(linear(128, 256, scale), linear(128, 256, scale), linear(256, 128, scale))

    router = Linear(torch.randn(4, 256, generator=seeded))
    return MoE(Router(k=2), router, None, [ffn(scale) for scale in scales], ffn(scales[0]))


@pytest.mark.parametrize(("granularity", "scales", "times"), [
    ("token", [None] * 4, 1 + 4 + 2),  # all tokens for the experts, what each made of them, and twice the shared one
    ("group128", [None] * 4, 1 + 4 + 2),
    ("static", [SCALE * i for i in (1, 2, 3, 4)], 4 + 4 + 2),
])  # fmt: skip
def test_layers_that_quantize_alike_do_so_once(granularity, scales, times, monkeypatch):
    x, layer = torch.randn(3, 8, 256, generator=torch.Generator().manual_seed(2)), moe(granularity, scales)
    calls = []

    def counted(*args):
        calls.append(args)
        return served_activation(*args)

    monkeypatch.setattr(reference, "served_activation", counted)
    found, chosen = finish(layer.stages(x))
    assert len(calls) == times
    assert set(chosen.flatten().tolist()) == {0, 1, 2, 3}
    assert torch.equal(found, alone(layer, x))


def alone(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """Every linear layer on its own input, token by token."""

    def apply(ffn: FFN, rows: torch.Tensor) -> torch.Tensor:
        gate, up, down = (
            lambda y, linear=linear: reference.linear(y, linear.weight, None, linear.activation, linear.input_scale)
            for linear in (ffn.gate_proj, ffn.up_proj, ffn.down_proj)
        )
        return down(torch.nn.functional.silu(gate(rows)) * up(rows))

    tokens = x.flatten(0, 1)
    weights, chosen = reference.route(tokens @ layer.router.weight.T, layer.routing)
    out = torch.zeros_like(tokens)
    for number, expert in enumerate(layer.experts):
        which, k = (chosen == number).nonzero(as_tuple=True)
        out[which] += apply(expert, tokens[which]) * weights[which, k, None]
    return out.view_as(x) + apply(layer.shared, x)
