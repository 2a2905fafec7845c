"""Tables of shares: what is looked up in them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv2quant.kernels import fp8_gemm, int4_gemm, launch
from dsv2quant.kernels.fp8_gemm import Decode, Prefill
from dsv2quant.kernels.int4_gemm import Config
from dsv2quant.kernels.int4_held import Held

CONTENT = {
    "gpu": "Some GPU",
    "capability": "9.0",
    "triton": "3.6",
    "fp8_gemm": {
        "256x512": {"1": ["decode", 64, 16, 2, 4], "16": ["decode", 128, 16, 1, 4], "1024": ["prefill", 64, 128, 3]},
    },
    "int4_gemm": {"256x512": {"1": ["held", 2, 4], "16": ["gemm", 64, 16, 8, 4, 4], "256": ["dequantize"]}},
}  # fmt: skip


def written(folder: Path, name: str = "Some-GPU-triton3.6.json", **changes: object) -> Path:
    path = folder / name
    path.write_text(json.dumps(CONTENT | changes))
    return path


@pytest.fixture
def some_gpu(tmp_path, monkeypatch):
    """As on a device that has the table."""
    table = launch.read_table(written(tmp_path))
    monkeypatch.setattr(launch, "_of_this_device", lambda: table)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        (1, Decode(64, 16, 2, 4)), (2, Decode(128, 16, 1, 4)), (16, Decode(128, 16, 1, 4)),
        (17, Prefill(64, 128, 3)), (1024, Prefill(64, 128, 3)), (1025, fp8_gemm.rule(1025, 256, 512)),
    ],
)  # fmt: skip
def test_a_share_serves_at_most_its_tokens(tokens, share, some_gpu):
    assert fp8_gemm.choose(tokens, 256, 512) == share


def test_int4_takes_its_own(some_gpu):
    assert int4_gemm.choose(1, 256, 512) == Held(2, 4)
    assert int4_gemm.choose(5, 256, 512) == Config(64, 16, 8, 4, 4)
    assert int4_gemm.choose(200, 256, 512) is None
    assert int4_gemm.rule(200, 256, 512) is None
    assert int4_gemm.rule(100, 256, 512) is not None
    assert int4_gemm.choose(100, 256, 512) is None


def test_other_weights_go_by_the_rule(some_gpu):
    assert launch.lookup("fp8_gemm", 512, 256, 1) is None
    assert fp8_gemm.choose(1, 512, 256) == fp8_gemm.rule(1, 512, 256)
    assert int4_gemm.choose(1, 512, 256) == int4_gemm.rule(1, 512, 256)


TABLES = [
    ("Some GPU", "9.0", "3.6"),
    ("Some GPU", "9.0", "3.10"),
    ("Big GPU", "9.0", "3.8"),
    ("New GPU", "10.0", "3.8"),
]


@pytest.mark.parametrize(
    ("gpu", "capability", "version", "found"),
    [
        ("Some GPU", "9.0", "3.6.0", "Some-GPU-triton3.6"),
        ("Some GPU", "9.0", "3.6.1+git", "Some-GPU-triton3.6"),
        ("Some GPU", "9.0", "3.7.1", "Some-GPU-triton3.6"),
        ("Some GPU", "9.0", "3.8.0", "Some-GPU-triton3.10"),  # as near as 3.6, and newer
        ("Some GPU", "9.0", "3.60.0", "Some-GPU-triton3.10"),
        ("Some GPU", "9.0", "4.0.0", "Some-GPU-triton3.10"),
        ("Big GPU", "9.0", "3.6.0", "Big-GPU-triton3.8"),  # its own before a nearer version
        ("Third GPU", "9.0", "3.9.0", "Some-GPU-triton3.10"),
        ("Third GPU", "9.0", "3.8.0", "Big-GPU-triton3.8"),
        ("Third GPU", "10.0", "3.6.0", "New-GPU-triton3.8"),
        ("Some GPU", "8.9", "3.6.0", None),
    ],
)
def test_the_nearest_table_of_the_architecture_is_taken(gpu, capability, version, found, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    for its_gpu, its_capability, triton in TABLES:
        name = f"{its_gpu.replace(' ', '-')}-triton{triton}.json"
        written(tmp_path, name, gpu=its_gpu, capability=its_capability, triton=triton)
    path = launch.nearest(gpu, capability, version)
    assert (path and path.name.removesuffix(".json")) == found


def test_which_table_is_taken_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some GPU")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("triton.__version__", "3.7.1")
    written(tmp_path)
    for capability, line, known in (
        ((9, 0), "block shapes: Some-GPU-triton3.6.json, for Some GPU with Triton 3.7.1", True),
        ((8, 6), "block shapes: by rules; no table is for compute capability 8.6", False),
    ):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda capability=capability: capability)
        launch._of_this_device.cache_clear()
        caplog.clear()
        with caplog.at_level("INFO", "dsv2quant"):
            for _ in range(3):
                assert (launch.lookup("int4_gemm", 256, 512, 1) is not None) is known
        assert [record.getMessage() for record in caplog.records] == [line]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    launch._of_this_device.cache_clear()
    assert launch.lookup("fp8_gemm", 256, 512, 1) is None
    launch._of_this_device.cache_clear()


def test_the_device_is_asked_for_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: calls.append(1))
    launch._of_this_device.cache_clear()
    for tokens in range(1, 100):
        launch.lookup("fp8_gemm", 24576, 1536, tokens)
    assert calls == [1]
    launch._of_this_device.cache_clear()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpu": "Other GPU"}, "another GPU"),
        ({"triton": "3.7"}, "another GPU"),
        ({"triton": "3.6.0"}, "another GPU"),
        ({"triton": "six"}, "'six' is no version"),
        ({"capability": "Hopper"}, "no compute capability"),
        ({"capability": None}, "TypeError"),
        ({"softmax": {}}, "softmax"),
        ({"fp8_gemm": {"256": {"1": ["decode", 64, 16, 1, 4]}}}, "'256' is no rows and columns"),
        ({"fp8_gemm": {"256x512": {}}}, "has no shares"),
        ({"fp8_gemm": {"256x512": {"1": ["decode", 64, 16, 1]}}}, "is no share for 1 tokens"),
        ({"fp8_gemm": {"256x512": {"1": ["gemm", 64, 16, 1, 4, 4]}}}, "is no share for 1 tokens"),
        ({"fp8_gemm": {"256x512": {"1": ["decode", 64, 16, 0, 4]}}}, "is no share for 1 tokens"),
        ({"fp8_gemm": {"256x512": {"1": ["decode", 64, 16, "2", 4]}}}, "is no share for 1 tokens"),
        ({"fp8_gemm": {"256x512": {"few": ["decode", 64, 16, 2, 4]}}}, "few"),
        ({"fp8_gemm": {"256x512": {"1": []}}}, "ValueError"),
        ({"fp8_gemm": {"256x512": {"1": None}}}, "TypeError"),
        ({"fp8_gemm": [1]}, "AttributeError"),
    ],
)  # fmt: skip
def test_a_bad_table_is_refused_by_name(changes, said, tmp_path):
    path = written(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"Some-GPU-triton3\.6\.json: ") as refused:
        launch.read_table(path)
    assert said in str(refused.value)


def test_a_table_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "Some-GPU-triton3.6.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"Some-GPU-triton3\.6\.json"):
        launch.read_table(path)


def test_kinds_have_as_many_numbers_as_fields():
    assert launch.KINDS["fp8_gemm"] == {name: len(kind._fields) for name, kind in fp8_gemm.KINDS.items()}
    assert launch.KINDS["int4_gemm"] == {
        "dequantize": 0, **{name: len(kind._fields) for name, kind in int4_gemm.KINDS.items()}
    }  # fmt: skip


def test_the_tables_that_come_with_the_package_can_be_read():
    for path in launch.FOLDER.glob("*.json"):
        assert set(launch.read_table(path)) <= set(launch.KINDS)
