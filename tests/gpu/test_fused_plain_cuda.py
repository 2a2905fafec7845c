"""The kernels' runtime with plain attention on a CUDA device: random models of Llama's and deepseek-moe's kind, with
their heads' width, against the torch backend. Needs no transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.evaluation.divergence import Pass, batches_of, compare, run
from dsv2quant.model.cache import KV_DTYPES
from dsv2quant.model.completion import open_model
from dsv2quant.model.load import LoadOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WIDE_HEADS = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024}
CONFIGS = {
    "llama": tiny.LLAMA | WIDE_HEADS,  # 4 heads of 128 share 2
    "deepseek-moe": tiny.DEEPSEEK_MOE | WIDE_HEADS | {"moe_intermediate_size": 256},
}
ARTIFACTS = {
    "bf16": None,
    "fp8-block": ["--fp8=block"],
    "fp8-channel": ["--fp8=channel"],
    "int4-pure-g32": ["--int4=pure", "--method", "rtn", "--group-size", "32"],
    "gptq": ["--int4=pure", "--method", "rtn", "--format", "gptq", "--group-size", "64"],
}
TORCH, WIDE = LoadOptions(torch.bfloat16, "cuda"), LoadOptions(torch.float32, "cuda")
KERNELS = LoadOptions(torch.bfloat16, "cuda", backend="kernels")
IDS = np.random.default_rng(0).integers(5, 4096, (4, 96))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: tiny.write_checkpoint(folder / name, config) for name, config in CONFIGS.items()}


def passed(folder: Path, options: LoadOptions, decode_path: bool) -> Pass:
    return run(open_model(open_checkpoint(folder), options), IDS, batches_of(len(IDS), 4), decode_path=decode_path)


def kld(a: Pass, b: Pass) -> float:
    """Of a from b, nats a token."""
    return float(compare(a, b, IDS, 1).kld.mean())


@pytest.mark.parametrize("artifact", ARTIFACTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_evaluation_agrees_with_the_torch_backend(name, artifact, sources, tmp_path, cli):
    """As with latent attention (test_fused_model_cuda.py): both err by BF16's roundings of the exact arithmetic."""
    folder = sources[name]
    if ARTIFACTS[artifact] is not None:
        folder = tmp_path / "out"
        ran = cli("convert", sources[name], *ARTIFACTS[artifact], "-o", folder, "-q")
        assert ran.code == 0, ran.err
    for decode_path in (False, True):
        exact, by_torch, by_kernels = (passed(folder, o, decode_path) for o in (WIDE, TORCH, KERNELS))
        floor = kld(passed(sources[name], TORCH, decode_path), passed(sources[name], WIDE, decode_path))
        errors = kld(by_torch, exact), kld(by_kernels, exact)
        print(f"{name} {artifact}, decoded {decode_path}: floor {floor:.6f}, from exact {errors}")
        assert errors[1] < 1.5 * errors[0] + floor


@pytest.mark.parametrize("kind", ["bf16", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_graph_is_the_step(name, kind, sources):
    """A recorded step gives the same twice, and what prefill gives there, up to what the cache rounds."""
    options = LoadOptions(torch.bfloat16, "cuda", kv_cache=KV_DTYPES[kind], backend="kernels")
    model = open_model(open_checkpoint(sources[name]), options)
    prompt = torch.from_numpy(IDS[:3, :17])
    found = []
    for _ in range(2):
        caches = model.caches(3, 40)
        rows = [model.next_logits(prompt, caches).clone()]
        decode = model.decoder(caches)
        for _ in range(23):
            rows.append(decode(rows[-1].argmax(-1)).clone())
        found.append(torch.stack(rows))
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="the cache holds 40 tokens"):
        decode(torch.zeros(3, dtype=torch.long))
    x = model.ends.embed(torch.cat([prompt.cuda(), found[0][:-1].argmax(-1).T], 1))
    with torch.inference_mode():
        for layer in model.layers():
            x, _ = layer(x, model.rope(0, 40))
    expected = model.ends.logits(x)[:, 16:].transpose(0, 1)
    distance = float((found[0] - expected).float().norm() / expected.float().norm())
    print(f"{name} {kind}: {distance:.4f}")
    assert distance < (0.03 if kind == "bf16" else 0.3), distance
