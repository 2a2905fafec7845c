"""Which backend computes, and what the kernels' refuses when it loads a model: one line, and what to do instead."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import static
import tiny
import torch
from safetensors.torch import load_file, save_file

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError, UsageError
from dsv2quant.model import load
from dsv2quant.model.completion import open_model
from dsv2quant.model.load import LoadOptions, choose_backend
from dsv2quant.model.runtime import Model

pytestmark = pytest.mark.usefixtures("one_thread")

BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "weight_only", "backend"),
    [
        ("auto", "cuda", BF16, False, "kernels"), ("auto", "cuda:1", BF16, False, "kernels"),
        ("auto", "cuda", BF16, True, "torch"), ("auto", "cuda", F32, False, "torch"),
        ("auto", "cuda", torch.float16, False, "torch"), ("auto", "cpu", BF16, False, "torch"),
        ("torch", "cuda", BF16, False, "torch"), ("torch", "cpu", F32, True, "torch"),
        ("kernels", "cuda", BF16, False, "kernels"),
    ],
)  # fmt: skip
def test_a_backend_is_chosen(asked, device, dtype, weight_only, backend, monkeypatch):
    monkeypatch.setattr(load, "runs_kernels", lambda name: name != "cpu")
    assert choose_backend(asked, device, dtype, weight_only) == backend


def test_only_hopper_and_what_came_after_it_has_the_units(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, has in (((8, 9), False), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert load.runs_kernels("cuda:1") == has
        assert choose_backend("auto", "cuda", BF16) == ("kernels" if has else "torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not load.runs_kernels("cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "weight_only"), [("cpu", BF16, False), ("cuda", F32, False), ("cuda", BF16, True)]
)
def test_kernels_that_can_not_be_had(device, dtype, weight_only, monkeypatch):
    monkeypatch.setattr(load, "runs_kernels", lambda name: name != "cpu")
    said = (
        "--backend kernels can't be had "
        "(they need a Hopper GPU as --device, bfloat16, and neither --weight-only nor --as: take --backend torch)"
    )
    with pytest.raises(UsageError, match=f"^{re.escape(said)}$"):
        choose_backend("kernels", device, dtype, weight_only)


def test_the_commands_say_so(sources, cli, tmp_path):
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 20)
    scored = ("eval-ppl", sources["wordy"], "--text", text, "--ctx", "16", "--limit", "1")
    for command in (scored, ("generate", sources["wordy"], "--prompt", "The", "--max-new-tokens", "1")):
        ran = cli(*command, "--backend", "kernels")
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("error: --backend kernels can't be had")
        assert ran.err.count("\n") == 1
    for backend in ("auto", "torch"):
        ran = cli(*scored, "--backend", backend, "--json", "-q")
        assert (ran.code, json.loads(ran.out)["backend"]) == (0, "torch")


CONFIGS = {
    "grouped": tiny.GROUPED, "narrow": tiny.V2, "odd experts": tiny.LITE | {"moe_intermediate_size": 40},
    "thin experts": tiny.LITE | {"moe_intermediate_size": 44}, "wordy": tiny.WORDY,
    "blocks": tiny.GROUPED_V2 | {"hidden_size": 256, "vocab_size": 4096},
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: tiny.write_checkpoint(folder / name, config) for name, config in CONFIGS.items()}


@pytest.fixture
def artifact(sources, tmp_path, cli) -> Callable[..., Path]:
    def convert(source: str, *options: str, name: str = "out") -> Path:
        ran = cli("convert", sources[source], *options, "-o", tmp_path / name, "-q")
        assert ran.code == 0, ran.err
        return tmp_path / name

    return convert


def change(folder: Path, suffix: str, changed: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Every tensor of this ending, of which there must be one, in place; None takes it away."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    found = {name: changed(tensor) for name, tensor in tensors.items() if name.endswith(suffix)}
    assert found
    kept = {name: tensor.contiguous() for name, tensor in (tensors | found).items() if tensor is not None}
    save_file(kept, file, {"format": "pt"})


def refused(folder: Path, error: type[Exception], message: str) -> None:
    """What is said when the model is loaded, in one line that names it."""
    with pytest.raises(error) as raised:
        open_model(open_checkpoint(folder), LoadOptions(backend="kernels"))
    assert str(raised.value) == f"{folder.name}: {message}"


TAKE_TORCH = ": no kernel takes that (take --backend torch)"
AGAIN = " (the checkpoint is damaged: get it again)"
INT4 = ("--method", "rtn", "--group-size", "32", "--format", "gptq")


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
def test_fp8_columns_without_a_kernel(scheme, artifact):
    folder = artifact("narrow", f"--fp8={scheme}", "--target", "transformers")  # vLLM has no ragged blocks
    what = "model.layers.0.self_attn.q_b_proj is FP8 of 40 columns, no multiple of 16"
    refused(folder, UsageError, what + TAKE_TORCH)


def test_expert_widths_without_a_kernel(artifact, sources):
    folder = artifact("odd experts", "--fp8=channel")
    what = "model.layers.1.mlp.experts is fp8-channel of widths 64 and 40, no multiples of 16"
    refused(folder, UsageError, what + TAKE_TORCH)
    what = "model.layers.1.mlp.experts is bf16 of widths 64 and 44, no multiples of 8"
    refused(sources["thin experts"], UsageError, what + TAKE_TORCH)
    open_model(open_checkpoint(sources["odd experts"]), LoadOptions(backend="kernels"))


@pytest.mark.parametrize("role", ["gate_proj", "up_proj", "down_proj"])
def test_experts_of_two_schemes(role, artifact):
    folder = artifact("grouped", "--fp8=channel")
    change(folder, f"experts.7.{role}.weight", lambda codes: codes.bfloat16())
    change(folder, f"experts.7.{role}.weight_scale", lambda scales: None)
    refused(folder, UsageError, f"model.layers.1.mlp.experts is of bf16, fp8-channel{TAKE_TORCH}")


def test_experts_of_blocks_beside_plain_ones(artifact):
    pytest.importorskip("gguf")
    folder = artifact("blocks", "--gguf", "Q8_0", "--tensor-type", "ffn_down_exps=bf16", name="out.gguf")
    refused(folder, UsageError, f"model.layers.1.mlp.experts is of bf16, q8_0{TAKE_TORCH}")


def test_experts_ordered_by_activation(artifact):
    folder = artifact("grouped", "--int4=pure", *INT4)
    change(folder, "experts.3.up_proj.g_idx", lambda group: group.flip(0))
    what = "model.layers.1.mlp.experts.3: up has columns ordered by activation: not supported for experts"
    refused(folder, UsageError, what + TAKE_TORCH)


def test_groups_of_unequal_size(artifact):
    """Which the other backend takes."""
    folder = artifact("grouped", "--int4=pure", *INT4)
    change(folder, "self_attn.o_proj.g_idx", lambda group: group.clamp(max=0))
    what = "model.layers.0.self_attn.o_proj: g_idx does not name each of 2 groups for 32 of 64 columns"
    refused(folder, UsageError, what + TAKE_TORCH)
    Model(open_checkpoint(folder))


def test_groups_that_are_not_there(artifact):
    """The same words as the other backend's."""
    folder = artifact("grouped", "--int4=pure", *INT4)
    change(folder, "layers.0.mlp.down_proj.g_idx", lambda group: group + 1)
    message = f"model.layers.0.mlp.down_proj: g_idx names groups beyond its 3{AGAIN}"
    refused(folder, InputError, message)
    with pytest.raises(InputError, match=re.escape(message)):
        Model(open_checkpoint(folder))


def test_scales_that_a_stack_does_not_hold(artifact):
    folder = artifact("grouped", "--int4=pure", "--method", "rtn", "--group-size", "32")
    change(folder, "experts.2.gate_proj.weight_scale", lambda scales: scales.float() * (1 + 2.0**-20))
    what = "model.layers.1.mlp.experts.2: gate has scales that torch.bfloat16 does not hold"
    refused(folder, UsageError, what + TAKE_TORCH)


def test_gates_and_ups_with_input_scales_of_their_own(sources, tmp_path):
    static.write(sources["grouped"], tmp_path / "out", "fp8-static")
    change(tmp_path / "out", "experts.1.up_proj.input_scale", lambda scale: scale * 2)
    what = "model.layers.1.mlp.experts has other input scales in up_proj than in gate_proj"
    refused(tmp_path / "out", UsageError, what + TAKE_TORCH)
