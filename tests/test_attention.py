"""Attention by blocks, as calibration on a CPU has it, against attention of all at once in float64."""

from __future__ import annotations

import pytest
import torch

from dsv2quant.model import attention


@pytest.mark.parametrize("tokens", [1, 30, attention.QUERIES, 2 * attention.QUERIES + 5])
@pytest.mark.parametrize("shared", [1, 2], ids=["own keys", "shared keys"])
def test_by_blocks_it_is_what_it_is_at_once(shared, tokens) -> None:
    random = torch.Generator().manual_seed(tokens)
    q, k, v = (
        torch.randn(3, heads, tokens, width, generator=random)
        for heads, width in ((4, 24), (4 // shared, 24), (4 // shared, 16))
    )
    got = attention._by_blocks(q, k, v, 0.3)
    k, v = (x.double().repeat_interleave(shared, 1) for x in (k, v))
    scores = (q.double() @ k.mT * 0.3).masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf)
    # Weights off by as much as a sum of 24 products is that a softmax takes; a value is weighted by no more than 1.
    allowed = 2 * 24 * 2.0**-24 * scores.isfinite().mul(scores.abs().nan_to_num(posinf=0)).amax() + 4 * 2.0**-24
    want = scores.softmax(-1) @ v
    assert got.shape == (3, tokens, 4, 16)
    assert ((got.transpose(1, 2).double() - want).abs() <= allowed * v.abs().amax()).all()
