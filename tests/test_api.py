"""The Python API: it writes the bytes and finds the numbers of the command line, and docs/api.md does what it says."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import tiny
from test_convert import contents

import dsv2quant as dq
from dsv2quant.errors import GateError, InputError, UsageError
from dsv2quant.evaluation.results import evaluation_json, verification_json
from dsv2quant.model.completion import completion_json
from dsv2quant.planning.options import CALIBRATION, FOLDER, GGUF, HubOptions, Options
from dsv2quant.report.calibration import calibrated_json
from dsv2quant.report.inspection import inspection_json
from dsv2quant.report.plans import plan_json

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = Path(__file__).parent.parent / "docs/api.md"
FEW = {"samples": 2, "length": 32}
FEW_WORDS = ("--num-calibration-samples", "2", "--max-seq-length", "32")


def test_the_page_does_what_it_says(fox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.MINI, "examples/dsv2-mini")
    shutil.copy(fox, "text.txt")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 9
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)


# --- names ---


def test_importing_is_light():
    code = "import sys, dsv2quant; print(*sys.modules); dir(dsv2quant); dsv2quant.plan; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    at_first, used = (set(line.split()) for line in ran.stdout.splitlines())
    assert "dsv2quant.api" not in at_first
    assert not used & {"torch", "numpy", "numba", "click", "yaml", "huggingface_hub"}


def test_functions_stay_functions_whatever_is_imported():
    package = Path(dq.__file__).parent
    for path in package.rglob("*.py"):
        # Drivers are scripts of other Pythons, and lm_eval is not installed.
        if path.stem not in ("__init__", "__main__", "lm_eval") and path.parent.name != "drivers":
            importlib.import_module(".".join(path.relative_to(package.parent).with_suffix("").parts))
    assert set(dq.__all__) <= set(dir(dq))
    for name in dq.__all__:
        assert inspect.isfunction(getattr(dq, name))
        assert inspect.getdoc(getattr(dq, name))
    with pytest.raises(AttributeError, match="has no attribute 'quantize'"):
        _ = dq.quantize


def test_every_option_is_of_one_kind():
    kinds = (*HubOptions.__annotations__, *FOLDER, *CALIBRATION, "statistics", *GGUF)
    assert sorted(kinds) == sorted(Options.__annotations__)
    assert get_type_hints(Options).keys() == Options.__annotations__.keys()


# --- the same bytes, the same numbers ---

CONVERSIONS = [
    ({}, ()),
    ({"scheme": "fp8-channel", "targets": ("vllm",), "tp": 2}, ("--fp8=channel", "--target", "vllm", "--tp", "2")),
    (
        {"scheme": "int4-pure", "method": "rtn", "group_size": 32, "layout": "gptq", "targets": ["vllm"]},
        ("--int4=pure", "--method", "rtn", "--group-size", "32", "--format", "gptq", "--target", "vllm"),
    ),
    (
        {"scheme": "int4-pure", "method": "rtn", "group_size": "channel", "targets": ("transformers",)},
        ("--int4=pure", "--method", "rtn", "--group-size", "channel", "--target", "transformers"),
    ),
    ({"scheme": "int8", "max_shard_size": "500KB"}, ("--int8", "--max-shard-size", "500KB")),
    (
        {"scheme": "fp8-channel", "kv_scales": True, "calibration": "{fox}", "seed": 3, **FEW},
        ("--fp8=channel", "--kv-scales", "--calibration", "{fox}", "--seed", "3", *FEW_WORDS),
    ),
    (
        {"gguf": "Q4_0", "tensor_types": ("attn_q=q8_0",), "output_type": "q6_k", "split_max_size": "2MB"},
        ("--gguf", "Q4_0", "--tensor-type", "attn_q=q8_0", "--output-type", "q6_k", "--split-max-size", "2MB"),
    ),
]


@pytest.mark.parametrize(("options", "words"), CONVERSIONS, ids=[" ".join(words) for _, words in CONVERSIONS])
def test_the_api_and_the_command_write_the_same_bytes(options, words, wordy, fox, tmp_path, cli):
    options = {name: fox if value == "{fox}" else value for name, value in options.items()}
    into_gguf = "gguf" in options
    model = tiny.MINI if into_gguf else wordy
    folders = [tmp_path / name for name in ("cli", "api", "plan")]
    theirs, ours, planned = (folder / "out.gguf" if into_gguf else folder for folder in folders)
    ran = cli("convert", model, *(word.format(fox=fox) for word in words), "-o", theirs, "--json", "-q")
    assert ran.code == 0, ran.err
    made = dq.convert(model, ours, **options)
    assert contents(folders[1]) == contents(folders[0])
    assert made.bits_per_weight == json.loads(ran.out)["bits_per_weight"]
    later = ("split_max_size",) if into_gguf else (*CALIBRATION, "statistics")
    plan = dq.plan(model, **{key: value for key, value in options.items() if key not in later})
    dq.convert(plan, planned, **{key: value for key, value in options.items() if key in later})
    assert contents(folders[2]) == contents(folders[0])


def test_a_plan_is_the_commands(wordy, cli):
    ran = cli("plan", wordy, "--int4=experts", "--ep", "2", "--json")
    assert plan_json(dq.plan(dq.open(wordy), scheme="int4-experts", ep=2)) == json.loads(ran.out)
    ran = cli("plan", tiny.MINI, "--gguf", "q8_0", "--json")
    assert plan_json(dq.plan(tiny.MINI, gguf="Q8_0")) == json.loads(ran.out)
    assert inspection_json(dq.inspect(wordy)) == json.loads(cli("inspect", wordy, "--json").out)


def timeless(found: object) -> object:
    """Without what differs from run to run."""
    if not isinstance(found, dict):
        return found
    varying = ("seconds", "prefill_tokens_per_s", "decode_tokens_per_s")
    return {name: timeless(value) for name, value in found.items() if name not in varying}


def test_measurements_are_the_commands(wordy, fox, tmp_path, cli):
    artifact = tmp_path / "out"
    dq.convert(wordy, artifact)
    words = ("--reference", wordy, "--text", fox, "--ctx", "16", "--limit", "2", "--max-kld", "1e-9")
    found = dq.evaluate(artifact, reference=wordy, text=fox, ctx=16, limit=2, max_kld=1e-9)
    ran = cli("eval-ppl", artifact, *words, "--json", "-q")
    assert (ran.code, timeless(evaluation_json(found))) == (4, timeless(json.loads(ran.out)))
    with pytest.raises(GateError, match="mean KLD is"):
        found.check_gates()
    ran = cli("verify", artifact, "--source", wordy, "--json", "-q")
    exact_is_null = json.loads(json.dumps(verification_json(dq.verify(artifact, wordy))).replace("Infinity", "null"))
    assert exact_is_null == json.loads(ran.out)
    prompt = ("--prompt", "The", "--max-new-tokens", "3", "--temperature", "1", "--seed", "5")
    said = dq.generate(artifact, "The", max_new_tokens=3, temperature=1, seed=5)
    assert timeless(completion_json(said)) == timeless(json.loads(cli("generate", artifact, *prompt, "--json").out))


def test_calibration_is_the_commands(wordy, fox, tmp_path, cli):
    for name in ("cli", "api"):
        (tmp_path / name).mkdir()
    outs = [(tmp_path / name / "s.safetensors", tmp_path / name / "i.gguf") for name in ("cli", "api")]
    words = ("--calibration", fox, *FEW_WORDS, "-o", outs[0][0], "--imatrix", outs[0][1])
    ran = cli("calibrate", wordy, *words, "--json", "-q")
    made = dq.calibrate(wordy, outs[1][0], text=fox, imatrix=outs[1][1], **FEW)
    assert contents(tmp_path / "api") == contents(tmp_path / "cli")
    assert calibrated_json(made) | {"out": None, "imatrix": None} == json.loads(ran.out) | {
        "out": None,
        "imatrix": None,
    }


def test_messages_are_a_chat(wordy, cli):
    ran = cli("generate", wordy, "--chat", "--prompt", "Who?", "--max-new-tokens", "2", "--json", "-q")
    talk = [{"role": "user", "content": "Who?"}]
    assert dq.generate(wordy, talk, max_new_tokens=2).prompt_tokens == json.loads(ran.out)["prompt_tokens"]
    longer = [*talk, {"role": "assistant", "content": "I."}, {"role": "user", "content": "Why?"}]
    assert len(dq.generate(wordy, longer, max_new_tokens=1).prompt_tokens) > len(talk)


# --- what contradicts itself ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "fp8-blok"}, "--scheme fp8-blok (it takes fp8-block, fp8-channel"),
        ({"scheme": "int4-mixed", "group_size": 48}, "--group-size 48 (it takes 128, 64, 32, channel)"),
        ({"scheme": "int4-mixed", "method": "best"}, "--method best (it takes rtn, mse, awq, gptq)"),
        ({"targets": ("vllm", "ollama")}, "--target ollama (it takes vllm, sglang, transformers)"),
        ({"tp": 0}, "--tp 0 is out of range (it must be at least 1)"),
        ({"scheme": "fp8-block", "recipe": "x.yaml"}, "a scheme and a recipe exclude each other"),
        ({"scheme": "int4-mixed", "gguf": "Q8_0"}, "--int4 does not go with --gguf"),
        ({"imatrix": "x"}, "--imatrix goes with --gguf"),
        ({"gguf": "Q8_0", "length": 64}, "--max-seq-length does not go with --gguf"),
    ],
)
def test_contradictions_are_told_before_anything_is_opened(options, message):
    with pytest.raises(UsageError) as refused:
        dq.plan("no/such/model", **options)
    assert message in str(refused.value)


def test_other_contradictions(wordy, tmp_path):
    plan = dq.plan(wordy)
    for call, message in (
        (lambda: dq.convert(plan, tmp_path / "out", scheme="int8"), "--int8 does not go with a plan"),
        (lambda: dq.convert(plan, tmp_path / "out", samples=4), "nothing of this recipe calibrates here"),
        (lambda: dq.convert(plan, tmp_path / "out.gguf"), "a GGUF file is written by --gguf TYPE; --fp8 writes"),
        (lambda: dq.convert(plan, tmp_path / "out", device="gpu"), "is none of cpu, cuda and cuda:N"),
        (lambda: dq.evaluate("no/model", kv_cache="int8", decode_path=True), "--kv-cache int8 (it takes auto,"),
        (lambda: dq.evaluate("no/model", max_kld=1), "--max-ppl-increase and --max-kld need --reference"),
        (lambda: dq.generate("no/model", [{"role": "user", "content": "a"}], special=True), "--special goes with a"),
        (lambda: dq.generate("no/model", "a", top_p=0.5), "--top-p goes with --temperature above 0"),
    ):
        with pytest.raises(UsageError) as refused:
            call()
        assert message in str(refused.value)
    with pytest.raises(TypeError, match="unknown option 'group'"):
        dq.plan(wordy, group=64)
    with pytest.raises(InputError, match="nosuch"):
        dq.convert("no/model", tmp_path / "out", scheme="int4-mixed", calibration="nosuch")
    assert not list(tmp_path.iterdir())


def test_warnings_are_logged(wordy, fox, tmp_path, caplog):
    dq.convert(wordy, tmp_path / "out", scheme="int4-experts", targets=("transformers",), group_size=32, **FEW,
               calibration=fox)  # fmt: skip
    assert caplog.messages == []
    with caplog.at_level(logging.INFO, "dsv2quant.report.plans"):
        dq.convert(wordy, tmp_path / "again")
    assert any("recipe fp8-block, for vllm" in message for message in caplog.messages)
