"""GGUF files of DeepSeek-V2's relatives as checkpoints: what was written comes back, whatever order its rows have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf_tiny
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.checkpoint.weights import BLOCKS
from dsv2quant.errors import InputError
from dsv2quant.formats.gguf import blocks
from dsv2quant.model.runtime import Model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("family")
    return gguf_tiny.write(folder, gguf_tiny.FAMILY)


@pytest.fixture
def convert(cli, folders, tmp_path):
    """Convert a model with the command."""

    def run(model: str, file_type: str) -> Path:
        out = tmp_path / f"{model}.gguf"
        ran = cli("convert", folders[model], "--gguf", file_type, "-q", "-o", out)
        assert ran.code == 0, ran.err
        return out

    return run


@pytest.mark.parametrize("model", gguf_tiny.FAMILY)
def test_a_file_gives_the_weights_back_and_the_logits(model: str, convert, folders) -> None:
    source, opened = open_checkpoint(folders[model]), open_checkpoint(convert(model, "BF16"))
    wanted = {weight.spec.name: weight for weight in source.weights if not weight.spec.is_prediction}
    found = {weight.spec.name: weight for weight in opened.weights}
    assert found.keys() == wanted.keys()
    for name, weight in found.items():
        assert torch.equal(opened.decode(weight, torch.float32), source.decode(wanted[name], torch.float32)), name
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 4096, (2, 24)))
    assert torch.equal(Model(opened).forward(tokens), Model(source).forward(tokens))


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-moe"])
def test_rows_of_heads_come_as_blocks_in_the_models_order(model: str, convert) -> None:
    """As kernels multiply by them, and row by row."""
    opened = open_checkpoint(convert(model, "Q8_0"))
    for weight in opened.weights:
        if weight.spec.role in ("q_proj", "k_proj"):
            whole = opened.decode(weight, torch.float32)
            rows = blocks.decode("Q8_0", opened.parts(weight)[BLOCKS].numpy())
            np.testing.assert_array_equal(rows, whole.numpy())
            assert torch.equal(opened.row_decoder(weight, torch.float32, "cpu")(3, 40), whole[3:40])


def test_a_file_is_verified_against_its_source(cli, convert, folders) -> None:
    ran = cli("verify", convert("tiny-llama", "Q4_K_M"), "--source", folders["tiny-llama"], "-q")
    assert ran.code == 0, ran.err


def test_glms_texts_begin_as_its_post_processor_says(convert, folders) -> None:
    """Its settings name no BOS."""
    for opened in (open_checkpoint(folders["tiny-glm4"]), open_checkpoint(convert("tiny-glm4", "Q4_0"))):
        tokenizer = opened.tokenizer()
        assert tokenizer.bos_id == 4096 + gguf_tiny.GLM_TOKENS.index("[gMASK]")
        assert tokenizer.add_bos


@pytest.mark.parametrize(
    ("model", "kind"), [("tiny-llama", "MultiModalityCausalLM"), ("tiny-ocr", "DeepseekOCRForCausalLM")]
)
def test_of_a_multimodal_model_the_file_is_the_language_models(
    model: str, kind: str, cli, convert, folders, tmp_path
) -> None:
    alone = convert(model, "Q4_K_M")
    whole = tmp_path / "whole" / model
    shutil.copytree(folders[model], whole)
    config = json.loads((whole / "config.json").read_text())
    tensors = load_file(whole / "model.safetensors")
    if kind == "MultiModalityCausalLM":
        tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    tensors["model.vision_model.x" if kind != "MultiModalityCausalLM" else "vision_model.x"] = torch.ones(3)
    save_file(tensors, whole / "model.safetensors")
    (whole / "config.json").write_text(json.dumps({"architectures": [kind], "language_config": config}))
    ran = cli("convert", whole, "--gguf", "Q4_K_M", "-q", "-o", tmp_path / "tower.gguf")
    assert ran.code == 0, ran.err
    assert (tmp_path / "tower.gguf").read_bytes() == alone.read_bytes()


def test_layers_for_prediction_in_others_files_are_left_alone(convert) -> None:
    """llama.cpp's converter keeps GLM-4.7-Flash's."""
    out = convert("tiny-glm4", "F32")
    changed = gguf_tiny.with_keys(out, {"deepseek2.block_count": 3, "deepseek2.nextn_predict_layers": 1})
    assert open_checkpoint(changed).config.num_hidden_layers == 2


def test_mixtral_is_no_llama_of_ours(convert) -> None:
    changed = gguf_tiny.with_keys(convert("tiny-llama", "F16"), {"llama.expert_count": 8})
    with pytest.raises(InputError, match="has experts, as Mixtral has"):
        open_checkpoint(changed)
