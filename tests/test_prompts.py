"""A prompt's kernels: by Triton's interpreter against their references, and as code for Hopper. tests/gpu has the same
on a device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from triton_tools import interpreted, printed

from dsv2quant.kernels import router
from dsv2quant.kernels.prompts import append_prompt, prompt_keys


@pytest.fixture(scope="module")
def results() -> dict:
    return interpreted("prompts_interpreted.py")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return printed("prompts_compiled.py", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize(("operation", "cases"), [("prompt", 32), ("keys", 4)])
def test_results_are_the_references(results: dict, operation: str, cases: int) -> None:
    assert len(results[operation]) == cases
    assert not {case: faults for case, faults in results[operation].items() if faults}


def test_logits_are_those_of_float64(results: dict) -> None:
    assert len(results["logits"]) == 3
    assert max(results["logits"].values()) <= 1, results["logits"]


def test_a_weight_has_as_many_parts_as_it_needs(results: dict) -> None:
    assert list(results["parts"].values()) == [[3, 1]] * 3


def test_parts_add_up() -> None:
    weight = torch.randn(5, 700, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-60, 80, 28)[:, None]
    parts = router.split(weight)
    assert torch.equal(parts.double().sum(0).float(), weight)


def test_many_pairs_are_sorted_as_by_the_reference(results: dict) -> None:
    assert len(results["sorted"]) == 4
    assert all(results["sorted"].values()), results["sorted"]


def test_they_compile(compiled: dict) -> None:
    """Without spills; products by the units for it, no more shared memory than there is, a division for each scale and
    none for each code."""
    for name, used in compiled.items():
        assert used["local"] == 0, (name, used)
        assert used["shared"] <= 227 * 1024, (name, used)
        if name.startswith("logits"):
            assert used["wgmma.mma_async"] > 0, (name, used)
            assert used["cp.async"] > 0, (name, used)
    assert compiled["quantize"]["div.rn.f32"] < compiled["quantize"]["cvt.rn.satfinite.e4m3x2.f32"]
    assert compiled["keys"]["st.global.v4"] > 0


def prompt(**changed: torch.Tensor | int | str | None) -> None:
    given: dict = {
        "kv": torch.zeros(4, 40).half(), "norm_weight": torch.zeros(32).half(), "eps": 1e-6,
        "table": torch.zeros(2, 4, 2), "q": torch.zeros(4, 3 * 24).half(), "heads": 3,
        "cache": torch.zeros(2, 7, 40).half(),
    }  # fmt: skip
    append_prompt(**given | changed)


HALF = torch.zeros(4, 72).half()
PARTS = torch.zeros(1, 4, 72).bfloat16()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompt(kv=torch.zeros(4, 39).half()), "of kv's 39 columns 32 are latents"),
        (lambda: prompt(heads=5), "q has 72 columns, which are not 5 heads of 8 or more"),
        (lambda: prompt(q=torch.zeros(3, 72).half()), r"q has shape \(3, 72\); need \(4, any\)"),
        (lambda: prompt(table=torch.zeros(3, 4, 2)), "of positions that divide 4 tokens"),
        (lambda: prompt(table=torch.zeros(2, 5, 2)), r"table has shape \(2, 5, 2\); need \(any, 4, 2\)"),
        (lambda: prompt(cache=torch.zeros(3, 7, 40).half()), r"cache has shape \(3, 7, 40\); need \(2, any, 40\)"),
        (lambda: prompt(first=6), "hold tokens 6 to 8"),
        (lambda: prompt(cache_scale=torch.ones(1)), "a float8 cache, and no other, takes a cache_scale"),
        (lambda: prompt(quantize="group64"), "no activations are quantized by 'group64'"),
        (lambda: prompt_keys(HALF, HALF[:, :8].contiguous(), 3, 25), "need 3 heads of 25 or more"),
        (lambda: prompt_keys(HALF, HALF[:, :8], 3, 16), "contiguous keys"),
        (lambda: router.many_logits(HALF, PARTS), "x is torch.float16; need torch.bfloat16"),
        (lambda: router.many_logits(HALF.bfloat16(), PARTS.float()), "parts is torch.float32; need torch.bfloat16"),
        (
            lambda: router.many_logits(HALF.bfloat16(), torch.zeros(2, 8, 72).bfloat16()[:, ::2]),
            "parts must be contiguous",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_no_tokens_give_no_rows() -> None:
    made = append_prompt(torch.zeros(0, 40), torch.zeros(32), 1e-6, torch.zeros(2, 4, 2), quantize="group128")
    assert (made.latents.shape, made.keys.shape, made.scales.shape) == ((0, 32), (0, 8), (0, 1))
    assert prompt_keys(torch.zeros(0, 72), torch.zeros(0, 8), 3, 16).shape == (0, 3, 24)
    assert router.many_logits(torch.zeros(0, 72).bfloat16(), PARTS).shape == (0, 4)
