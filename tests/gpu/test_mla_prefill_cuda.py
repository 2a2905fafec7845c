"""Attention of prompts on a Hopper GPU against its reference in float64. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from mla_cases import poisoned

from dsv2quant.kernels import reference_attention
from dsv2quant.kernels.decoding import is_hopper
from dsv2quant.kernels.mla_prefill import is_served, mla_prefill

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not is_hopper(torch.device("cuda")), reason="needs a Hopper GPU"
)

SCALE = 192**-0.5 * 1.5
# Rotated queries, weights and results are rounded to BF16, weights by 1.6e-3 in the mean square.
TOLERANCE = 4e-3


def prompt(batch: int, heads: int, new: int, total: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, in rows apart, table, kv, keys."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, kv, keys = (
        torch.randn(batch, tokens, width, generator=generator, device="cuda").to(dtype)
        for tokens, width in ((new, heads * 192 + 64), (total, heads * 256), (total, 64))
    )
    angles = torch.randn(new, 32, generator=generator, device="cuda") * 3
    return q[..., : heads * 192], torch.stack([angles.cos(), angles.sin()], -1), kv, keys


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "heads", "new", "total"),
    [(1, 16, 512, 512), (2, 4, 300, 300), (3, 20, 77, 500), (1, 2, 1, 129), (2, 18, 1100, 1500), (1, 128, 200, 200)],
)
def test_each_query_is_right(
    batch: int, heads: int, new: int, total: int, dtype: torch.dtype, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_served(128, 64, 128, dtype, torch.device("cuda"))
    given = prompt(batch, heads, new, total, dtype)
    expected = reference_attention.mla_prefill(*(x.double() for x in given), SCALE, halves=halves)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    got = mla_prefill(*given, SCALE, halves=halves)
    errors = (got.double() - expected).norm(dim=2) / expected.norm(dim=2)
    assert float(errors.nan_to_num(torch.inf).max()) < TOLERANCE


def test_what_lies_behind_a_sequence_is_not_looked_at() -> None:
    """Its last block of keys reaches into the next sequence's."""
    q, table, kv, keys = prompt(2, 4, 300, 300, torch.bfloat16)
    alone = mla_prefill(q[:1], table, kv[:1], keys[:1], SCALE)
    kv[1], keys[1] = torch.nan, torch.nan
    assert torch.equal(mla_prefill(q, table, kv, keys, SCALE)[:1], alone)
