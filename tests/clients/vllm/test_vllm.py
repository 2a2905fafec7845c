"""Artifacts in vLLM, by the driver that `verify --engine vllm` runs: what its loaders make of them.

vLLM runs on the CPU, in float32, with torch_kernels.py in the place of kernels that need a GPU; the runtime beside it
leaves activations unquantized too. `make test-vllm` installs it and runs this; `make test` does not come here.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import install
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from vllm_models import CASES, MODELS, Case

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.engines.answers import Answer, Request
from dsv2quant.engines.process import ask
from dsv2quant.evaluation.divergence import log_probabilities, run
from dsv2quant.model.completion import open_model
from dsv2quant.model.load import LoadOptions
from dsv2quant.progress import no_progress
from dsv2quant.text.tokenizer import Windows

# Both multiply in float32 and add up at most 1,024 products, in other orders: units in the last place (6e-8 of 1) of
# some tens of sums in a row. 3e-6 to 7e-6 nats were seen, whatever the scheme; faults are at the end of this file.
NEAR = 5e-5  # nats, of any token's log-probability
WINDOWS, CTX = 2, 40


@pytest.fixture(scope="session", autouse=True)
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where vLLM's processes find torch_kernels: as an installed plugin."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "torch_kernels-0.dist-info").mkdir()
    (folder / "torch_kernels-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-kernels\n")
    entry = "[vllm.general_plugins]\ntorch_kernels = torch_kernels:register\n"
    (folder / "torch_kernels-0.dist-info" / "entry_points.txt").write_text(entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(Path(__file__).parent)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two processes have one machine
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{model: checkpoint}."""
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny.write_checkpoint(folder / name, config) for name, config in MODELS.items()}


@pytest.fixture
def artifact(cli, models, tmp_path):
    """Make what a case asks for."""

    def make(case: Case) -> Path:
        if not case.options:
            return models[case.model]
        out = tmp_path / "artifact"
        rounded = ["--method", "rtn"] * case.options.startswith(("--int4", "--w4a8"))
        words = [*case.options.split(), *rounded, "--target", "vllm", "--tp", case.tp]
        ran = cli("convert", models[case.model], *words, "-q", "-o", out)
        assert ran.code == 0, ran.err
        return out

    return make


def answer_of(folder: Path, tp: int = 1, decode: int = 0, **asked: object) -> Answer:
    """What vLLM answers of random tokens, in float32."""
    vocabulary = open_checkpoint(folder).config.vocab_size
    ids = np.random.default_rng(0).integers(2, vocabulary, (WINDOWS, CTX))
    request = Request(Windows(ids, 0), vocabulary, dtype="float32", tp=tp, decode=decode, **asked)
    return ask("vllm", str(install.PYTHON), folder, request, no_progress)


def furthest(answer: Answer, folder: Path) -> float:
    """The largest difference of any token's log-probability, in nats, between an answer and the runtime on `folder`."""
    windows = answer.windows
    passed = run(open_model(open_checkpoint(folder), LoadOptions(weight_only=True)), windows.ids, [slice(0, WINDOWS)])
    found = []
    for window in range(WINDOWS):
        ours = torch.cat([*log_probabilities(passed, window, windows.first)])
        found.append((ours - torch.from_numpy(answer.scores.logprobs[window].astype(np.float64))).abs().max())
    return float(max(found))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_vllm_computes_what_the_artifact_says(case: Case, artifact) -> None:
    folder = artifact(case)
    answer = answer_of(folder, case.tp, case.decode)
    for part in case.path:
        assert any(part in f"{kernel} " for kernel in answer.report.kernels), answer.report.kernels
    assert furthest(answer, folder) < NEAR


def swapped(name: str) -> str:
    """Experts 0 and 1 of the first layer that has any, in each other's place."""
    other = {"experts.0.": "experts.1.", "experts.1.": "experts.0."}
    part = next((p for p in other if name.startswith("model.layers.1.mlp.") and p in name and "down_proj" in name), "")
    return name.replace(part, other[part]) if part else name


def nudged(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """One scale of one row of a shared expert, larger by an eighth."""
    if name != "model.layers.1.mlp.shared_experts.up_proj.weight_scale":
        return tensor
    tensor = tensor.clone()
    tensor[0, 0] *= 1.125
    return tensor


@pytest.mark.parametrize("fault", ["experts swapped", "a scale"])
def test_a_wrong_artifact_is_seen(fault: str, artifact, tmp_path) -> None:
    folder = artifact(Case("lite", "--int4=pure", ()))
    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    for shard in wrong.glob("*.safetensors"):
        tensors = load_file(shard)
        if fault == "a scale":
            made = {name: nudged(name, tensor) for name, tensor in tensors.items()}
        else:
            made = {swapped(name): tensor for name, tensor in tensors.items()}
        save_file(made, shard, {"format": "pt"})
    assert furthest(answer_of(wrong), folder) > 10 * NEAR
