"""Opening checkpoints: what is read, and from where."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from dsv2quant.arch.deepseek_v2 import SEQUENCE_CLASSIFICATION
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError
from dsv2quant.formats.schemes import CODECS


def values(checkpoint: Checkpoint, weight) -> torch.Tensor:
    array = checkpoint.encodable(weight)
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reads_what_safetensors_reads(shards, dtype, tmp_path):
    tensors = tiny.random_weights(tiny.V2 | {"attention_bias": True}, dtype=dtype)
    folder = tiny.write_checkpoint(tmp_path / "v2", tiny.V2 | {"attention_bias": True}, tensors, shards)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.model == "v2"
    assert len(checkpoint.files) == shards
    assert {w.spec.name for w in checkpoint.weights} == set(tensors)
    for weight in checkpoint.weights:
        got = values(checkpoint, weight)
        assert torch.equal(got, tensors[weight.spec.name].to(got.dtype))
        assert weight.scheme == "bf16"


def test_parts_of_a_tensor_can_be_read(lite):
    checkpoint = open_checkpoint(lite)
    weight = next(w for w in checkpoint.weights if w.spec.role == "embed")
    whole = checkpoint.read(weight.stored)
    np.testing.assert_array_equal(checkpoint.read(weight.stored, 100, 57), whole[100:157])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_block_fp8(tmp_path, dtype):
    """Its scales may have any plain dtype."""
    raw = tiny.AWKWARD | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    tensors = tiny.random_weights(tiny.AWKWARD)
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # 576 rows: a ragged last block
    plain = tensors[name]
    (encoded,) = CODECS["fp8-block"].encode([plain.view(torch.int16).numpy().view(np.uint16)])
    tensors[name] = torch.from_numpy(encoded["weight"]).view(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.from_numpy(encoded["weight_scale_inv"]).to(dtype)
    checkpoint = open_checkpoint(tiny.write_checkpoint(tmp_path / "fp8", raw, tensors))
    weight = next(w for w in checkpoint.weights if w.spec.name == name)
    assert weight.scheme == "fp8-block"
    parts = {"weight": tensors[name], "weight_scale_inv": tensors[f"{name}_scale_inv"]}
    assert torch.equal(values(checkpoint, weight), CODECS["fp8-block"].decode(parts, torch.float32))


def test_a_classifiers_head_belongs_to_the_model(tmp_path):
    raw = tiny.LITE | {"architectures": [SEQUENCE_CLASSIFICATION], "id2label": {"0": "a", "1": "b", "2": "c"}}
    checkpoint = open_checkpoint(tiny.write_checkpoint(tmp_path / "classifier", raw))
    assert checkpoint.weights[-1].spec.name == "score.weight"
    assert checkpoint.weights[-1].spec.shape == (3, 64)


def test_rope_frequencies_of_old_checkpoints_are_ignored(tmp_path):
    tensors = tiny.random_weights(tiny.LITE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    checkpoint = open_checkpoint(tiny.write_checkpoint(tmp_path / "old", tiny.LITE, tensors))
    assert not any("inv_freq" in part.name for w in checkpoint.weights for part in w.parts.values())


def test_an_existing_folder_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_checkpoint(tmp_path / "owner" / "name", tiny.LITE)
    checkpoint = open_checkpoint("owner/name")
    assert checkpoint.folder is not None
    assert checkpoint.revision is None


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "lite", tiny.LITE)
    checkpoint = open_checkpoint(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    last = checkpoint.weights[-1].stored
    with pytest.raises(InputError, match=r"model\.safetensors: .* ends early"):
        checkpoint.read(last)


def test_safetensors_itself_reads_our_fixture(awkward):
    assert sum(len(load_file(f)) for f in awkward.glob("*.safetensors")) == len(open_checkpoint(awkward).weights)
