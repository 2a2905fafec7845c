"""Attention as evaluation and calibration have it, by blocks on a CPU and at once, against float64."""

from __future__ import annotations

import pytest
import torch

from dsv2quant.model import attention


@pytest.mark.parametrize("width", [16, 24, 40], ids="values of {} columns".format)
@pytest.mark.parametrize("tokens", [1, 30, attention.QUERIES, 2 * attention.QUERIES + 5])
@pytest.mark.parametrize("shared", [1, 2], ids=["own keys", "shared keys"])
@pytest.mark.parametrize("how", ["_by_blocks", "_at_once"])
def test_values_are_weighed_by_the_keys_up_to_each_query(how, shared, tokens, width) -> None:
    random = torch.Generator().manual_seed(tokens)
    q, k, v = (
        torch.randn(3, heads, tokens, columns, generator=random)
        for heads, columns in ((4, 24), (4 // shared, 24), (4 // shared, width))
    )
    got = getattr(attention, how)(q, k, v, 0.3)
    k, v = (x.double().repeat_interleave(shared, 1) for x in (k, v))
    scores = q.double() @ k.mT * 0.3
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    want = scores.masked_fill(later, -torch.inf).softmax(-1) @ v
    # A score is off by what a sum of 24 products is, a weight by twice that share; the weights of so many values add up
    # to 1.
    allowed = (2 * 24 * scores.abs().amax() + tokens + 8) * 2.0**-24 * v.abs().amax()
    assert got.shape == (3, tokens, 4, width)
    assert ((got.transpose(1, 2).double() - want).abs() <= allowed).all()


def test_a_cpu_goes_by_blocks_where_nothing_is_trained(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(attention, "_by_blocks", lambda q, k, v, scale: asked.append(len(q)))
    q = torch.randn(1, 2, 5, 8)
    attention.weighed(q, q, q, 1.0)  # gradients are asked for
    attention.weighed(q.bfloat16(), q.bfloat16(), q.bfloat16(), 1.0)
    with torch.inference_mode():
        attention.weighed(q[:, :, :1], q, q, 1.0)  # behind tokens that are known
        assert asked == []
        attention.weighed(q, q, q, 1.0)
    assert asked == [1]
