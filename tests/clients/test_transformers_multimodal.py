"""transformers' own DeepSeek-VL class saves a model, and loads its artifacts: the language model's weights bit for bit
as we decode them, all others as they were, and the logits of our runtime."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration
from transformers.utils.quantization_config import CompressedTensorsConfig

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model

TEXT = {key: value for key, value in tiny.LLAMA.items() if key not in ("architectures", "torch_dtype")}
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def saved(request, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """(folder that transformers wrote, the model's state)."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    text = TEXT | {"num_hidden_layers": 2, "rope_scaling": None}
    config = DeepseekVLConfig(
        text_config=text, vision_config=dict(VISION), image_token_id=5, tie_word_embeddings=request.param
    )
    model = DeepseekVLForConditionalGeneration(config).bfloat16()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.MINI / name, folder / name)
    (folder / "tokenizer.json").write_text(tiny._tokenizer(TEXT["vocab_size"]))
    return folder, model.state_dict()


def test_ours_is_its_own(saved, tmp_path):
    folder, _ = saved
    tokens = torch.arange(10, 34)[None]
    theirs = DeepseekVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        want = theirs(input_ids=tokens).logits.double()
    got = Model(open_checkpoint(folder), LoadOptions(torch.float32)).forward(tokens).double()
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("options", [["--fp8=block"], ["--fp8=channel"], ["--int4=pure", "--method", "rtn"]])
def test_its_artifacts_are_loaded(options, saved, tmp_path, cli):
    folder, before = saved
    asked = [*options, *(["--group-size", "32"] if "rtn" in options else []), "--target", "transformers"]
    ran = cli("convert", folder, *asked, "-o", tmp_path / "out", "-q")
    assert ran.code == 0, ran.err
    extra = {} if options == ["--fp8=block"] else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    theirs = DeepseekVLForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, **extra).eval()
    state, checkpoint = theirs.state_dict(), open_checkpoint(tmp_path / "out")
    assert {weight.scheme for weight in checkpoint.weights} != {"bf16"}
    for weight in checkpoint.weights:
        name = checkpoint.names.stored(weight.spec.name)
        assert torch.equal(state[name], checkpoint.decode(weight, torch.bfloat16)), name
    others = [name for name in before if "vision_model" in name or "aligner" in name]
    assert others
    for name in others:
        assert torch.equal(state[name], before[name]), name
    tokens = torch.arange(10, 34)[None]
    with torch.inference_mode():
        want = theirs.float()(input_ids=tokens).logits.double()
    ours = Model(checkpoint, LoadOptions(torch.float32, weight_only=True))
    got = ours.forward(tokens).double()
    assert float((got - want).norm() / want.norm()) < 1e-2  # theirs are rounded to BF16 first
