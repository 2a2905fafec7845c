"""The kernels' runtime on a CUDA device against the torch backend, on dsv2-mini's artifacts. Needs no transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.evaluation.divergence import Pass, batches_of, compare, run
from dsv2quant.model.cache import KV_DTYPES
from dsv2quant.model.completion import Sampling, generate, open_model
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.text.text import python_topics
from dsv2quant.text.tokenizer import cut

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ARTIFACTS = {
    "bf16": None,
    "fp8-block": ["--fp8=block"],
    "fp8-channel": ["--fp8=channel"],
    "fp8-tensor": ["--fp8=tensor"],
    "int4-mixed": ["--int4=mixed", "--method", "rtn"],
    "int4-pure-g32": ["--int4=pure", "--method", "rtn", "--group-size", "32"],
    "int3-mixed": ["--int3=mixed", "--method", "rtn"],
    "int2-experts-g128": ["--int2=experts", "--method", "rtn", "--group-size", "128"],
    "gptq": ["--int4=pure", "--method", "rtn", "--format", "gptq", "--group-size", "64"],
    "awq": ["--int4=pure", "--method", "rtn", "--format", "awq", "--group-size", "64"],
    "q8_0": ["--gguf", "Q8_0"],
    "q4_k_m": ["--gguf", "Q4_K_M"],
    "q6_k": ["--gguf", "Q6_K"],
}
WINDOWS, CTX = 4, 256


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    checkpoint = open_checkpoint(tiny.MINI)
    tokenizer = checkpoint.tokenizer()
    windows = cut(tokenizer.encode(python_topics().content), CTX, tokenizer.bos_id, "default", "topics", add_bos=True)
    return windows.ids[:WINDOWS]


@pytest.fixture(params=ARTIFACTS)
def artifact(request, tmp_path, cli) -> Path:
    made = ARTIFACTS[request.param]
    if made is None:
        return Path(tiny.MINI)
    if "--gguf" in made:
        pytest.importorskip("gguf")
    out = tmp_path / ("out.gguf" if "--gguf" in made else "out")
    ran = cli("convert", tiny.MINI, *made, "-o", out, "-q")
    assert ran.code == 0, ran.err
    return out


def passed(folder: Path | str, options: LoadOptions, ids: np.ndarray, decode_path: bool) -> Pass:
    return run(open_model(open_checkpoint(folder), options), ids, batches_of(len(ids), 4), decode_path=decode_path)


TORCH, WIDE = LoadOptions(torch.bfloat16, "cuda"), LoadOptions(torch.float32, "cuda")
KERNELS = LoadOptions(torch.bfloat16, "cuda", backend="kernels")


def kld(a: Pass, b: Pass, ids: np.ndarray) -> float:
    """Of a from b, nats a token."""
    return float(compare(a, b, ids, 1).kld.mean())


@pytest.mark.parametrize("decode_path", [False, True], ids=["prefill", "decode"])
def test_evaluation_agrees_with_the_torch_backend(artifact, decode_path, ids, request):
    """Against the exact arithmetic of the same artifact both backends err by BF16's roundings, and by the activations
    that these push over the edge between two codes: in other places, by as much. Their distances from the unquantized
    model then differ by less than the noise floor that `eval-ppl` states, which is its distance from itself in BF16."""
    exact, by_torch, by_kernels = (passed(artifact, o, ids, decode_path) for o in (WIDE, TORCH, KERNELS))
    source, rounded = (passed(tiny.MINI, o, ids, decode_path) for o in (WIDE, TORCH))
    floor = kld(rounded, source, ids)
    errors = kld(by_torch, exact, ids), kld(by_kernels, exact, ids)
    distances = kld(by_torch, source, ids), kld(by_kernels, source, ids)
    print(f"{request.node.callspec.id}: floor {floor:.6f}, from exact {errors}, from the source {distances}")
    assert errors[1] < 1.5 * errors[0] + floor
    assert abs(distances[1] - distances[0]) < floor + errors[0]


def test_greedy_tokens_are_the_torch_backends(artifact, ids, request):
    """But for ties: where a token differs, its logit is as near the largest as BF16's rounding moves these logits."""
    checkpoint = open_checkpoint(artifact)
    models = [open_model(checkpoint, options) for options in (TORCH, KERNELS)]
    for prompt in ids[:, :48].tolist():
        want, got = (list(generate(m, prompt, stop={1}, max_new_tokens=32, sampling=Sampling())) for m in models)
        first = next((i for i, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), None)
        if first is None:
            assert got == want
            continue
        tokens = torch.tensor([[*prompt, *want[:first]]])
        exact, rounded = (Model(checkpoint, options).forward(tokens)[0, -1].float() for options in (WIDE, TORCH))
        tie = 2 * float((exact - rounded).abs().max())
        apart = float(exact.max() - exact[got[first]])
        print(f"{request.node.callspec.id}: token {first} differs, {apart:.4f} apart, a tie is {tie:.4f}")
        assert apart <= tie


@pytest.mark.parametrize("kind", ["bf16", "fp8_e4m3", "fp8_e5m2"])
def test_the_graph_is_the_step(kind):
    """A recorded step gives what its launches give one by one, at every position, and writes the same cache."""
    options = LoadOptions(torch.bfloat16, "cuda", kv_cache=KV_DTYPES[kind], backend="kernels")
    model = open_model(open_checkpoint(tiny.MINI), options)
    prompt = torch.randint(5, 4000, (3, 17))
    found = []
    for _ in range(2):
        caches = model.caches(3, 40)
        logits = model.next_logits(prompt, caches)
        decode = model.decoder(caches)
        rows = [logits.clone()]
        for _ in range(23):
            rows.append(decode(rows[-1].argmax(-1)).clone())
        found.append((torch.stack(rows), [cache.store.view(torch.uint8).clone() for cache in caches]))
    assert torch.equal(found[0][0], found[1][0])
    with pytest.raises(ValueError, match="the cache holds 40 tokens"):
        decode(torch.zeros(3, dtype=torch.long))
    x = model.ends.embed(torch.cat([prompt.cuda(), found[0][0][:-1].argmax(-1).T], 1))
    with torch.inference_mode():
        for layer in model.layers():
            x, _ = layer(x, model.rope(0, 40))
    expected = model.ends.logits(x)[:, 16:].transpose(0, 1)
    distance = float((found[0][0] - expected).float().norm() / expected.float().norm())
    assert distance < (0.02 if kind == "bf16" else 0.2), distance
