"""`dsv2quant bench model` without a device: the bytes of a step, and what is made of a runtime's times."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from engine_stand_in import program

from dsv2quant.arch.families import model_config
from dsv2quant.bench import beside
from dsv2quant.bench import model as measure
from dsv2quant.bench.device import Limits
from dsv2quant.bench.model import Subject, bytes_per_step
from dsv2quant.model.runtime import Model


def exact(v2: bool, expert: float, other: float, kv_b: float, batch: int, context: int) -> float:
    """GB of a step, term by term from the published shapes, for weights of so many bytes each."""
    hidden, layers, experts, width, dense = (5120, 60, 160, 1536, 12288) if v2 else (2048, 27, 64, 1408, 10944)
    heads = 128 if v2 else 16
    query = 1536 * hidden + 1536 * heads * 192 if v2 else hidden * heads * 192
    attention = (query + hidden * 576 + heads * 128 * hidden) * other + 512 * heads * 256 * kv_b
    active = experts * (1 - (1 - 6 / experts) ** batch)
    moe = (active * expert + 2 * other) * 3 * hidden * width + experts * hidden * 2
    ends = 102400 * hidden * 2
    return (
        layers * attention + (layers - 1) * moe + 3 * hidden * dense * other + ends + batch * context * layers * 1152
    ) / 1e9


INT4 = 0.5 + 2 / 128


@pytest.mark.parametrize(
    ("name", "scheme", "batch", "context", "sizes", "about"),
    [
        ("v2", "int4-mixed", 1, 4096, (INT4, 1, 2), 18.7),
        ("v2", "int4-mixed", 16, 4096, (INT4, 1, 2), 71.2),
        ("v2-lite", "int4-mixed", 1, 0, (INT4, 1, 2), 2.07),
        ("v2-lite", "int4-mixed", 64, 4096, (INT4, 1, 2), 16.9),
        ("v2-lite", "fp8-block", 8, 128, (1, 1, 1), 9.2),
        ("v2-lite", "bf16", 1, 0, (2, 2, 2), 4.9),
    ],
)
def test_the_bytes_of_a_step(name, scheme, batch, context, sizes, about):
    """Scales of FP8 and norms add up to less than a thousandth."""
    subject = measure.random(name, scheme)
    found = bytes_per_step(subject.config, subject.nbytes, batch, context) / 1e9
    want = exact(name == "v2", *sizes, batch, context)
    assert want <= found <= want * 1.001
    assert found == pytest.approx(about, rel=0.01)


def test_v2_with_int4_experts_and_fp8_elsewhere_reads_17_gb():
    subject = measure.random("v2", "int4-mixed")
    halved = lambda spec: subject.nbytes(spec) // (2 if spec.role == "kv_b_proj" else 1)  # noqa: E731
    assert bytes_per_step(subject.config, halved, 1, 0) / 1e9 == pytest.approx(17.4, abs=0.05)
    assert bytes_per_step(subject.config, halved, 1, 4096) / 1e9 == pytest.approx(17.7, abs=0.05)


LLM_67B = tiny.LLAMA | {
    "vocab_size": 102400, "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 95,
    "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 4096,
}  # fmt: skip


def test_the_bytes_of_a_step_of_plain_attention():
    """DeepSeek-LLM 67B: 67.4 B parameters, of which a step reads one row of the embedding; 389,120 bytes a token."""
    config = model_config(LLM_67B, "config.json")
    two = lambda spec: 2 * spec.size  # noqa: E731
    assert bytes_per_step(config, two, 1, 0) == pytest.approx(2 * (67.42e9 - 102400 * 8192), rel=1e-3)
    assert bytes_per_step(config, two, 3, 1000) - bytes_per_step(config, two, 3, 0) == 3 * 1000 * 95 * 2 * 8 * 128 * 2


def test_layers_for_prediction_are_not_read():
    alone = model_config(tiny.V3 | {"num_nextn_predict_layers": 0}, "config.json")
    assert bytes_per_step(model_config(tiny.V3, "config.json"), lambda spec: spec.size, 2, 5) == bytes_per_step(
        alone, lambda spec: spec.size, 2, 5
    )


class Stub:
    """A runtime that takes 2 s for a prompt, 0.5 s for a step."""

    def __init__(self, clock: list[float], config: Any) -> None:
        self.clock, self.config = clock, config
        self.lengths: list[int] = []

    def caches(self, batch: int, capacity: int) -> Any:
        return [SimpleNamespace(store=torch.empty(batch, capacity, 4), length=0) for _ in range(2)]

    def next_logits(self, tokens: torch.Tensor, caches: Any) -> torch.Tensor:
        assert tokens.shape == (1, 2048)
        self.clock[0] += 2
        return torch.zeros(1, self.config.vocab_size)

    def decoder(self, caches: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        assert all(0.9 < cache.store.std() < 1.1 for cache in caches)

        def step(tokens: torch.Tensor) -> torch.Tensor:
            assert tokens.shape == caches[0].store.shape[:1]
            for cache in caches:
                cache.length += 1
            self.lengths.append(caches[0].length)
            assert self.lengths[-1] <= caches[0].store.shape[1]
            self.clock[0] += 0.5
            return torch.zeros(len(tokens), self.config.vocab_size)

        return step


@pytest.fixture
def stubbed(monkeypatch):
    """v2-lite's subject with a stub for a runtime, on a device that reads 1 GB a second."""
    clock = [0.0]
    monkeypatch.setattr("dsv2quant.bench.device.check_device", lambda: None)
    monkeypatch.setattr(measure, "check_device", lambda: None)
    monkeypatch.setattr(measure, "limits", lambda: Limits(1e9, 1e12))
    monkeypatch.setattr(measure, "measured_on", lambda: {"GPU": "Some GPU", "driver": "1", "versions": "x"})
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda: None)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: 9 << 30)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 10 << 30)
    made = measure.random("v2-lite", "int4-mixed")
    stub = Stub(clock, made.config)
    subject = made._replace(load=lambda: stub)
    monkeypatch.setattr(measure, "random", lambda name, scheme: subject._replace(name=name, scheme=scheme))
    return subject, stub


def test_rates_and_floors(stubbed, tmp_path, cli):
    subject, stub = stubbed
    path = tmp_path / "model.csv"
    ran = cli("bench", "model", "--batch", "1,4", "--context", "100", "--results", path)
    assert ran.code == 0, ran.err
    with path.open() as file:
        prefill, one, four = csv.DictReader(file)
    assert (prefill["phase"], prefill["tokens/s"], prefill["ms"], prefill["floor ms"]) == (
        "prefill",
        "1024.0",
        "2000.0",
        "",
    )
    assert (one["tokens/s"], four["tokens/s"], one["ms"]) == ("2.0", "8.0", "500.0")
    assert (one["weights GiB"], one["memory GiB"], one["context"], one["model"]) == ("9.0", "10.0", "100", "v2-lite")
    gigabytes = bytes_per_step(subject.config, subject.nbytes, 4, 100) / 1e9
    assert float(four["GB"]) == pytest.approx(gigabytes, abs=1e-3)
    assert float(four["floor ms"]) == pytest.approx(gigabytes * 1e3, abs=1)
    assert float(four["ratio"]) == pytest.approx(gigabytes / 0.5, abs=1e-3)
    assert ran.out.splitlines()[1] == "prefill, batch 1, 2048 tokens: 1024.0 tokens/s, 2000.0 ms, 10.0 GiB"
    assert ran.out.splitlines()[2].startswith("decode, batch 1, 100 tokens: 2.0 tokens/s, 500.0 ms, floor ")
    assert min(stub.lengths) == 101


def test_json(stubbed, cli):
    ran = cli("bench", "model", "v2-lite", "--scheme", "fp8-block", "--batch", "1", "--json")
    assert ran.code == 0
    (prefill, decode) = json.loads(ran.out)["rows"]
    assert (prefill["phase"], decode["phase"], decode["scheme"], decode["context"]) == (
        "prefill",
        "decode",
        "fp8-block",
        4096,
    )


def test_a_model_that_does_not_fit_is_a_usage_error(stubbed, cli, monkeypatch):
    subject, stub = stubbed

    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB. GPU 0 has …")

    monkeypatch.setattr(stub, "decoder", full)
    ran = cli("bench", "model", "--batch", "64")
    assert ran.code == 2
    assert "v2-lite, batch 64 at 4096 tokens does not fit: CUDA out of memory" in ran.err
    monkeypatch.setattr(measure, "random", lambda name, scheme: subject._replace(name=name, load=full))
    assert "v2 does not fit" in cli("bench", "model", "v2").err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "there is no CUDA device to measure"),
        (("--batch", "1,x"), "--batch 1,x: it takes numbers from 1"),
        (("--batch", "0"), "--batch 0: it takes numbers from 1"),
        (("somewhere", "--scheme", "bf16"), "a checkpoint has its own"),
        (("v2", "--engine", "vllm"), "--engine takes a checkpoint"),
        (("somewhere", "--engine-python", "python"), "--engine-python goes with --engine"),
        (("--scheme", "int3"), "'int3' is not one of"),
    ],
)
def test_wrong_usage(args, said, cli, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran = cli("bench", "model", *args)
    assert ran.code == 2
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_a_context_beyond_the_models_is_a_usage_error(stubbed, cli):
    ran = cli("bench", "model", "--context", "163800")
    assert ran.code == 2
    assert "--context 163800 is more than the 163840 tokens of v2-lite leave room for" in ran.err


def test_a_checkpoint_is_measured_by_what_it_stores(lite, monkeypatch):
    monkeypatch.setattr(measure, "CheckpointSource", None)
    subject = measure.stored(str(lite))
    assert isinstance(subject, Subject)
    assert (subject.name, subject.scheme) == ("lite", "bf16")
    spec = next(iter(s for s in measure.architecture(subject.config).specs() if s.role == "kv_b_proj"))
    assert subject.nbytes(spec) == 2 * spec.size


def test_an_engine_is_timed_beside_the_runtime_on_one_text(wordy, cli, tmp_path, monkeypatch):
    """Both are the torch runtime here."""
    monkeypatch.setattr("dsv2quant.bench.device.check_device", lambda: None)
    monkeypatch.setattr(beside, "check_device", lambda: None)
    monkeypatch.setattr(beside, "measured_on", lambda: {"GPU": "none"})
    monkeypatch.setattr(beside, "NEW_TOKENS", 5)
    seen = []

    def opened(checkpoint, options, progress):
        model = Model(checkpoint)
        original = model.next_logits
        monkeypatch.setattr(model, "next_logits", lambda t, c, **k: seen.append(t.clone()) or original(t, c, **k))
        return model

    monkeypatch.setattr(beside, "open_model", opened)
    python = program(tmp_path / "python")
    words = ("--engine", "vllm", "--engine-python", python, "--batch", "1,3", "--context", 16)
    ran = cli("bench", "model", wordy, *words, "--results", tmp_path / "rows.csv", "--json")
    assert ran.code == 0, ran.err
    rows = json.loads(ran.out)["rows"]
    assert [(row["program"], row["batch"], row["context"]) for row in rows] == [
        ("vllm", 1, 16), ("vllm", 3, 16), ("dsv2quant", 1, 16), ("dsv2quant", 3, 16),
    ]  # fmt: skip
    assert all(row["step_ms"] > 0 and row["prefill_tokens_s"] > 0 for row in rows)
    assert all(row["decode_tokens_s"] == pytest.approx(1e3 * row["batch"] / row["step_ms"]) for row in rows)
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 5
    given = [tokens for tokens in seen if tokens.shape[1] == 16]
    assert [tuple(tokens.shape) for tokens in given] == [(1, 16)] * 3 + [(3, 16)] * 3
    assert given[-1][:, 0].tolist() == [0, 0, 0]  # BOS
    assert len({tuple(row) for row in given[-1].tolist()}) == 3
    assert sum(tokens.shape == (3, 1) for tokens in seen) == 3 + 2 * 4  # decoded: 4 − 1, then 5 − 1 twice


def test_a_context_beside_an_engine_leaves_room(wordy, cli, monkeypatch):
    monkeypatch.setattr("dsv2quant.bench.device.check_device", lambda: None)
    monkeypatch.setattr(beside, "check_device", lambda: None)
    ran = cli("bench", "model", wordy, "--engine", "vllm", "--context", 1200)
    assert (ran.code, "--context 1200 is out of range (wordy takes 8 to 1152 here)" in ran.err) == (2, True)
