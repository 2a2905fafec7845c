"""docs/json.md, held against what every verb prints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from engine_stand_in import program

DOCUMENT = Path(__file__).parents[1] / "docs" / "json.md"
pytestmark = pytest.mark.usefixtures("one_thread")


def documented(title: str) -> set[str]:
    """The keys of a verb's table."""
    section = DOCUMENT.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


def keys(value: Any, known: set[str], path: str = "") -> Iterator[str]:
    """The keys of an object, as deep as they are documented: `a.b`, `a[].b`, and `a.*.b` of names that aren't fixed."""
    if path in known:
        yield path
    deeper = {key for key in known if key.startswith((f"{path}.", f"{path}[]")) or not path}
    if not deeper:
        if path not in known:
            yield path
    elif isinstance(value, dict):
        for name, item in value.items():
            free = any(key.startswith(f"{path}.*") for key in known)
            yield from keys(item, known, f"{path}.*" if free else f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for item in value:
            yield from keys(item, known, f"{path}[]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("json")


@pytest.fixture
def check(cli) -> Callable[..., dict[str, Any]]:
    """Run a verb and compare its keys with the table of that title."""

    def run(title: str, *args: object, code: int = 0, also: str | None = None) -> dict[str, Any]:
        ran = cli(*args, "--json", "-q")
        assert ran.code == code, ran.err
        assert ran.out.count("\n") == 1
        result = json.loads(ran.out)
        known = documented(title) | (documented(also) if also else set())
        assert known
        assert set(keys(result, known)) == known
        assert result["schema"] in DOCUMENT.read_text()
        return result

    return run


def test_plans(check, lite):
    digest = check("plan", "plan", lite, "--fp8", "--target", "vllm")["digest"]
    assert len(digest) == 64
    check("memory", "memory", lite, "--gpu", "H200")
    check("plan --time", "plan", tiny.MINI, "--int4", "--time")
    check("plan --gguf", "plan", tiny.MINI, "--gguf", "Q4_K_M")


def test_convert_and_what_reads_its_artifact(check, wordy, fox, folder):
    out = folder / "out"
    text = ("--calibration", fox, "--num-calibration-samples", "2")
    few = ("--group-size", "32", "--target", "transformers")
    made = check("convert", "convert", wordy, "--int4=experts", "--tune", "1k", *few, *text, "-o", out)
    assert made["files"]["model.safetensors"]["size"] == (out / "model.safetensors").stat().st_size
    held = check("inspect", "inspect", out)
    assert held["files"]["model.safetensors"]["size"] == made["files"]["model.safetensors"]["size"]
    check("verify", "verify", out, "--source", wordy)
    words = ("--engine", "vllm", "--engine-python", program(folder / "python"), "--windows", 1, "--generate")
    check("verify", "verify", out, "--source", wordy, *words, also="verify --engine")
    scored = ("--text", fox, "--ctx", "16", "--limit", "1", "--reference", wordy)
    found = check("eval-ppl", "eval-ppl", out, *scored, "--max-kld", "1e-9", "--max-ppl-increase", "1000", code=4)
    check("compare", "compare", out, *scored, "--source", wordy)
    assert found["digest"] == made["digest"]
    assert found["reference"]["digest"] is None
    assert found["identity"] != found["reference"]["identity"]
    assert [gate["passed"] for gate in found["gates"].values()] == [True, False]


def test_a_gguf_file(check, folder):
    made = check("convert --gguf", "convert", tiny.MINI, "--gguf", "BF16", "-o", folder / "m.gguf")
    size = (folder / "m.gguf").stat().st_size
    assert made["files"]["m.gguf"]["size"] == size
    assert check("inspect", "inspect", folder / "m.gguf")["files"] == {"m.gguf": {"size": size}}


def test_calibrate(check, wordy, fox, folder):
    text = ("--calibration", fox, "--num-calibration-samples", "2")
    found = check("calibrate", "calibrate", wordy, *text, "-o", folder / "s.safetensors")
    assert (found["model"], found["revision"]) == ("wordy", None)


def test_generate(check, wordy):
    check("generate", "generate", wordy, "--prompt", "The", "--max-new-tokens", "2")


def test_bench(check, monkeypatch):
    from dsv2quant.bench import device, kernels, model

    reached = SimpleNamespace(read=1.0, products=1.0)
    where = dict.fromkeys(("GPU", "driver", "versions"), "")
    for module in (kernels, model, device):
        monkeypatch.setattr(module, "check_device", lambda: None)
    for module in (kernels, model):
        monkeypatch.setattr(module, "limits", lambda: reached)
        monkeypatch.setattr(module, "measured_on", lambda: where)
    monkeypatch.setattr(kernels, "SECTIONS", {"fp8": SimpleNamespace(measure=lambda reached: [], rows=())})
    check("bench kernels", "bench", "kernels", "--only", "fp8")
    monkeypatch.setattr(model, "random", lambda name, scheme: None)
    monkeypatch.setattr(model, "run", lambda *args: {"read_bytes_per_s": 1.0, "rows": []})
    check("bench model", "bench", "model", "v2-lite")
