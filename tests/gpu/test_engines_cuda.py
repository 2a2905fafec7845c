"""Faults in what vLLM and SGLang read, on a GPU: `verify --engine` finds each, and nothing where there is none.

    VLLM_PYTHON=/opt/vllm/bin/python SGLANG_PYTHON=/opt/sglang/bin/python pytest -n 8 tests/gpu/test_engines_cuda.py

Each is skipped without the Python that has it. Their kernels take no heads but published ones, so the models are those
of benchmarks/engine_models.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import faults
import pytest
import torch
from engine_stand_in import program

from dsv2quant.api import convert

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from engine_models import make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PYTHONS = {name: os.environ.get(f"{name.upper()}_PYTHON") for name in ("vllm", "sglang")}


@pytest.fixture(params=PYTHONS)
def engine(request) -> str:
    if PYTHONS[request.param] is None:
        pytest.skip(f"needs {request.param.upper()}_PYTHON")
    return request.param


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make("v2", tmp_path_factory.mktemp("source") / "v2")


@pytest.fixture(scope="module")
def int4(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("int4") / "out"
    convert(source, out, scheme="int4-experts", method="rtn", targets=["vllm", "sglang"])
    return out


@pytest.fixture
def verify(cli, engine, tmp_path):
    """Verify an artifact in the engine, which reads `model` in its place."""

    def verify(artifact: Path, model: Path, *args: object):
        python = program(tmp_path / "python", model=model, python=PYTHONS[engine])
        return cli(
            "verify", artifact, "--engine", engine, "--engine-python", python, "--device", "cuda",
            "--quiet", *args,
        )  # fmt: skip

    return verify


READ = (faults.nothing, faults.scales_permuted, faults.zero_point_dropped, faults.expert_swapped)


@pytest.mark.parametrize("fault", READ, ids=lambda f: f.__name__)
def test_weights_that_are_misread_are_seen(fault, int4, verify, tmp_path):
    ran = verify(int4, faults.copy(int4, tmp_path / "bad", fault))
    print(ran.err)
    assert (ran.code, "mean KLD from the runtime is" in ran.err) == (
        (0, False) if fault is faults.nothing else (4, True)
    )


def test_a_tokenizer_without_bos_is_seen(int4, verify, tmp_path):
    ran = verify(int4, faults.without_bos(int4, tmp_path / "bad"), "--generate")
    assert (ran.code, "takes the prompt for tokens" in ran.err) == (4, True), ran.err


@pytest.mark.skipif(PYTHONS["vllm"] is None, reason="needs VLLM_PYTHON")
@pytest.mark.parametrize("engine", ["vllm"], indirect=True)
def test_cache_scales_are_seen(verify, tmp_path_factory, tmp_path):
    """Half of what they should be, they clip. Of a latent cache engines have none, and SGLang of no INT4: Llama's in
    vLLM, whose activations stay as they are, so that little else is between engine and runtime."""
    source = make("llama", tmp_path_factory.mktemp("source") / "llama")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {i} quick brown foxes jump over lazy dogs.\n" for i in range(200)))
    artifact, asked = tmp_path / "out", {"method": "rtn", "kv_scales": True, "targets": ["vllm"]}
    convert(source, artifact, scheme="int4-pure", calibration=text, samples=8, length=256, **asked)
    ran = verify(artifact, artifact, "--kv-cache", "fp8_e4m3")
    assert ran.code == 0, ran.err
    bad = faults.copy(artifact, tmp_path / "bad", faults.cache_scales_halved)
    ran = verify(artifact, bad, "--kv-cache", "fp8_e4m3")
    print(ran.err)
    assert (ran.code, "mean KLD from the runtime is" in ran.err) == (4, True)
