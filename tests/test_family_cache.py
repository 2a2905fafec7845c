"""KV-cache scales of the family: plain attention has one for keys and one for values, layers for prediction none."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import dsv2quant as dq
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.model.cache import KVCache
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 40


def converted(tmp_path, name):
    raw = tiny.FAMILY[name] | {"vocab_size": 4096, "num_hidden_layers": 2, "rope_scaling": None}
    folder = tiny.write_checkpoint(tmp_path / name, raw)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    calibrate = {"calibration": str(text), "samples": 4, "length": 64}
    dq.convert(folder, tmp_path / "static", scheme="fp8-static", kv_scales=True, **calibrate)
    return open_checkpoint(folder), tmp_path / "static", text


def test_keys_and_values_have_scales_of_their_own(tmp_path, one_thread, monkeypatch):
    source, out, text = converted(tmp_path, "llama")
    cached = []

    def record(self, first, second, *, as_stored):
        cached.append((first, second))
        return first, second

    artifact = open_checkpoint(out)
    monkeypatch.setattr(KVCache, "append", record)
    stream = source.tokenizer().encode(TEXT)
    model = Model(source)
    for window in range(4):
        ids = torch.tensor([[source.tokenizer().bos_id, *stream[63 * window : 63 * (window + 1)]]])
        model.forward(ids, model.caches(1, 64))
    for layer in range(2):
        keys, values = (torch.cat(parts, 1) for parts in zip(*cached[layer::2], strict=True))
        pairs = keys.unflatten(-1, (-1, 2, 16)).double().norm(dim=-2)  # heads of 32, whose halves are turned together
        scales = artifact.kv_scale(layer, "cpu")
        wanted = np.array([float(pairs.max()), float(values.double().abs().max())]) / 448
        # sums of 128 float32 products in another order: 1e-5 is many times what they differ by
        np.testing.assert_allclose(scales, wanted, rtol=1e-5)
        assert wanted[0] != pytest.approx(wanted[1], rel=1e-2)
    monkeypatch.undo()
    plain, through_fp8 = (
        dq.evaluate(out, text=str(text), ctx=64, limit=1, kv_cache=kind, decode_path=True)
        for kind in ("bf16", "fp8_e4m3")
    )
    assert abs(plain.perplexity.value / through_fp8.perplexity.value - 1) < 0.02


def test_a_layer_for_prediction_has_no_scales(tmp_path, one_thread):
    _, out, _ = converted(tmp_path, "v3")
    names = load_file(out / "model.safetensors").keys()
    assert {name.split(".")[2] for name in names if name.endswith("k_scale")} == {"0", "1"}
    assert "model.layers.2.self_attn.kv_b_proj.weight_scale" not in names
    assert Model(open_checkpoint(out), LoadOptions()).forward(torch.ones(1, 3, dtype=torch.long)).isfinite().all()
