"""Attention of prompts without a device: its reference, and what its wrapper refuses; tests/gpu runs the kernel and
test_mla_decode.py compiles it."""

from __future__ import annotations

import pytest
import tiny
import torch

from dsv2quant.arch.families import model_config
from dsv2quant.kernels import reference_attention
from dsv2quant.kernels.mla_prefill import is_served, mla_prefill
from dsv2quant.model.attention import Rope, expanded, softmax_scale


@pytest.mark.parametrize("halves", [False, True])
def test_the_reference_computes_what_the_model_does(halves: bool) -> None:
    config = model_config(
        tiny.LITE | {"num_attention_heads": 3, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        "config.json",
    )
    torch.manual_seed(0)
    q = torch.randn(2, 5, 3 * 192, dtype=torch.float64)
    kv, keys = torch.randn(2, 9, 3 * 256, dtype=torch.float64), torch.randn(2, 9, 64, dtype=torch.float64)
    rope = torch.polar(torch.ones(5, 32), torch.randn(5, 32))
    q_nope, q_pe = q.unflatten(-1, (3, 192)).transpose(1, 2).split([128, 64], -1)
    expected = expanded(config, kv, q_nope, Rope.rotate(q_pe, rope, halves), keys)
    got = reference_attention.mla_prefill(q, torch.view_as_real(rope), kv, keys, softmax_scale(config), halves=halves)
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-7)  # turned in float32


def arguments() -> dict:
    return {
        "q": torch.zeros(2, 3, 4 * 192, dtype=torch.float16),
        "table": torch.zeros(3, 32, 2),
        "kv": torch.zeros(2, 7, 4 * 256, dtype=torch.float16),
        "keys": torch.zeros(2, 7, 64, dtype=torch.float16),
        "scale": 1.0,
    }


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"q": torch.zeros(2, 3, 4 * 192)}, "q is torch.float32"),
        ({"q": torch.zeros(2, 3, 4 * 192 + 8).half()}, r"q is torch.float16 \(2, 3, 776\)"),
        ({"q": torch.zeros(2, 8, 4 * 192).half(), "table": torch.zeros(8, 32, 2)}, "4 heads of 8 new tokens among 7"),
        ({"q": torch.zeros(2, 4 * 192, 3).half().mT}, "each row of q"),
        ({"table": torch.zeros(4, 32, 2)}, r"table is torch.float32 \(4, 32, 2\)"),
        ({"kv": torch.zeros(2, 7, 4 * 192).half()}, r"kv is torch.float16 \(2, 7, 768\) on cpu"),
        ({"keys": torch.zeros(2, 7, 64).bfloat16()}, "keys is torch.bfloat16"),
        ({"keys": torch.zeros(2, 7, 128).half()[..., :64]}, "must be contiguous"),
        ({"keys": torch.zeros(2 * 7 * 64 + 1).half()[1:].view(2, 7, 64)}, "at multiples of 16 bytes"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mla_prefill(**arguments() | changed)


def test_other_heads_and_devices_are_not_served() -> None:
    assert not is_served(128, 64, 128, torch.bfloat16, torch.device("cpu"))
    assert not is_served(64, 32, 64, torch.bfloat16, torch.device("cuda"))
    assert not is_served(128, 64, 128, torch.float32, torch.device("cuda"))
