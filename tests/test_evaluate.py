"""Evaluation: windows, protocols, divergence, gates, and the object that --json prints."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny
import torch

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.evaluation.divergence import (
    batches_of,
    bootstrap,
    compare,
    negative_log_likelihoods,
    perplexity,
    run,
    summarize,
)
from dsv2quant.evaluation.results import Estimate
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.text.text import python_topics
from dsv2quant.text.tokenizer import Tokenizer, cut

# A tiny model that dsv2-mini's tokenizer fits.
WIDE = tiny.LITE | {"vocab_size": 4096, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("wide") / "wide", WIDE)


@pytest.fixture(scope="module")
def quantized(wide, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "out"
    convert(make_plan(open_checkpoint(wide), recipe.builtin("fp8-channel")), out, command="")
    return out


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 4096, (5, 20))


def test_default_windows_begin_with_bos_and_score_every_token():
    windows = cut(np.arange(100, 130), 8, 1, "default", "text")
    assert windows.ids.tolist() == [[1, *range(100 + 7 * i, 107 + 7 * i)] for i in range(4)]
    assert (windows.first, windows.scored) == (0, 7)


def test_llama_cpp_windows_replace_their_first_token_and_score_the_second_half():
    windows = cut(np.arange(100, 130), 8, 1, "llama.cpp", "text")
    stream = [1, *range(100, 130)]
    assert windows.ids.tolist() == [[1, *stream[8 * i + 1 : 8 * i + 8]] for i in range(3)]
    assert (windows.first, windows.scored) == (4, 3)  # llama-perplexity scores ctx − 1 − ctx/2: 255 of 512


def test_the_tokenizer_adds_and_parses_no_special_token():
    from tokenizers import Tokenizer as Backend

    tokenizer = Tokenizer.open(tiny.MINI)
    text = "def f(x):\n    return x  # naïve\n"
    plain = Backend.from_file(str(tiny.MINI / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text).tolist() == plain
    assert tokenizer.bos_id == 0
    spelled = tokenizer.encode("<｜end▁of▁sentence｜>")
    assert len(spelled) > 1
    assert 1 not in spelled


def test_topics_are_the_text_that_published_figures_used():
    text = python_topics()
    assert text.source == "pydoc_data.topics"
    assert "\n\n" in text.content
    assert len(text.sha256) == 64


def test_nll_and_kld_equal_float64_from_the_logits(wide, quantized, ids):
    models = [Model(open_checkpoint(folder)) for folder in (wide, quantized)]
    reference, passed = (run(model, ids, batches_of(5, 2)) for model in models)
    p, q = (model.forward(torch.from_numpy(ids)).double().log_softmax(-1)[:, 3:-1] for model in models)
    targets = torch.from_numpy(ids)[:, 4:, None]
    got = compare(passed, reference, ids, 3)
    np.testing.assert_allclose(got.nll, -q.gather(2, targets)[..., 0], rtol=1e-5)
    np.testing.assert_allclose(got.reference_nll, -p.gather(2, targets)[..., 0], rtol=1e-5)
    np.testing.assert_allclose(got.kld, (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-7)
    np.testing.assert_array_equal(got.same_top1, q.argmax(-1) == p.argmax(-1))
    np.testing.assert_array_equal(got.nll, negative_log_likelihoods(passed, ids, 3))
    assert got.kld.mean() > 1e-4
    summary = summarize(got)
    assert summary.kld.mean == pytest.approx(got.kld.mean())
    assert summary.ln_ratio.value == pytest.approx((got.nll - got.reference_nll).mean())
    stretches = summary.by_position
    covered = [token for s in stretches for token in range(s.first, s.last + 1)]
    assert (covered, len(stretches)) == ([*range(got.kld.shape[1])], min(16, got.kld.shape[1]))
    assert stretches[-1].kld.value == pytest.approx(got.kld[:, stretches[-1].first :].mean())
    assert 0 < stretches[-1].kld.stderr < stretches[-1].kld.value


def test_a_model_does_not_diverge_from_itself(wide, ids):
    passed = run(Model(open_checkpoint(wide)), ids, batches_of(5, 5))
    summary = summarize(compare(passed, passed, ids, 0))
    assert summary.kld.max == 0
    assert summary.ln_ratio == Estimate(0, 0)
    assert summary.top1_agreement.value == summary.router_agreement.value == 1


def test_router_agreement_counts_common_experts(wide, ids):
    passed = run(Model(open_checkpoint(wide)), ids, batches_of(5, 5))
    other = run(Model(open_checkpoint(wide)), ids, batches_of(5, 5))
    chosen = other.routes[1]
    assert chosen is not None
    other.routes[1] = torch.cat([torch.full_like(chosen[..., :1], 99), chosen[..., 1:]], -1)  # one of three differs
    agreement = compare(other, passed, ids, 0).router
    assert list(agreement) == [1]
    assert agreement[1].mean() == pytest.approx(2 / 3)


def test_streaming_and_batching_change_nothing_of_note(wide, ids):
    checkpoint = open_checkpoint(wide)
    resident = run(Model(checkpoint), ids, batches_of(5, 2))
    streamed = run(Model(checkpoint, stream=True), ids, batches_of(5, 2))
    assert torch.equal(resident.hidden, streamed.hidden)
    other = run(Model(checkpoint), ids, batches_of(5, 5))
    assert compare(other, resident, ids, 0).kld.mean() < 1e-9


def test_bootstrap_is_the_standard_error_of_a_mean():
    windows = np.random.default_rng(1).normal(5, 2, 400)
    # 2000 resamples know it to about 1/√4000 = 1.6%.
    assert bootstrap(windows) == pytest.approx(windows.std() / math.sqrt(400), rel=0.08)
    assert bootstrap(windows) == bootstrap(windows)
    value = perplexity(windows[:, None].repeat(3, 1) / 10)
    assert value.value == pytest.approx(math.exp(windows.mean() / 10))


def test_weight_only_and_served_activations_differ(quantized, ids):
    checkpoint = open_checkpoint(quantized)
    served = run(Model(checkpoint), ids, batches_of(5, 5))
    weight_only = run(Model(checkpoint, LoadOptions(weight_only=True)), ids, batches_of(5, 5))
    assert not torch.allclose(served.hidden, weight_only.hidden, rtol=1e-3)


def test_absorbed_decode_of_an_artifact_equals_its_prefill(quantized, ids):
    model = Model(open_checkpoint(quantized), LoadOptions(weight_only=True))
    caches = model.caches(5, 20)
    tokens = torch.from_numpy(ids)
    steps = torch.cat([model.forward(tokens[:, i : i + 1], caches, absorbed=True) for i in range(20)], 1)
    prefill = model.forward(tokens)
    assert (steps - prefill).norm() / prefill.norm() < 1e-5


EVAL = ("--ctx", "32", "--limit", "3", "-q")


def test_json_is_one_object_with_everything_it_rests_on(wide, quantized, cli):
    ran = cli("eval-ppl", quantized, "--reference", wide, "--json", *EVAL)
    assert ran.err == ""
    result = json.loads(ran.out)
    assert set(result) >= {
        "schema", "model", "perplexity", "reference", "delta", "kld", "top1_agreement", "router_agreement", "tokens",
        "windows", "ctx", "protocol", "text", "dtype", "weight_only", "device", "backend", "seconds", "noise_floor",
    }  # fmt: skip
    assert set(result["kld"]) == {"mean", "stderr", "median", "p99", "p999", "max"}
    assert set(result["delta"]) == {"ln_ratio", "stderr"}
    assert set(result["perplexity"]) == set(result["reference"]["perplexity"]) == {"value", "stderr"}
    assert set(result["text"]) == {"source", "sha256"}
    assert (result["tokens"], result["windows"], result["ctx"]) == (93, 3, 32)
    assert (result["dtype"], result["device"], result["backend"]) == ("float32", "cpu", "torch")
    assert set(result["noise_floor"]) == {"windows", "kld_other_batch", "kld_bfloat16"}
    assert result["noise_floor"]["kld_other_batch"] < 1e-9 < result["noise_floor"]["kld_bfloat16"]
    alone = json.loads(
        cli("eval-ppl", quantized, "--json", "--protocol", "llama.cpp", "--dtype", "bfloat16", *EVAL).out
    )
    assert "reference" not in alone
    assert "kld" not in alone
    assert (alone["tokens"], alone["protocol"], alone["dtype"]) == (45, "llama.cpp", "bfloat16")


def test_text_report_and_a_text_of_ones_own(wide, quantized, cli, tmp_path):
    (tmp_path / "mine.txt").write_text("The quick brown fox. " * 100)
    ran = cli("eval-ppl", quantized, "--reference", wide, "--text", tmp_path / "mine.txt", "--weight-only", *EVAL)
    assert ran.code == 0
    for words in (
        "KLD, nats",
        "same top-1",
        "same routed experts",
        "noise floor",
        "of mine.txt",
        "activations unquantized",
    ):
        assert words in ran.out


def test_gates_fail_with_exit_code_4(wide, quantized, cli):
    common = ("eval-ppl", quantized, "--reference", wide, *EVAL)
    passed = cli(*common, "--max-kld", "10", "--max-ppl-increase", "50")
    assert passed.code == 0
    failed = cli(*common, "--max-kld", "0.00001", "--json")
    assert failed.code == 4
    assert "more than --max-kld 1e-05" in failed.err
    assert json.loads(failed.out)["kld"]["mean"] > 1e-5
    failed = cli(*common, "--max-ppl-increase", "-99")
    assert failed.code == 4
    assert "more than --max-ppl-increase -99%" in failed.err


def test_a_context_beyond_training_warns(wide, cli):
    ran = cli("eval-ppl", wide, "--ctx", "64", "--limit", "1")
    assert ran.code == 0
    assert "warning: --ctx 64 is beyond the trained context, 32" in ran.err


def test_a_reference_with_another_vocabulary_is_refused(wide, lite, cli):
    ran = cli("eval-ppl", wide, "--reference", lite, *EVAL)
    assert ran.code == 3
    assert "has a vocabulary of 160" in ran.err


def test_a_classifier_has_no_perplexity(tmp_path, cli):
    from dsv2quant.arch.deepseek_v2 import SEQUENCE_CLASSIFICATION

    folder = tiny.write_checkpoint(tmp_path / "m", WIDE | {"architectures": [SEQUENCE_CLASSIFICATION]})
    ran = cli("eval-ppl", folder, *EVAL)
    assert ran.code == 3
    assert "perplexity needs a language model" in ran.err


def test_a_model_gone_to_nan_prints_valid_json_and_fails_its_gate(wide, tmp_path, cli):
    weights = tiny.random_weights(WIDE)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 3e38)
    weights["lm_head.weight"] *= 1e30
    broken = tiny.write_checkpoint(tmp_path / "broken", WIDE, weights)
    ran = cli("eval-ppl", broken, "--reference", wide, "--json", "--max-kld", "1", *EVAL)
    assert ran.code == 4
    result = json.loads(ran.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result["perplexity"]["value"] is None


def test_wikitext2_joins_the_test_split(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from dsv2quant.text.text import from_dataset

    path = tmp_path / "test.parquet"
    parquet.write_table(pa.table({"text": ["", " = Heading = \n", "Words .\n"]}), path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kwargs: str(path))
    assert from_dataset("wikitext2").content == "\n\n = Heading = \n\n\nWords .\n"
