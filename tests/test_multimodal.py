"""Models around a language model: that is quantized, the rest is copied byte for byte, the whole is a model again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from calibrated import killer
from multimodal_models import KINDS, Tensors, write
from safetensors import safe_open
from safetensors.torch import load_file

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.arch.multimodal import Names
from dsv2quant.checkpoint.checkpoint import HfCheckpoint
from dsv2quant.checkpoint.identity import sampled
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], tuple[Path, Tensors, Path]]:
    """By kind: (checkpoint, what is not its language model's, and that as a checkpoint of its own)."""

    @cache
    def made(kind: str) -> tuple[Path, Tensors, Path]:
        at = tmp_path_factory.mktemp(kind)
        inner = {key: value for key, value in KINDS[kind].inner.items() if key != "auto_map"}
        return *write(at / "model", kind), tiny.write_checkpoint(at / "alone/model", inner)

    return made


def opened(folder: Path) -> HfCheckpoint:
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, HfCheckpoint)
    return checkpoint


def stored(folder: Path) -> dict[str, tuple[str, bytes]]:
    """{name: (dtype and shape, bytes)} of all shards."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - safe_open is no dict
                tensor = shard.get_tensor(name)
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                found[name] = f"{tensor.dtype} {list(tensor.shape)}", data
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_language_model_is_read(kind, models):
    folder, others, alone = models(kind)
    checkpoint, plain = opened(folder), opened(alone)
    assert [w.spec for w in checkpoint.weights] == [w.spec for w in plain.weights]
    assert {t.name: t.shape for t in checkpoint.others} == {n: tuple(t.shape) for n, t in others.items()}
    assert sampled(checkpoint.language_model()) != sampled(checkpoint)
    assert checkpoint.names.stored("model.norm.weight") == KINDS[kind].rename("model.norm.weight")
    assert checkpoint.names.stored("lm_head.weight") == KINDS[kind].rename("lm_head.weight")
    assert checkpoint.language_model().names == Names()
    assert checkpoint.stop_ids(checkpoint.tokenizer()) == plain.stop_ids(plain.tokenizer())


CALIBRATION = ["--num-calibration-samples", "4", "--max-seq-length", "32"]
# Published language models' configurations; of the 7B's these are all keys: LlamaConfig's defaults count.
VL_7B = {"max_position_embeddings": 16384, "model_type": "llama", "num_hidden_layers": 30, "vocab_size": 102400}
VL_1_3B = VL_7B | {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_hidden_layers": 24}
VL2 = {
    "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": 129280, "hidden_size": 2560, "num_hidden_layers": 30,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 72, "n_shared_experts": 2,
    "num_experts_per_tok": 6, "first_k_dense_replace": 1, "num_attention_heads": 32, "q_lora_rank": None,
    "kv_lora_rank": 512, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.0,
}  # fmt: skip
OCR = VL2 | {
    "hidden_size": 1280, "num_hidden_layers": 12, "intermediate_size": 6848, "moe_intermediate_size": 896,
    "n_routed_experts": 64, "num_attention_heads": 10, "use_mla": False, "kv_lora_rank": None, "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0, "v_head_dim": 0, "scoring_func": "softmax", "topk_method": "greedy",
    "norm_topk_prob": False, "routed_scaling_factor": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("around", "inner", "billions"),
    [
        ("deepseek-vl", VL_7B, 6.91), ("deepseek-vl", VL_1_3B, 1.65), ("deepseek-vl2", VL2, 27.03),
        ("deepseek-ocr", OCR, 2.93),
    ],
)  # fmt: skip
def test_published_configurations_have_their_parameters(around, inner, billions):
    config = model_config(KINDS[around].around(inner), "config.json")
    assert sum(spec.size for spec in architecture(config).specs()) / 1e9 == pytest.approx(billions, abs=0.006)


INT4 = ["--int4", "--method", "rtn", "--group-size", "32"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("deepseek-vl", ["--int4=pure", *INT4[1:], "--format", "gptq"]),
        ("deepseek-vl2", ["--fp8=channel"]),
        ("deepseek-vl", ["--int4=pure", "--group-size", "32", "--kv-scales", *CALIBRATION]),
        ("deepseek-ocr", ["--int4=pure", *INT4[1:]]),
        ("kimi-vl", ["--fp8=block", "--target", "transformers"]),
    ],
)
def test_weights_are_those_of_the_language_model_and_the_rest_is_as_it_was(kind, options, models, fox, tmp_path, cli):
    folder, others, alone = models(kind)
    options = [*options, *(["--calibration", fox] if CALIBRATION[0] in options else [])]
    ran = cli("convert", folder, *options, "--max-shard-size", "400KB", "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert cli("convert", alone, *options, "-o", tmp_path / "plain", "-q").code == 0
    ours, plain = stored(tmp_path / "out"), stored(tmp_path / "plain")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours.keys()
    assert {name: ours.pop(name) for name in others} == {name: stored(folder)[name] for name in others}
    assert ours == {KINDS[kind].rename(name): content for name, content in plain.items()}
    assert json.loads(ran.out)["bits_per_weight"] == pytest.approx(bits_of(tmp_path / "plain"), rel=0.02)


def bits_of(folder: Path) -> float:
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return 8 * size / sum(weight.spec.size for weight in opened(folder).weights)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_is_read_again(kind, models, tmp_path, cli):
    folder, others, alone = models(kind)
    assert cli("convert", folder, "--fp8=channel", "-o", tmp_path / "out", "-q").code == 0
    assert cli("convert", alone, "--fp8=channel", "-o", tmp_path / "plain", "-q").code == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    inner = config["text_config" if kind == "kimi-vl" else "language_config"]
    assert not {"auto_map", "quantization_config"} & inner.keys()
    assert "auto_map" not in config
    assert inner["torch_dtype"] == config["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out/preprocessor_config.json").exists()
    verified = cli("verify", tmp_path / "out", "--source", folder)
    assert verified.code == 0, verified.err
    score = ["--ctx", "32", "--limit", "2", "--json"]
    scored = [cli("eval-ppl", tmp_path / name, *score) for name in ("out", "plain")]
    assert [ran.code for ran in scored] == [0, 0], scored[0].err
    values = [json.loads(ran.out)["perplexity"] for ran in scored]
    assert values[0] == values[1]
    inspected = json.loads(cli("inspect", tmp_path / "out", "--json").out)
    assert inspected["others"] == len(others)
    assert inspected["other_bytes"] == sum(tensor.nbytes for tensor in others.values())
    generated = cli("generate", tmp_path / "out", "--prompt", "The", "--max-new-tokens", "2")
    assert generated.code == 0, generated.err


@pytest.mark.parametrize("kind", ["deepseek-vl", "deepseek-vl2"])
def test_the_language_model_alone_is_an_artifact_of_its_own(kind, models, tmp_path, cli):
    folder, _, alone = models(kind)
    asked = ["--fp8=channel", "--language-only", "-q"]
    ran = cli("convert", folder, *asked, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert cli("convert", alone, "--fp8=channel", "-o", tmp_path / "plain", "-q").code == 0
    assert stored(tmp_path / "out") == stored(tmp_path / "plain")
    ours, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "plain"))
    assert ours == plain | {"architectures": ours["architectures"]}
    assert ours["architectures"] == [opened(alone).config.architecture]
    assert not (tmp_path / "out/preprocessor_config.json").exists()
    assert "--language-only" in (tmp_path / "out/README.md").read_text()
    assert cli("verify", tmp_path / "out", "--source", folder).code == 0


def test_a_gguf_file_has_the_language_model_alone(models, tmp_path, cli):
    folder, _, alone = models("deepseek-vl2")
    for name, model in (("out", folder), ("plain", alone)):
        ran = cli("convert", model, "--gguf", "Q8_0", "-o", tmp_path / f"{name}.gguf", "-q")
        assert ran.code == 0, ran.err
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


# The names that vLLM (kimi_vl.py, deepseek_vl2.py), SGLang (deepseek_ocr.py) and transformers (modeling_deepseek_vl.py)
# give the same module.
MODULES = ["model.{}", "language.model.{}", "language_model.model.{}", "model.language_model.{}"]


@pytest.mark.parametrize("recipe", [["--fp8=channel"], INT4])
def test_patterns_find_modules_under_each_consumers_names(recipe, models, tmp_path, cli):
    folder, others, _ = models("deepseek-vl2")
    config = json.loads(cli("plan", folder, *recipe, "--json").out)["quantization_config"]
    targets = [t for group in config["config_groups"].values() for t in group["targets"]]
    assert all(target.startswith("re:") for target in targets)

    def matches(texts: list[str], module: str) -> list[str]:
        return [t for t in texts if (re.match(t[3:], module) if t.startswith("re:") else t == module)]

    for form in MODULES:
        for body in ("layers.1.self_attn.o_proj", "layers.0.mlp.down_proj", "layers.1.mlp.experts.3.up_proj"):
            assert len(matches(targets, form.format(body))) == 1
            assert not matches(config["ignore"], form.format(body))
        assert len(matches(config["ignore"], form.format("layers.1.mlp.gate"))) == 1
        assert not matches(targets, form.format("layers.1.mlp.gate"))
    for head in ("lm_head", "language.lm_head", "language_model.lm_head"):
        assert len(matches(config["ignore"], head)) == 1
    seeing = [name.removesuffix(".weight") for name, tensor in others.items() if tensor.ndim == 2]
    assert seeing
    for module in (name for name in seeing if not name.endswith("position_ids")):
        assert len(matches(config["ignore"], module)) == 1
        assert not matches(targets, module)


def test_plain_lists_have_the_checkpoints_own_names(tmp_path, cli):
    folder, _ = write(tmp_path / "model", "deepseek-ocr")
    config = json.loads(cli("plan", folder, "--fp8=block", "--json").out)["quantization_config"]
    assert {"model.layers.1.mlp.gate", "lm_head", "model.vision_model.blocks.0.attn.qkv"} <= {*config["ignored_layers"]}


def test_what_vllm_would_misread_is_refused(tmp_path, cli):
    folder, _ = write(tmp_path / "model", "deepseek-vl2")
    ran = cli("plan", folder, "--fp8=block", "--target", "vllm")
    assert (ran.code, "vllm would not find" in ran.err) == (3, True)
    assert cli("plan", folder, "--fp8=channel", "--target", "vllm").code == 0


def test_a_killed_conversion_ends_with_the_same_bytes(tmp_path):
    folder, _ = write(tmp_path / "model", "deepseek-vl2")
    command = ["convert", str(folder), "--fp8=channel", "--max-shard-size", "100KB", "-q"]

    def contents(out: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(out.iterdir())}

    with killer() as run:
        run(0, *command, "-o", str(tmp_path / "first"))  # counts changes of imports, too
        changes, code = run(0, *command, "-o", str(tmp_path / "whole"))
        assert code == 0
        # Each in a folder of its own: how much of it is kept, and so the changes that are left, depends on the threads.
        for n in (changes // 2, changes - 12):
            out = tmp_path / f"out-{n}"
            assert run(n, *command, "-o", str(out)) == [-9]
            assert not (out / "config.json").exists()
            assert run(0, *command, "-o", str(out))[1] == 0
            assert contents(out) == contents(tmp_path / "whole")


def test_large_tensors_are_copied_in_pieces(tmp_path, cli, monkeypatch):
    monkeypatch.setattr("dsv2quant.conversion.shards.CHUNK", 1000)
    folder, others = write(tmp_path / "model", "deepseek-ocr")
    assert cli("convert", folder, "--fp8=channel", "-o", tmp_path / "out", "-q").code == 0
    assert {n: stored(tmp_path / "out")[n] for n in others} == {n: stored(folder)[n] for n in others}


def test_a_changed_copy_is_found(tmp_path, cli):
    folder, _ = write(tmp_path / "model", "deepseek-vl2")
    assert cli("convert", folder, "--fp8=channel", "-o", tmp_path / "out", "-q").code == 0
    other = shutil.copytree(folder, tmp_path / "other")
    path = other / "model.safetensors"
    tensors = load_file(path)
    tensors["vision.norm.weight"][3] += 1
    tiny.write_checkpoint(other, json.loads((other / "config.json").read_text()), tensors)
    ran = cli("verify", tmp_path / "out", "--source", other)
    assert (ran.code, "vision.norm.weight is not as it is" in ran.err) == (3, True)
    assert sampled(opened(other)) != sampled(opened(folder))
    again = cli("convert", other, "--fp8=channel", "-o", tmp_path / "out", "-q")
    assert (again.code, "another source" in again.err) == (3, True)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"gen_head.weight": torch.zeros(2, 2)}, "config.json does not imply: gen_head.weight"),
        ({"vision.blocks.0.attn.qkv_proj.qweight": torch.zeros(2, 2, dtype=torch.int32)}, "are quantized: vision"),
        ({"vision.a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, "are quantized: vision.a.weight"),
    ],
)
def test_what_is_not_known_is_refused(extra, message, tmp_path):
    folder, _ = write(tmp_path / "model", "deepseek-vl2", **extra)
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder)


def test_a_language_model_has_nothing_to_leave_out(lite, tmp_path, cli):
    ran = cli("plan", lite, "--fp8", "--language-only")
    assert (ran.code, "is a language model alone" in ran.err) == (2, True)
    assert cli("plan", lite, "--gguf", "Q8_0", "--language-only").code == 2


def test_without_the_language_models_configuration(tmp_path, cli):
    folder, _ = write(tmp_path / "model", "deepseek-vl2")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"language_config": 3}))
    ran = cli("inspect", folder)
    assert (ran.code, "language_config, the language model's configuration, is not an object" in ran.err) == (3, True)
