"""MLA decoding by Triton's interpreter and compiled for sm_90 without a device; tests/gpu runs it on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from triton_tools import interpreted, printed

from dsv2quant.arch.families import model_config
from dsv2quant.kernels import reference_attention
from dsv2quant.kernels.decoding import MAX_SPLITS
from dsv2quant.kernels.mla_decode import blocks_of, mla_decode
from dsv2quant.model.attention import LatentAttention, softmax_scale
from dsv2quant.model.layers import Linear, RMSNorm


def test_interpreted_kernels_compute_what_the_twin_does() -> None:
    """Products and weights of 11 bits: a few roundings of 2^-12."""
    errors = interpreted("mla_interpreted.py")
    assert len(errors) == 9
    assert max(errors.values()) < 2**-11, errors


def test_the_twin_computes_what_the_model_does() -> None:
    config = model_config(tiny.LITE, "config.json")
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    nope = config.qk_nope_head_dim
    torch.manual_seed(0)
    kv_b = torch.randn(heads * (nope + config.v_head_dim), rank, dtype=torch.float64)
    none = Linear(torch.empty(0))
    attention = LatentAttention(config, none, RMSNorm(torch.empty(0), 0.0), Linear(kv_b), none)
    q_nope, q_pe = torch.randn(3, heads, 1, nope + rope, dtype=torch.float64).split([nope, rope], -1)
    cache = torch.randn(3, 9, rank + rope, dtype=torch.float64)
    absorbed = torch.einsum("bhqn,hnl->bhl", q_nope, kv_b.unflatten(0, (heads, -1))[:, :nope])
    q = torch.cat([absorbed, q_pe[:, :, 0]], -1)
    lengths = torch.tensor([9, 4, 1], dtype=torch.int32)
    got = reference_attention.mla_decode(q, cache, lengths, rank, softmax_scale(config))
    for row, length in enumerate(lengths):
        latent, k_pe = cache[row : row + 1, :length].split([rank, rope], -1)
        expected = attention.mixed(q_nope[row : row + 1], q_pe[row : row + 1], latent, k_pe)
        assert torch.allclose(got[row], expected[0, :, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("heads", "batch", "longest", "splits"),
    [
        (16, 64, 4096, 2), (16, 1, 4096, 64), (16, 8, 4096, 16), (16, 1, 32768, 128), (16, 8, 32768, 16),
        (128, 64, 4096, 1), (128, 1, 4096, 64), (128, 8, 4096, 8), (128, 8, 32768, 8),
        (4, 300, 4096, 1), (40, 1, 1, 1), (16, 1, 65, 2),
    ],
)  # fmt: skip
def test_splits_are_those_measured_as_best(heads: int, batch: int, longest: int, splits: int) -> None:
    """Of 132 multiprocessors; then more sequences than these, and no more splits than blocks of tokens."""
    assert blocks_of(batch, heads, longest, 132).splits == splits <= MAX_SPLITS


@pytest.mark.parametrize(
    ("heads", "batch", "longest", "stored", "splits"),
    [
        (16, 64, 4096, 1, 2), (16, 8, 32768, 1, 16), (16, 1, 131072, 1, 128), (16, 1, 4096, 1, 32), (10, 300, 64, 1, 1),
        (128, 64, 4096, 1, 1), (128, 8, 4096, 1, 2), (128, 1, 4096, 1, 16),
        (128, 64, 4096, 2, 1), (128, 8, 32768, 2, 8), (128, 1, 131072, 2, 66), (64, 64, 4096, 2, 2),
    ],
)  # fmt: skip
def test_specialized_kernels_serve_float8_and_many_heads_of_16_bits(
    heads: int, batch: int, longest: int, stored: int, splits: int
) -> None:
    chosen = blocks_of(batch, heads, longest, 132, stored)
    assert chosen.specialized
    assert chosen.splits == splits <= MAX_SPLITS


@pytest.mark.parametrize(("heads", "batch", "stored"), [(16, 64, 2), (128, 1, 2), (128, 64, None), (16, 64, None)])
def test_the_plain_kernel_serves_the_rest(heads: int, batch: int, stored: int | None) -> None:
    """Few heads of 16 bits, short shares, and what is no Hopper GPU or has other columns."""
    assert blocks_of(batch, heads, 4096, 132, stored) == blocks_of(batch, heads, 4096, 132)


def arguments() -> dict:
    return {
        "q": torch.zeros(2, 4, 40, dtype=torch.float16),
        "cache": torch.zeros(2, 8, 40, dtype=torch.float16),
        "lengths": torch.ones(2, dtype=torch.int32),
        "rank": 32,
        "scale": 1.0,
    }


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"q": torch.zeros(2, 4, 48).half()}, r"q is \(2, 4, 48\) and the cache \(2, 8, 40\)"),
        ({"q": torch.zeros(2, 40).half()}, r"q is \(2, 40\)"),
        ({"rank": 40}, "of 40 columns 40 cannot be latents"),
        ({"lengths": torch.ones(2, dtype=torch.int64)}, r"lengths is torch.int64 \(2,\); it must be int32 \(2,\)"),
        ({"q": torch.zeros(2, 4, 40)}, "q is torch.float32 and the cache torch.float16"),
        ({"cache": torch.zeros(2, 8, 40).bfloat16()}, "q is torch.float16 and the cache torch.bfloat16"),
        ({"cache": torch.zeros(2, 8, 40).to(torch.float8_e5m2)}, "a float8 cache, and no other, takes a cache_scale"),
        ({"cache_scale": torch.ones(1)}, "a float8 cache, and no other, takes a cache_scale"),
        ({"cache": torch.zeros(2, 40, 8).half().mT}, "must be contiguous and on one device"),
        (
            {"cache": torch.zeros(2, 8, 40).to(torch.float8_e5m2), "cache_scale": torch.ones(2)},
            r"cache_scale is torch.float32 \(2,\); it must be float32 \(1,\)",
        ),
        (
            {"q": torch.zeros(2, 4, 40).bfloat16(), "cache": torch.zeros(2, 8, 40).bfloat16()},
            "interpreter computes bfloat16 wrongly",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mla_decode(**arguments() | changed)


def test_compiled_kernels_copy_asynchronously_and_use_the_matrix_unit(tmp_path: Path) -> None:
    """Stack is that of spilled registers. Triton 3.9 spills where a thread has bytes to widen as well, or a tile of 64
    heads, which alone fills half of its registers; so of these kernels nothing is asked."""
    compiled = printed("mla_compiled.py", TRITON_CACHE_DIR=str(tmp_path))
    for name, used in compiled["plain"].items():
        assert used["local"] == 0, (name, used)
        assert used["stack"] == 0 or name != "16 heads, *bf16", (name, used)
        assert used["shared"] <= 232448, (name, used)  # of a block on sm_90
        assert used["cp.async"] > 0, (name, used)
        assert used["wgmma.mma_async" if name.startswith("128") else "mma.sync.aligned"] > 0, (name, used)
    for name, used in compiled["specialized"].items():
        assert used["local"] == 0, (name, used)
        assert used["stack"] <= 256, (name, used)
        assert used["shared"] <= 232448, (name, used)
        assert used["cp.async.bulk"] > 0, (name, used)  # by the tensor memory accelerator
        assert used["wgmma.mma_async"] > 0, (name, used)
        assert used["setmaxnreg"] > 0, (name, used)  # warpgroups share registers out
