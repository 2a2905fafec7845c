"""Plain attention's decoding by Triton's interpreter and compiled for sm_90; tests/gpu runs it on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from triton_tools import interpreted, printed

from dsv2quant.kernels import reference_attention
from dsv2quant.kernels.append_keys import append_keys
from dsv2quant.kernels.decoding import MAX_SPLITS
from dsv2quant.kernels.gqa_decode import blocks_of, gqa_decode


def test_interpreted_kernels_compute_what_the_references_do() -> None:
    """Products and weights of 11 bits: a few roundings of 2^-12."""
    found = interpreted("gqa_interpreted.py")
    assert (len(found["errors"]), len(found["faults"])) == (9, 6)
    assert max(found["errors"].values()) < 2**-11, found
    assert not any(found["faults"].values()), found


def test_the_reference_is_attention_of_the_last_token() -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 6, 16, dtype=torch.float64)
    cache = torch.randn(3, 9, 2 * 2 * 16, dtype=torch.float64)
    got = reference_attention.gqa_decode(q, cache, torch.tensor([9, 4, 1], dtype=torch.int32), 0.3)
    for row, length in enumerate((9, 4, 1)):
        keys, values = cache[row, :length].unflatten(1, (2, 2, 16)).permute(1, 2, 0, 3)
        expected = F.scaled_dot_product_attention(q[row, :, None], keys, values, scale=0.3, enable_gqa=True)
        assert torch.allclose(got[row], expected[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("groups", "width", "batch", "longest", "tokens", "splits"),
    [
        (32, 128, 1, 4096, 64, 12), (8, 128, 1, 4096, 64, 49), (8, 128, 64, 4096, 64, 1), (10, 128, 1, 512, 64, 8),
        (1, 128, 1, 1 << 20, 64, 128), (8, 256, 1, 65, 32, 3),
    ],
)  # fmt: skip
def test_splits_fill_the_device(groups: int, width: int, batch: int, longest: int, tokens: int, splits: int) -> None:
    """Of 132 multiprocessors; and no more than blocks of tokens."""
    cut = blocks_of(batch, groups, width, longest, 132)
    assert (cut.tokens, cut.splits) == (tokens, splits)
    assert splits <= MAX_SPLITS


def decoded(**changed: torch.Tensor | None) -> torch.Tensor:
    given: dict = {
        "q": torch.zeros(2, 4, 32).half(), "cache": torch.zeros(2, 8, 128).half(),
        "lengths": torch.ones(2, dtype=torch.int32), "scale": 1.0,
    }  # fmt: skip
    return gqa_decode(**given | changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"q": torch.zeros(2, 4, 48).half()}, r"q is \(2, 4, 48\) and the cache \(2, 8, 128\); they must be"),
        ({"cache": torch.zeros(3, 8, 128).half()}, r"the cache \(3, 8, 128\); they must be"),
        ({"q": torch.zeros(2, 3, 32).half()}, "3 heads share 2 keys; a key serves 1 to 16 heads"),
        ({"q": torch.zeros(2, 34, 32).half()}, "34 heads share 2 keys"),
        ({"q": torch.zeros(2, 4, 8).half()}, "4 heads share 8 keys"),
        (
            {"q": torch.zeros(2, 4, 272).half(), "cache": torch.zeros(2, 8, 1088).half()},
            "a head has 272 columns; at most 256 are computed",
        ),
        ({"lengths": torch.ones(2, dtype=torch.int64)}, r"lengths is torch.int64 \(2,\); it must be int32 \(2,\)"),
        ({"cache": torch.zeros(2, 8, 128)}, "q is torch.float16 and the cache torch.float32"),
        ({"cache": torch.zeros(2, 8, 128).to(torch.float8_e5m2)}, "a float8 cache, and no other, takes a cache_scale"),
        (
            {"cache": torch.zeros(2, 8, 128).to(torch.float8_e5m2), "cache_scale": torch.ones(1)},
            r"cache_scale is torch.float32 \(1,\); it must be float32 \(2,\)",
        ),
        ({"cache": torch.zeros(2, 128, 8).half().mT}, "must be contiguous and on one device"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decoded(**changed)


def appended(**changed: torch.Tensor | None) -> torch.Tensor:
    given: dict = {
        "q": torch.zeros(2, 64).half(), "k": torch.zeros(2, 32).half(), "v": torch.zeros(2, 32).half(),
        "table": torch.zeros(9, 8, 2), "positions": torch.zeros(2, dtype=torch.int32),
        "cache": torch.zeros(2, 7, 64).half(), "cache_scale": None, "width": 16,
    }  # fmt: skip
    return append_keys(**given | changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"k": torch.zeros(3, 32).half()}, r"k has shape \(3, 32\); need \(2, any\)"),
        ({"v": torch.zeros(2, 16).half()}, r"v has shape \(2, 16\); need \(2, 32\)"),
        ({"v": torch.zeros(2, 32)}, "v is torch.float32; need torch.float16"),
        ({"q": torch.zeros(2, 60).half()}, "q has 60 columns and k 32, which are not heads of 16, an even width"),
        ({"table": torch.zeros(9, 4, 2)}, r"table has shape \(9, 4, 2\); need \(any, 8, 2\)"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "positions is torch.int64; need torch.int32"),
        ({"cache": torch.zeros(2, 7, 32).half()}, r"cache has shape \(2, 7, 32\); need \(2, any, 64\)"),
        ({"cache": torch.zeros(2, 9, 64).half()[:, :7]}, "cache and table must be contiguous"),
        ({"cache_scale": torch.ones(2)}, "a float8 cache, and no other, takes a cache_scale"),
    ],
)
def test_an_append_that_does_not_fit_is_refused(changed: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        appended(**changed)


def test_no_tokens_append_nothing() -> None:
    empty = torch.zeros(0, 32).half()
    given = {"q": torch.zeros(0, 64).half(), "k": empty, "v": empty, "positions": torch.zeros(0, dtype=torch.int32)}
    assert appended(**given, cache=torch.zeros(0, 7, 64).half()).shape == (0, 4, 16)


def test_compiled_kernels_spill_nothing_copy_asynchronously_and_use_the_matrix_unit(tmp_path: Path) -> None:
    """Groups have too few heads for Hopper's own matrix instructions, which have 64 rows."""
    compiled = printed("gqa_compiled.py", TRITON_CACHE_DIR=str(tmp_path))
    for name, used in compiled.items():
        assert (used["stack"], used["local"]) == (0, 0), (name, used)
        assert used["shared"] <= 232448 // 3 - 1024, (name, used)  # three programs of a multiprocessor on sm_90
        if name.startswith("decoding"):
            assert used["cp.async"] > 0, (name, used)
            assert used["mma.sync.aligned"] > 0, (name, used)
    assert compiled["appending *fp8e4nv"]["cvt.rn.satfinite.e4m3x2.f32"] > 0
    assert compiled["appending *fp8e5"]["cvt.rn.satfinite.e5m2x2.f32"] > 0
