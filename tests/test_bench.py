"""`dsv2quant bench kernels` without a device: what is decided and written, and what is refused."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch

from dsv2quant.bench import fp8, kernels, weight_only
from dsv2quant.bench.device import FLOOR, Measured, Row, append
from dsv2quant.bench.kernels import OPERATIONS, TOKENS
from dsv2quant.kernels import fp8_gemm, launch
from dsv2quant.kernels.fp8_gemm import Decode, Prefill
from dsv2quant.kernels.int4_gemm import Config
from dsv2quant.kernels.int4_held import Held

SHARED = 227 << 10  # bytes of a multiprocessor's memory that a program may have


def call(model: str = "v2", tokens: int = 1, us: float = 10.0, error: float = 1e-3, **peers: float) -> Measured:
    return Measured("fp8", model, "o", "8×16", tokens, error, 2e-3, us, 4.0, peers)


def test_a_row_is_the_geometric_mean_of_its_calls():
    calls = [call(tokens=1, a=20.0), call(tokens=4, a=5.0), call(tokens=16), call("v2-lite", tokens=1, a=1000.0)]
    row = Row("a row", "a", lambda m: m.model == "v2")
    assert row.summary(calls) == {
        "row": "a row", "against": "a", "calls": 2, "mean": pytest.approx(1.0), "worst": 0.5, "worst call": "v2 o M=4",
    }  # fmt: skip
    floor = Row("floor", FLOOR, lambda m: True).summary(calls)
    assert floor is not None
    assert (floor["mean"], floor["calls"]) == (pytest.approx(0.4), 4)
    assert Row("none", "b", lambda m: True).summary(calls) is None


@pytest.mark.parametrize(("error", "wrong"), [(1e-3, False), (2e-3, False), (2.1e-3, True), (math.nan, True)])
def test_an_error_beyond_its_limit_is_said(error, wrong):
    assert call(error=error).wrong is wrong
    assert ("WRONG" in call(error=error).line()) is wrong


def test_results_are_appended_to_a_file_of_their_columns(tmp_path, cli):
    path = tmp_path / "out.csv"
    append(path, [call(a=2.0).columns(["a", "b"])])
    append(path, [call(b=3.0).columns(["a", "b"])])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["a us"], row["b us"], row["floor us"]) for row in rows] == [("2.00", "", "4.00"), ("", "3.00", "4.00")]
    with pytest.raises(Exception, match="has other columns"):
        append(path, [{"other": 1}])


def test_the_rule_stays_unless_another_is_two_percent_faster():
    assert kernels.decide({"rule": 10.0, "a": 9.9, "b": 11.0}, "rule") == "rule"
    assert kernels.decide({"rule": 10.0, "a": 9.7, "b": 9.6}, "rule") == "b"


@pytest.fixture
def timed(monkeypatch):
    """Replays that give the times of this dictionary, of the first and the second round."""
    times = {}

    def recorded(calls):
        first, second = times[calls[0].share]
        return lambda replays: first if replays == kernels.ROUNDS[0] else second

    monkeypatch.setattr(kernels, "recorded", recorded)
    return times


class Call:
    def __init__(self, share, result=1.0, raises=None):
        self.share, self.result, self.raises = share, result, raises

    def __call__(self):
        if self.raises:
            raise self.raises
        return torch.tensor([self.result, 0.0])


def test_the_best_of_the_first_round_are_timed_again(timed):
    timed |= {"rule": (20, 19), **{f"{i}": (10 + i / 10, 10 - i) for i in range(6)}, "slow": (11.5, 1)}
    found = kernels.time_all({share: [Call(share)] for share in timed})
    assert found == {"rule": 19, "0": 10, "1": 9, "2": 8, "3": 7}


def test_shares_that_are_wrong_or_too_large_have_no_time(timed):
    from triton.runtime.errors import OutOfResources

    timed |= dict.fromkeys(("rule", "right", "wrong", "nan", "large"), (10, 10))
    calls = {share: [Call(share)] for share in timed}
    calls["right"] = [Call("right", 1.004)]
    calls["wrong"] = [Call("wrong", 1.006)]
    calls["nan"] = [Call("nan", math.nan)]
    calls["large"] = [Call("large", raises=OutOfResources(300, 200, "shared memory"))]
    assert set(kernels.time_all(calls)) == {"rule", "right"}
    for bad in ("nan", "large"):
        with pytest.raises(ValueError, match=bad):
            kernels.time_all({bad: calls[bad], "right": calls["right"]})


@pytest.mark.parametrize("name", OPERATIONS)
def test_candidates_fit_a_multiprocessor_and_leave_few_idle(name):
    operation = OPERATIONS[name]
    for rows, columns in operation.weights():
        for tokens in TOKENS:
            shares = operation.candidates(tokens, rows, columns)
            assert 0 < len(shares) <= 30
            assert len(set(shares)) == len(shares)
            for share in shares:
                kind, *numbers = operation.table_row(share)
                assert launch.KINDS[operation.name][kind] == len(numbers)
                assert shared_memory(share) <= SHARED, share


def shared_memory(share: object) -> int:
    """Bytes of a program's tiles, all stages."""
    if isinstance(share, Config):
        return 128 * 2 * share.tokens * share.stages  # weights are in registers
    if isinstance(share, Held):
        return 128 * 2 * share.tokens * share.held
    if isinstance(share, Decode | Prefill):
        return 128 * (share.rows + share.tokens) * share.stages
    return 0


def test_programs_are_neither_few_nor_many():
    assert {share.splits for share in fp8.candidates(8, 2048, 2048)} == {4, 6, 8}
    assert {share.splits for share in fp8.candidates(16, 24576, 1536)} == {1, 2, 3, 4}
    assert {(share.rows, share.warps, share.held) for share in fp8.vectors(2048, 2816)} == {
        (2, 1, 6), (4, 1, 6), (8, 1, 3), (2, 2, 3), (4, 2, 3), (8, 2, 3)
    }  # fmt: skip
    assert weight_only.int4_helds(5120, 3072) == [Held(3, 4), Held(3, 8), Held(4, 6), Held(6, 4)]
    assert weight_only.int4_candidates(1024, 24576, 1536) == [None]


def test_a_table_is_written_as_it_is_read(tmp_path, monkeypatch, timed):
    """The part of another operation stays."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some GPU")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setattr(kernels, "check_device", lambda: None)
    monkeypatch.setattr(kernels, "precompile", lambda operations: 7)
    path = tmp_path / "Some-GPU-triton3.6.json"
    path.write_text(json.dumps({"gpu": "Some GPU", "triton": "3.6", "int4_gemm": {"64x128": {"1": ["dequantize"]}}}))
    operation = kernels.Operation(
        "fp8_gemm",
        weights=lambda: {(256, 512), (512, 256)},
        rule=lambda tokens, rows, columns: Decode(64, 16, 1, 4),
        candidates=lambda tokens, rows, columns: [Decode(64, 16, 2, 4), Prefill(64, 128, 3)],
        random_weights=lambda rows, columns, count: None,
        random_tokens=lambda tokens, columns: tokens,
        calls=lambda weights, x, share: [Call((x, share))],
        table_row=fp8.table_row,
        compiled=lambda share, rows, columns: (share, rows, columns),
    )
    monkeypatch.setitem(kernels.OPERATIONS, "fp8", operation)
    for tokens in TOKENS:
        for share, us in (
            (Decode(64, 16, 1, 4), 10),
            (Decode(64, 16, 2, 4), 9),
            (Prefill(64, 128, 3), 9 - (tokens > 64)),
        ):
            timed[tokens, share] = us, us
    said = []
    assert kernels.tune(["fp8"], tmp_path, said.append) == path
    assert said[0] == "compiled 7 candidates in 0 s"
    assert said[1].startswith("fp8_gemm 512×256: M=1 10.0 → 9.0 µs decode 64 16 2 4; ")
    table = launch.read_table(path)
    monkeypatch.setattr(launch, "_of_this_device", lambda: table)
    assert fp8_gemm.choose(5, 512, 256) == Decode(64, 16, 2, 4)
    assert fp8_gemm.choose(65, 256, 512) == Prefill(64, 128, 3)
    assert launch.lookup("int4_gemm", 64, 128, 1) == ["dequantize"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "there is no CUDA device to measure"),
        (("--tune",), "there is no CUDA device to measure"),
        (("--only", "fp8,int3"), "--only int3: it takes fp8, int4, gguf, experts, mla, gqa, fused"),
        (("--tune", "--only", "mla"), "--only mla: it takes fp8, int4"),
        (("--tune", "--results", "x.csv"), "--tables goes with --tune"),
        (("--tables", "."), "--tables goes with --tune"),
    ],
)
def test_wrong_usage(args, said, cli, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran = cli("bench", "kernels", *args)
    assert ran.code == 2
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_a_wrong_result_fails_the_run(cli, monkeypatch):
    found = {
        "kernels": [],
        "rows": [{"row": "r", "against": "a", "calls": 1, "mean": 2.0, "worst": 1.5, "worst call": "c"}],
    }
    monkeypatch.setattr(
        kernels, "run", lambda names, results, say: say(",".join(names)) or found | {"wrong": ["v2 o M=1"]}
    )
    ran = cli("bench", "kernels", "--only", "fp8,mla")
    assert ran.code == 4
    assert ran.out == "fp8,mla\nr, against a: 2.00 in the mean of 1, worst 1.50 (c)\n"
    assert "1 results are wrong: v2 o M=1" in ran.err
    monkeypatch.setattr(kernels, "run", lambda names, results, say: say("line") or found | {"wrong": []})
    ran = cli("bench", "kernels", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["rows"][0]["mean"] == 2.0
