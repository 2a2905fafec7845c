"""What must hold on a CUDA device: the CPU's bytes, and its logits. Skipped without one; needs no transformers."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.formats.codec import NonFiniteError
from dsv2quant.formats.schemes import CODECS
from dsv2quant.kernels.reference import quantize_activation
from dsv2quant.model.cache import KV_DTYPES, KVCache
from dsv2quant.model.completion import Sampling, generate
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GRIDS = ("block", "channel", "tensor")


def weights(shape: tuple[int, int], dtype: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * np.exp2(rng.integers(-20, 4, shape))).astype(np.float32)
    x[0] = 0
    return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else x


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("shape", [(2, 3), (128, 128), (576, 256), (1408, 704), (10944, 128)])
def test_encoding_gives_the_cpus_bytes(grid, dtype, shape):
    weight = weights(shape, dtype)
    on_cpu, on_gpu = (CODECS[f"fp8-{grid}"].encode([weight], device)[0] for device in ("cpu", "cuda"))
    for suffix, array in on_cpu.items():
        np.testing.assert_array_equal(on_gpu[suffix], array)


@pytest.mark.parametrize("grid", GRIDS)
def test_tiny_and_infinite_weights(grid):
    smallest = np.full((2, 3), 1e-45, np.float32)  # subnormal: a GPU that flushed it to zero would differ
    on_cpu, on_gpu = (CODECS[f"fp8-{grid}"].encode([smallest], device)[0] for device in ("cpu", "cuda"))
    assert all(on_gpu[suffix].tobytes() == array.tobytes() for suffix, array in on_cpu.items())
    bad = weights((200, 150), "f32")
    bad[130, 7] = np.inf
    with pytest.raises(NonFiniteError) as error:
        CODECS[f"fp8-{grid}"].encode([bad], "cuda")
    assert error.value.index == (130, 7)


@pytest.mark.parametrize("grid", GRIDS)
def test_conversion_on_the_gpu_writes_the_same_artifact(grid, awkward, tmp_path):
    for device in ("cpu", "cuda"):
        made = make_plan(open_checkpoint(awkward), recipe.builtin(f"fp8-{grid}"), max_shard_size=10**7)
        convert(made, tmp_path / device, command="", device=device)
    on_cpu, on_gpu = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("cpu", "cuda"))
    assert on_cpu == on_gpu


@pytest.mark.parametrize("granularity", ["token", "group128"])
def test_activations_quantize_to_the_cpus_bytes(granularity):
    x = torch.randn(64, 700) * torch.exp2(torch.randint(-8, 8, (64, 1)))
    codes, scales = quantize_activation(x, granularity)
    gpu_codes, gpu_scales = quantize_activation(x.cuda(), granularity)
    assert torch.equal(gpu_scales.cpu(), scales)
    assert torch.equal(gpu_codes.cpu().view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_gives_the_cpus_weights(dtype, awkward, tmp_path):
    convert(make_plan(open_checkpoint(awkward), recipe.builtin("fp8-tensor")), tmp_path / "out", command="")
    checkpoint = open_checkpoint(tmp_path / "out")
    for weight in checkpoint.weights:
        assert torch.equal(checkpoint.decode(weight, dtype, "cuda").cpu(), checkpoint.decode(weight, dtype))


@pytest.mark.parametrize("config", [tiny.LITE, tiny.V2], ids=["lite", "v2"])
def test_logits_equal_the_cpus(config, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "m", config, tiny.random_weights(config, dtype=torch.float32))
    tokens = torch.randint(0, 160, (2, 40))
    want = Model(open_checkpoint(folder)).forward(tokens).double()
    model = Model(open_checkpoint(folder), LoadOptions(device="cuda"))
    caches = model.caches(2, 40)
    steps = [model.forward(tokens[:, :8], caches)]
    steps += [model.forward(tokens[:, i : i + 1], caches, absorbed=True) for i in range(8, 40)]
    for got in (model.forward(tokens), torch.cat(steps, 1)):
        assert (got.cpu().double() - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize("kind", KV_DTYPES)
def test_the_cache_holds_the_cpus_bytes(kind):
    latent, k_pe = (10.0 ** torch.randint(-5, 6, (2, 3, n)) * torch.randn(2, 3, n) for n in (32, 8))
    config = open_checkpoint(tiny.MINI).config
    config = dataclasses.replace(config, kv_lora_rank=32, qk_rope_head_dim=8)
    found = []
    for device in ("cpu", "cuda"):
        scale = torch.tensor([0.0123], device=device)  # not a power of two: a reciprocal would round otherwise
        cache = KVCache(config, 2, 3, KV_DTYPES[kind], torch.device(device), scale)
        found.append(cache.append(latent.to(device), k_pe.to(device), as_stored=True))
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert torch.equal(on_gpu.cpu(), on_cpu)


def test_greedy_tokens_are_the_cpus_and_sampling_runs():
    models = [Model(open_checkpoint(tiny.MINI), LoadOptions(device=device)) for device in ("cpu", "cuda")]
    greedy = {"stop": {1}, "max_new_tokens": 24, "sampling": Sampling()}
    want, got = (list(generate(model, [0, 700, 800], **greedy)) for model in models)
    first = next((i for i, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), None)
    if first is not None:  # only at a tie: logits of up to 20, and 1e-5 of their norm apart
        logits = models[0].forward(torch.tensor([[0, 700, 800, *want[:first]]]))[0, -1]
        assert logits[want[first]] - logits[got[first]] < 20 * 1e-5
    for kind in KV_DTYPES.values():
        model = Model(open_checkpoint(tiny.MINI), LoadOptions(torch.bfloat16, "cuda", kv_cache=kind))
        drawn = generate(model, [0, 700, 800], stop=(), max_new_tokens=8, sampling=Sampling(1.0, 0.9))
        assert len(list(drawn)) == 8


@pytest.mark.parametrize("grid", GRIDS)
def test_evaluation_agrees_with_the_cpu_within_the_noise_floor(grid, tmp_path, cli):
    out = tmp_path / "out"
    assert cli("convert", tiny.MINI, f"--fp8={grid}", "-o", out, "-q", "--device", "cuda").code == 0
    common = ("eval-ppl", out, "--reference", tiny.MINI, "--ctx", "512", "--limit", "12", "--json", "-q")
    results = {}
    for name, extra in {
        "cpu": (),
        "float32": ("--device", "cuda", "--dtype", "float32"),
        "bfloat16": ("--device", "cuda"),
        "streamed": ("--device", "cuda", "--stream"),
    }.items():
        ran = cli(*common, *extra)
        assert ran.code == 0, ran.err
        results[name] = json.loads(ran.out)
    cpu = results["cpu"]["kld"]["mean"]
    # Codes near a tie round either way after a last-place difference: under a fiftieth of the divergence itself.
    assert results["float32"]["kld"]["mean"] == pytest.approx(cpu, rel=0.02)
    assert results["bfloat16"]["dtype"] == "bfloat16"
    assert results["streamed"]["kld"] == results["bfloat16"]["kld"]
    # BF16 arithmetic adds its own divergence to both models.
    assert abs(results["bfloat16"]["kld"]["mean"] - cpu) < 2 * results["cpu"]["noise_floor"]["kld_bfloat16"]
    print(grid, {name: (r["kld"]["mean"], r["perplexity"]["value"], r["seconds"]) for name, r in results.items()})


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_kept_reference_gives_the_numbers_of_the_live_one(backend, tmp_path, cli):
    out, kept = tmp_path / "out", tmp_path / "kept"
    assert cli("convert", tiny.MINI, "--fp8", "-o", out, "-q", "--device", "cuda").code == 0
    common = ("--ctx", "512", "--limit", "12", "--json", "-q", "--device", "cuda", "--backend", backend)
    assert cli("eval-ppl", tiny.MINI, "--save-reference", kept, *common).code == 0
    live, found = (json.loads(cli("eval-ppl", out, "--reference", given, *common).out) for given in (tiny.MINI, kept))
    same = ("perplexity", "kld", "top1_agreement", "router_agreement", "noise_floor")
    assert {key: found[key] for key in same} == {key: live[key] for key in same}
    assert kept.stat().st_size < 2 * 256 * 12 * 512 * 1.1 + 2 * 4096 * 256 + 8192  # states in BF16
