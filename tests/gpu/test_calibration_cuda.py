"""Calibration on a CUDA device against the CPU's. Skipped without one."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file
from test_gptq import TIES, differ_only_at_ties
from test_statistics import calibration

from dsv2quant.calib.calibrate import calibrate
from dsv2quant.calib.calibration import Calibration
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.evaluation import divergence as perplexity
from dsv2quant.evaluation.divergence import compare
from dsv2quant.kernels.reference import quantize_activation
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("config", [tiny.LITE, tiny.V2], ids=["lite", "v2"])
def test_statistics_equal_the_cpus(config, tmp_path):
    checkpoint = open_checkpoint(tiny.write_checkpoint(tmp_path / "model", config))
    for device in ("cpu", "cuda"):
        calibrate(checkpoint, tmp_path / device, calibration(), device=device)
    on_cpu, on_gpu = load_file(tmp_path / "cpu"), load_file(tmp_path / "cuda")
    assert set(on_cpu) == set(on_gpu)
    # float32 sums in another order: 1e-6, which layers may amplify a little.
    assert all(np.allclose(on_gpu[name], x, rtol=1e-4, atol=1e-6 * x.max()) for name, x in on_cpu.items())


@pytest.mark.parametrize("method", ["mse", "awq"])
def test_from_the_same_statistics_both_devices_write_the_same_artifact(method, tmp_path):
    checkpoint = open_checkpoint(tiny.write_checkpoint(tmp_path / "model", tiny.GROUPED))
    statistics = calibrate(checkpoint, tmp_path / "stats", calibration())
    plan = make_plan(checkpoint, recipe.builtin("int4-pure", method=method, group_size=32), for_targets=["vllm"])
    for device in ("cpu", "cuda"):
        convert(plan, tmp_path / device, command="", statistics=statistics, device=device)
    on_cpu, on_gpu = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("cpu", "cuda"))
    assert on_cpu == on_gpu


def test_static_activations_quantize_to_the_cpus_bytes():
    x = torch.randn(64, 700) * torch.exp2(torch.randint(-8, 8, (64, 1)))
    codes, _ = quantize_activation(x, "static", torch.tensor([0.01]))
    gpu_codes, _ = quantize_activation(x.cuda(), "static", torch.tensor([0.01]).cuda())
    assert torch.equal(gpu_codes.cpu().view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("layout", [None, "gptq", "awq"])
def test_int4_decodes_to_the_cpus_weights(layout, tmp_path):
    asked = recipe.builtin("int4-pure", method="rtn", group_size=64, layout=layout)
    convert(make_plan(open_checkpoint(tiny.MINI), asked, for_targets=["vllm"]), tmp_path / "out", command="")
    checkpoint = open_checkpoint(tmp_path / "out")
    for weight in checkpoint.weights:
        on_gpu = checkpoint.decode(weight, torch.bfloat16, "cuda").cpu()
        assert torch.equal(on_gpu, checkpoint.decode(weight, torch.bfloat16)), weight.spec.name


@pytest.mark.parametrize(("columns", "group"), TIES)
def test_gptqs_codes_differ_only_at_ties(columns, group):
    differ_only_at_ties(columns, group, "cuda")


def test_gptq_diverges_as_on_the_cpu(tmp_path):
    """Codes near a tie fall either way, and what follows with them. On a CPU the order of these windows alone moves the
    divergence by 5% (standard deviation of seven orders), so that two draws differ by up to 20%: three times √2 · 5%.
    Plain rounding is at 2.7 times this divergence."""
    checkpoint = open_checkpoint(tiny.MINI)
    ids = np.random.default_rng(0).integers(2, 4096, (24, 64))
    plan = make_plan(checkpoint, recipe.builtin("int4-pure", group_size=64), for_targets=["vllm"])
    reference = perplexity.run(Model(checkpoint, LoadOptions(device="cuda")), ids, [slice(0, len(ids))])
    found = {}
    for device in ("cpu", "cuda"):
        convert(plan, tmp_path / device, command="", calibration=Calibration(ids, "x", "", 0, []), device=device)
        model = Model(open_checkpoint(tmp_path / device), LoadOptions(device="cuda", weight_only=True))
        found[device] = compare(perplexity.run(model, ids, [slice(0, len(ids))]), reference, ids, 0).kld.mean()
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.2)
