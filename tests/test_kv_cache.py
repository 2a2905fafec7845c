"""The latent cache: FP8 codes against a table of all 256, what prefill and decode see of them, and evaluation by it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import static
import tiny
import torch

from dsv2quant.arch.families import model_config
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError
from dsv2quant.evaluation.divergence import batches_of, negative_log_likelihoods, run
from dsv2quant.model.cache import KV_DTYPES, KVCache
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model

CONFIG = model_config(tiny.LITE, "config.json")
FP8 = {"fp8_e4m3": (4, 3), "fp8_e5m2": (5, 2)}  # bits of exponent and mantissa


def values_of(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """The finite values of an 8-bit format's non-negative codes, in order: e5m2 is IEEE's, e4m3 has NaN alone."""
    bias, values = 2 ** (exponent_bits - 1) - 1, []
    for code in range(0x7C if exponent_bits == 5 else 0x7F):
        exponent, fraction = code >> mantissa_bits, (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
        values.append((fraction if exponent == 0 else 1 + fraction) * 2.0 ** (max(exponent, 1) - bias))
    return np.array(values)


def through_fp8(x: np.ndarray, kind: str, scale: np.float32) -> np.ndarray:
    """x / scale in float32, the nearest value (of two the one with an even code), times the scale in float32."""
    table = values_of(*FP8[kind])
    wanted = np.abs((x.astype(np.float32) / scale).astype(np.float32)).astype(np.float64)
    above = np.searchsorted(table, wanted).clip(1, len(table) - 1)
    low, high = wanted - table[above - 1], table[above] - wanted
    code = np.where((high < low) | ((high == low) & (above % 2 == 0)), above, above - 1)
    return (np.copysign(table[code], x).astype(np.float32) * scale).astype(np.float32)


def cache(kind: str, scale: float | None = None, capacity: int = 8) -> KVCache:
    given = None if scale is None else torch.tensor([scale])
    return KVCache(CONFIG, 2, capacity, KV_DTYPES[kind], torch.device("cpu"), given)


def some(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and rotated keys of many magnitudes: subnormal codes, ties, and what saturates."""
    generator = torch.Generator().manual_seed(seed)
    widths = (CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim)
    parts = [torch.randn(2, tokens, width, generator=generator) for width in widths]
    latent, k_pe = (x * 10.0 ** torch.randint(-5, 6, x.shape, generator=generator) for x in parts)
    latent[0, 0, :6] = torch.tensor([0.0, -0.0, 17.0, 19.0, 1.125, -1e9])  # 17 and 19 are ties in e4m3
    return latent, k_pe


@pytest.mark.parametrize("scale", [None, 0.0123, 3.0])
@pytest.mark.parametrize("kind", FP8)
def test_fp8_is_read_back_as_the_table_says(kind, scale):
    given, factor = some(5), np.float32(1 if scale is None else scale)
    got = cache(kind, scale).append(*given, as_stored=True)
    for stored, x in zip(got, given, strict=True):
        assert stored.dtype == torch.float32
        np.testing.assert_array_equal(stored.numpy(), through_fp8(x.numpy(), kind, factor))
        assert not torch.equal(stored, x)


def test_bf16_is_rounded_and_takes_no_scale():
    given = some(5)
    for stored, x in zip(cache("bf16", 3.0).append(*given, as_stored=True), given, strict=True):
        assert torch.equal(stored, x.bfloat16().float())


def test_bf16_activations_are_scaled_in_float32():
    latent, k_pe = (x.bfloat16() for x in some(5))
    got, _ = cache("fp8_e4m3", 0.3).append(latent, k_pe, as_stored=True)
    want = through_fp8(latent.float().numpy(), "fp8_e4m3", np.float32(0.3))
    assert torch.equal(got, torch.from_numpy(want).bfloat16())


@pytest.mark.parametrize("kind", ["bf16", *FP8])
def test_prefill_sees_new_tokens_as_computed_and_earlier_ones_as_stored(kind):
    first, second = some(3), some(2, seed=1)
    stored = cache(kind)
    for got, x in zip(stored.append(*first, as_stored=False), first, strict=True):
        assert torch.equal(got, x)
    rounded = cache(kind).append(*first, as_stored=True)
    for got, earlier, x in zip(stored.append(*second, as_stored=False), rounded, second, strict=True):
        assert torch.equal(got, torch.cat([earlier, x], 1))
    everything = [torch.cat(pair, 1) for pair in zip(first, second, strict=True)]
    again = cache(kind).append(*everything, as_stored=True)
    last = stored.append(*(x[:, :0] for x in second), as_stored=True)
    assert all(torch.equal(a, b) for a, b in zip(last, again, strict=True))


@pytest.fixture(scope="module")
def scaled(lite, tmp_path_factory):
    """An artifact with KV-cache scales, of layer 0 half of the others'."""
    folder = tmp_path_factory.mktemp("scaled") / "out"
    static.write(lite, folder, "fp8-static", kv=2.0)
    set_scale(folder, 1 / 448)
    return folder


def set_scale(folder, value: float) -> None:
    """Overwrite layer 0's scale of keys."""
    (stored,) = open_checkpoint(folder).kv_scales[0]
    path, start = open_checkpoint(folder).data[stored.file]
    with path.open("r+b") as file:
        file.seek(start + stored.begin)
        file.write(np.float32(value).tobytes())


@pytest.mark.parametrize("kind", FP8)
def test_each_layers_cache_has_the_artifacts_scale(kind, scaled):
    """As a model whose latents and keys are rounded before a float32 cache takes them."""
    tokens = torch.randint(0, 160, (2, 12), generator=torch.Generator().manual_seed(0))

    def decoded(model: Model, caches: list[KVCache]) -> torch.Tensor:
        return torch.cat([model.forward(tokens[:, i : i + 1], caches, absorbed=True) for i in range(12)], 1)

    plain, quantized = (
        Model(open_checkpoint(scaled)),
        Model(open_checkpoint(scaled), LoadOptions(kv_cache=KV_DTYPES[kind])),
    )
    rounding = plain.caches(2, 12)
    for index, cache in enumerate(rounding):
        scale = np.float32(1 / 448 if index == 0 else np.float32(2) / np.float32(448))

        def append(*new, as_stored, original=cache.append, scale=scale):
            rounded = (torch.from_numpy(through_fp8(part.numpy(), kind, scale)) for part in new)
            return original(*rounded, as_stored=as_stored)

        cache.append = append
    got = decoded(quantized, quantized.caches(2, 12))
    assert torch.equal(got, decoded(plain, rounding))
    assert not torch.equal(got, decoded(plain, plain.caches(2, 12)))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_nothing_can_be_divided_by(value, lite, tmp_path):
    static.write(lite, tmp_path / "out", "fp8-static", kv=2.0)
    set_scale(tmp_path / "out", value)
    with pytest.raises(InputError, match=r"model.layers.0.self_attn.k_scale is .*\(the checkpoint is damaged"):
        Model(open_checkpoint(tmp_path / "out")).caches(1, 4)


# --- evaluation ---


@pytest.mark.parametrize("stream", [False, True])
def test_the_decode_path_scores_as_prefill_does(stream, wordy, one_thread):
    ids = np.random.default_rng(0).integers(0, 4096, (5, 24))
    model = Model(open_checkpoint(wordy), stream=stream)
    prefill = run(model, ids, batches_of(5, 2))
    decode = run(model, ids, batches_of(5, 2), decode_path=True)
    # Float32 sums in another order: see test_runtime's TOLERANCE.
    assert (decode.hidden - prefill.hidden).norm() / prefill.hidden.norm() < 1e-5
    assert not torch.equal(decode.hidden, prefill.hidden)
    for ours, theirs in zip(decode.routes, prefill.routes, strict=True):
        assert (ours is None) is (theirs is None)
        assert ours is None or torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
    # Logits are of order 1 and each moves by 1e-5 of that at most, their log-sum by no more.
    nll = [negative_log_likelihoods(passed, ids, 0) for passed in (decode, prefill)]
    np.testing.assert_allclose(*nll, atol=1e-4)


EVAL = ("--ctx", "24", "--limit", "3", "--json", "-q")


def test_eval_ppl_by_the_decode_path(wordy, cli):
    prefill = json.loads(cli("eval-ppl", wordy, *EVAL).out)
    decode = json.loads(cli("eval-ppl", wordy, "--decode-path", *EVAL).out)
    assert set(decode) == set(prefill)
    assert (prefill["decode_path"], prefill["kv_cache"]) == (False, None)
    assert (decode["decode_path"], decode["kv_cache"]) == (True, "float32")
    assert decode["perplexity"]["value"] == pytest.approx(prefill["perplexity"]["value"], rel=1e-4)
    assert decode["tokens"] == prefill["tokens"] == 69


def test_the_reference_keeps_its_cache_unquantized(wordy, cli):
    plain = json.loads(cli("eval-ppl", wordy, "--decode-path", *EVAL).out)
    common = ("eval-ppl", wordy, "--reference", wordy, "--decode-path", *EVAL)
    result = json.loads(cli(*common, "--kv-cache", "fp8_e4m3").out)
    assert result["kv_cache"] == "fp8_e4m3"
    assert result["reference"]["perplexity"] == plain["perplexity"]
    coarse = json.loads(cli(*common, "--kv-cache", "fp8_e5m2").out)
    assert result["noise_floor"]["kld_other_batch"] < 1e-6 < result["kld"]["mean"] < coarse["kld"]["mean"]
    assert "token by token with a KV cache in bf16" in cli(*common[:-2], "-q", "--kv-cache", "bf16").out


def test_a_kv_cache_needs_the_decode_path(wordy, cli):
    ran = cli("eval-ppl", wordy, "--kv-cache", "bf16", *EVAL)
    assert ran.code == 2
    assert "--kv-cache needs --decode-path" in ran.err
