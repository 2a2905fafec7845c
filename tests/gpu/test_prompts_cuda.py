"""A prompt's kernels on a CUDA device, in the models' shapes, against their references. Skipped without a Hopper
GPU."""

from __future__ import annotations

import pytest
import torch
from fused_cases import GRANULARITIES, poisoned
from prompts_cases import FLOATS_8, keys_faults, prompt_faults
from routing_cases import logits_off, router_operands

from dsv2quant.kernels import router
from dsv2quant.kernels.activations import MANY, add_norm

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs a Hopper GPU"
)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("granularity", [None, *GRANULARITIES])
@pytest.mark.parametrize("stored", [None, torch.bfloat16, *FLOATS_8], ids=str)
@pytest.mark.parametrize("heads", [16, 128, 20, 0])
def test_prompts(heads: int, stored: torch.dtype | None, granularity: str | None) -> None:
    for batch, new, room in ((1, 1, (1, 0)), (3, 70, (100, 13)), (1, 300, (300, 0))):
        given = (batch, new, (heads, 128, 64, 512), False, room, granularity, stored)
        assert prompt_faults(*given, torch.bfloat16, "cuda") == [], (batch, new)
    assert prompt_faults(2, 5, (heads, 24, 12, 72), True, (9, 2), granularity, stored, torch.float16, "cuda") == []


@pytest.mark.parametrize("case", [(300, 16, 128, 64, 128), (70, 128, 128, 64, 128), (5, 33, 24, 12, 8)])
def test_keys(case: tuple[int, int, int, int, int]) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert keys_faults(*case, dtype, "cuda") == []


@pytest.mark.parametrize(
    "case", [(65, 64, 2048), (300, 160, 5120), (20000, 64, 2048), (20000, 160, 5120), (70, 7, 200)]
)
def test_logits_are_those_of_float64(case: tuple[int, int, int]) -> None:
    x, weight = router_operands(*case, torch.bfloat16, "cuda")
    for given in (weight, weight.bfloat16().float()):
        assert logits_off(router.many_logits(x, router.split(given)), x, given) <= 1


def test_a_token_is_the_same_among_many() -> None:
    """Of add_norm, whose programs are others then."""
    x, weight = torch.randn(2, MANY + 1, 2048, device="cuda").bfloat16(), torch.ones(2048, device="cuda").bfloat16()
    pairs = torch.randn(MANY + 1, 6, 2048, device="cuda")
    many = add_norm(x[0], weight, 1e-6, addend=x[1], pairs=pairs)
    few = add_norm(x[0, :3], weight, 1e-6, addend=x[1, :3], pairs=pairs[:3])
    assert torch.equal(many.residual[:3], few.residual)
    assert float((many.normed[:3] != few.normed).float().mean()) < 1e-2  # the sum of squares in another order
