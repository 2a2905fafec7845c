"""Checkpoints whose tensors have other names, or stacked experts: the same model, read and written the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.identity import sampled
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError
from dsv2quant.storage import hub
from dsv2quant.storage.safetensors import read_header

Tensors = dict[str, torch.Tensor]
CONFIG = tiny.GROUPED | {"moe_intermediate_size": 96}
LAYERS, EXPERTS = (1, 2), range(CONFIG["n_routed_experts"])


def stacked(tensors: Tensors, template: str, *names: str) -> Tensors:
    """Each MoE layer's experts as one tensor: `names` behind one another in every expert."""
    found = dict(tensors)
    for layer in LAYERS:
        members = [[found.pop(f"model.layers.{layer}.mlp.experts.{e}.{n}.weight") for n in names] for e in EXPERTS]
        found[f"model.layers.{layer}.mlp.{template}"] = torch.stack([torch.cat(parts) for parts in members])
    return found


def transformers_fused(tensors: Tensors) -> Tensors:
    tensors = stacked(tensors, "experts.gate_up_proj", "gate_proj", "up_proj")
    return stacked(tensors, "experts.down_proj", "down_proj")


def mlx(tensors: Tensors) -> Tensors:
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors = stacked(tensors, f"switch_mlp.{name}.weight", name)
    return tensors


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def base_layer(name: str) -> str:
    return name.replace("_proj.weight", "_proj.base_layer.weight")


SPELLINGS: dict[str, Callable[[Tensors], Tensors]] = {
    "transformers 5, fused": transformers_fused,
    "mlx": mlx,
    "wrapped": renamed("language_model.{}".format),
    "wrapped inside": renamed(lambda n: n.replace("model.", "model.language_model.", 1)),
    "deepseek-vl2": renamed("language.{}".format),
    "compiled": renamed("_orig_mod.{}".format),
    "bare": renamed(lambda n: n.removeprefix("model.")),
    "peft": renamed(lambda n: f"base_model.model.{base_layer(n)}"),
    "wrapped and fused": lambda t: renamed("language_model.{}".format)(transformers_fused(t)),
}


@pytest.fixture(scope="module")
def plain() -> Tensors:
    return tiny.random_weights(CONFIG)


@pytest.fixture(scope="module")
def published(plain, tmp_path_factory) -> Checkpoint:
    return open_checkpoint(tiny.write_checkpoint(tmp_path_factory.mktemp("published") / "model", CONFIG, plain))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_model(spelling, shards, plain, published, tmp_path):
    tensors = SPELLINGS[spelling](plain)
    assert tensors.keys() != plain.keys()
    checkpoint = open_checkpoint(tiny.write_checkpoint(tmp_path / "model", CONFIG, tensors, shards))
    assert sampled(checkpoint) == sampled(published)
    assert [w.spec for w in checkpoint.weights] == [w.spec for w in published.weights]
    for ours, theirs in zip(checkpoint.weights, published.weights, strict=True):
        assert checkpoint.read(ours.stored).tobytes() == published.read(theirs.stored).tobytes()


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of all that is written, save what names the source's stored bytes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("option", ["--fp8=channel", "--int4=pure"])
@pytest.mark.parametrize("spelling", ["transformers 5, fused", "mlx", "peft"])
def test_artifacts_have_the_same_bytes(spelling, option, plain, tmp_path, cli):
    options = [option, *(["--method", "rtn", "--group-size", "32"] if "int4" in option else []), "-q"]
    for name, tensors in (("a", plain), ("b", SPELLINGS[spelling](plain))):
        folder = tiny.write_checkpoint(tmp_path / name / "model", CONFIG, tensors)
        assert cli("convert", folder, *options, "-o", tmp_path / name / "out").code == 0
    ours = hashes(tmp_path / "b/out")
    assert len(ours) == 1
    assert ours == hashes(tmp_path / "a/out")


def test_gguf_files_have_the_same_bytes(tmp_path, cli):
    config = tiny.WORDY | {"q_lora_rank": 64}
    plain = tiny.random_weights(config)
    at = "model.layers.1.mlp"
    fused = {name: tensor for name, tensor in plain.items() if not name.startswith(f"{at}.experts.")}
    experts = [[plain[f"{at}.experts.{e}.{n}_proj.weight"] for n in ("gate", "up", "down")] for e in range(4)]
    fused[f"{at}.experts.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])
    fused[f"{at}.experts.down_proj"] = torch.stack([down for _, _, down in experts])
    for name, tensors in (("a", plain), ("b", fused)):
        folder = tiny.write_checkpoint(tmp_path / name / "model", config, tensors)
        ran = cli("convert", folder, "--gguf", "Q8_0", "-o", tmp_path / name / "out.gguf", "-q")
        assert ran.code == 0, ran.err
    assert (tmp_path / "a/out.gguf").read_bytes() == (tmp_path / "b/out.gguf").read_bytes()


def test_one_experts_bytes_are_read_alone(plain, tmp_path):
    checkpoint = open_checkpoint(tiny.write_checkpoint(tmp_path / "model", CONFIG, transformers_fused(plain)))
    weight = next(w for w in checkpoint.weights if w.spec.name.endswith("2.mlp.experts.5.up_proj.weight"))
    assert checkpoint.read(weight.stored).nbytes == 2 * weight.spec.size == weight.nbytes


def test_headers_from_the_hub_may_have_them_too(plain, published, tmp_path, monkeypatch):
    folder = tiny.write_checkpoint(tmp_path / "model", CONFIG, renamed("language.{}".format)(transformers_fused(plain)))
    headers = {"model.safetensors": read_header(folder / "model.safetensors")[0]}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "read_headers", lambda *_: (CONFIG, headers, "abc"))
    checkpoint = open_checkpoint("owner/name", headers_only=True)
    assert [w.spec for w in checkpoint.weights] == [w.spec for w in published.weights]
    assert [w.nbytes for w in checkpoint.weights] == [w.nbytes for w in published.weights]


def swap(tensors: Tensors) -> Tensors:
    tensors = transformers_fused(tensors)
    return {n: t.mT.contiguous() if n.endswith("gate_up_proj") else t for n, t in tensors.items()}


def extended(spelling: str, **extra: str) -> Callable[[Tensors], Tensors]:
    """A spelling and further tensors, each a copy of the embedding."""

    def change(tensors: Tensors) -> Tensors:
        more = {name: tensors["model.embed_tokens.weight"].clone() for name in extra.values()}
        return (SPELLINGS[spelling](tensors) if spelling else tensors) | more

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, r"gate_up_proj has shape \[8, 128, 192\], config.json implies \[8, 192, 128\] \(transpose each"),
        (
            lambda t: {n: v[:-1].clone() if n.endswith("experts.down_proj") else v for n, v in mlx_down(t).items()},
            r"down_proj has shape \[7, 128, 96\], config.json implies \[8, 128, 96\]",
        ),
        (
            lambda t: {n: v.int() if n.endswith("gate_up_proj") else v for n, v in transformers_fused(t).items()},
            "gate_up_proj has dtype I32 .*unquantized",
        ),
        (extended("wrapped", a="model.embed_tokens.weight"), "holds two models: .*language_model.model.embed_tokens"),
        (
            extended("bare", a="model.norm.weight"),
            "model.norm.weight and norm.weight are both model.norm.weight|norm.weight and model.norm.weight are both",
        ),
        (
            extended("bare", a="vision.patch.weight", b="vision.norm.weight"),
            "2 tensors that config.json does not imply: vision.norm.weight, vision.patch.weight",
        ),
        (extended("peft", a="base_model.model.lm_head.base_layer.weight"), "are both lm_head.weight"),
        (
            extended("peft", a="base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"),
            r"holds a LoRA adapter: .*lora_A.*merge_and_unload",
        ),
        (
            extended("wrapped", a="language_model.model.layers.3.eh_proj.weight", b="model.layers.3.enorm.weight"),
            r"multi-token prediction layer, 2 tensors: model.layers.3.eh_proj.weight, .*leave its tensors out\)",
        ),
        (
            renamed(lambda n: n.replace("model.layers", "decoder.blocks")),
            r"80 others are there under 'decoder.blocks': decoder.blocks.0",
        ),
    ],
)
def test_what_is_not_the_same_model_is_said(change, message, plain, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "model", CONFIG, change(plain))
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def mlx_down(tensors: Tensors) -> Tensors:
    return stacked(tensors, "experts.down_proj", "down_proj")
