"""`verify --engine`: what engines are asked, what comes of their answers, and what is told of those that fail.

The engine is a stand-in, which is the runtime itself, so that here the comparison is tested and no engine; those are
run in tests/clients.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import numpy as np
import pytest
import tiny
import torch
from engine_stand_in import DRIVERS, program

from dsv2quant.api import convert
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.engines.answers import Answer, Generated, Report, Scores
from dsv2quant.engines.compare import compare
from dsv2quant.engines.generation import check, prompts_of
from dsv2quant.evaluation.divergence import batches_of, run
from dsv2quant.model.completion import Sampling, generate, open_model, prompt_ids
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.text.tokenizer import Windows

REPORT = Report({}, {}, None, None, "cpu")
ASKED = ("--windows", 3, "--ctx", 32, "-q")


@pytest.fixture(scope="module")
def artifact(wordy, tmp_path_factory) -> Path:
    """INT4 in one file."""
    return made(wordy, tmp_path_factory.mktemp("artifact"))


def made(source: Path, folder: Path) -> Path:
    """An artifact in INT4, with scales of a KV cache."""
    text = folder / "text.txt"
    text.write_text("".join(f"The {i} quick brown foxes jump over lazy dogs.\n" for i in range(200)))
    asked = {"method": "rtn", "group_size": 32, "targets": ["transformers"]}
    convert(source, folder / "out", scheme="int4-pure", kv_scales=True, calibration=text, samples=8, length=32, **asked)
    return folder / "out"


@pytest.fixture
def verify(cli, fox, tmp_path):
    """Verify in the engine that computes `model`, or what it is asked to."""

    def verify(artifact: Path, *args: object, model: Path | None = None, engine: str = "vllm"):
        python = program(tmp_path / "python", model=model)
        return cli("verify", artifact, "--engine", engine, "--engine-python", python, "--text", fox, *ASKED, *args)

    return verify


def test_an_engine_that_computes_as_the_runtime_passes(artifact, wordy, verify):
    ran = verify(artifact, "--source", wordy, "--generate", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["engine"]
    assert found["faults"] == []
    assert 0 < found["kld"]["mean"] <= found["limit"]  # BF16 there, float32 here
    assert found["tokens"] == 3 * 31
    assert found["floor"]["cost"]["kld"]["mean"] > 1e-3
    assert abs(found["floor"]["extra_cost"]["value"]) < 1e-3
    assert [made["finish_reason"] for made in found["generated"]] == ["length"] * 5


def test_in_float32_nothing_is_between_them(artifact, verify):
    """But roundings, of sums in the order that a processor takes for so many rows. A logit of some 10 comes of some 50
    of 2^-24 each, which norms enlarge as often as tenfold: 3e-4, of which KLD is half the square. BF16's are 2^16 as
    large."""
    ran = verify(artifact, "--dtype", "float32", "--json")
    assert (ran.code, json.loads(ran.out)["engine"]["kld"]["mean"] < 1e-7) == (0, True)


FAULTS = (faults.scales_permuted, faults.zero_point_dropped, faults.expert_swapped)


@pytest.mark.parametrize("fault", [*FAULTS, faults.nothing], ids=lambda f: f.__name__)
def test_an_engine_that_misreads_is_seen(fault, artifact, verify, tmp_path):
    ran = verify(artifact, model=faults.copy(artifact, tmp_path / "bad", fault))
    assert (ran.code, "mean KLD from the runtime is" in ran.err) == (
        (0, False) if fault is faults.nothing else (4, True)
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_wrong_artifact_is_seen_before_any_engine_runs(fault, artifact, wordy, verify, tmp_path):
    bad = faults.copy(artifact, tmp_path / "bad", fault)
    ran = verify(bad, "--source", wordy, "--json")
    assert (ran.code, "other weights than the source's, or wrong scales: model.layers" in ran.err) == (4, True)
    found = json.loads(ran.out)
    assert "engine" not in found
    quantized = {w.spec.name for w in open_checkpoint(artifact).weights if w.scheme != "bf16"}
    of_experts = {name for name in quantized if f"{faults.EXPERT}0." in name or f"{faults.EXPERT}1." in name}
    assert set(found["wrong"]) == (of_experts if fault is faults.expert_swapped else quantized)


def test_a_tokenizer_without_bos_is_seen(artifact, wordy, verify, tmp_path):
    bad = faults.without_bos(artifact, tmp_path / "bad")
    ran = verify(bad, "--source", wordy)  # the artifact is wrong
    assert (ran.code, "whether a text begins with BOS is not the source's" in ran.err) == (4, True)
    ran = verify(artifact, "--generate", model=bad)  # the engine is
    assert (ran.code, "takes the prompt for tokens [523, 2886, 1563, 658] at 0, not [0, 523," in ran.err) == (4, True)


def test_another_end_of_text_is_seen(artifact, wordy, verify, tmp_path, monkeypatch):
    bad = faults.other_end(artifact, tmp_path / "bad")
    ran = verify(bad, "--source", wordy)
    assert (ran.code, "what ends a text is not the source's" in ran.err) == (4, True)
    # The engine stops where it should not: one end is the likeliest token, the first that it gives.
    first = json.loads(verify(artifact, "--generate", "--json").out)["engine"]["generated"][0]
    ids = open_checkpoint(artifact).tokenizer().encode(first["text"])
    for name in ("config.json", "generation_config.json"):
        path = bad / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": int(ids[0])}))
    ran = verify(artifact, "--generate", model=bad)
    assert (ran.code, f"ends with [{int(ids[0])}], which ends no text" in ran.err) == (4, True)


def test_choices_may_fall_short_by_what_noise_is(artifact, wordy):
    """Of two right computations one chooses a token that the other has behind its own by the noise of both tokens at
    most. The artifact chooses here, for an engine; to its source that is too far, unless its own noise is as large."""
    source, checkpoint = open_checkpoint(wordy), open_checkpoint(artifact)
    exact, other = (open_model(each, LoadOptions(), stream=False) for each in (source, checkpoint))
    prompts = prompts_of(source)
    asked = [prompt_ids(source, source.tokenizer(), prompt.get("text") or prompt["messages"]) for prompt in prompts]
    greedy = [list(generate(other, p, stop=(), max_new_tokens=8, sampling=Sampling())) for p in asked]
    found = [Generated(p, ids, "", "length") for p, ids in zip(asked, greedy, strict=True)]

    def faults_of(rounded: Model, apart: float) -> list[str]:
        checked = check(exact, lambda: rounded, source, prompts, found, apart)
        assert max(made.regret for made in checked) > 0.01
        return [fault for made in checked for fault in made.faults]

    assert faults_of(other, apart=0.0) == []
    worst = max(made.regret for made in check(exact, lambda: other, source, prompts, found, 0.0))
    check(exact, lambda: pytest.fail("opened for nothing"), source, prompts, found, worst)
    assert faults_of(exact, apart=worst * 0.501) == []
    assert any("short of the likeliest" in fault for fault in faults_of(exact, apart=worst * 0.499))


def test_tokens_are_decoded_over_an_fp8_cache(verify, tmp_path):
    """A model of Llama's kind: of a latent cache, the engines drop the scales."""
    source = tiny.write_checkpoint(tmp_path / "llama", tiny.LLAMA | {"vocab_size": 4096})
    artifact = made(source, tmp_path)
    ran = verify(artifact, "--kv-cache", "fp8_e4m3", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["engine"]
    assert (found["decoded"], found["tokens"]) == (32, 3 * 32)
    plain = json.loads(verify(artifact, "--json").out)["engine"]["kld"]["mean"]
    assert found["kld"]["mean"] < 10 * plain + 1e-4
    # An engine that takes half the scales clips the largest, which the runtime doesn't.
    bad = faults.copy(artifact, tmp_path / "bad", faults.cache_scales_halved)
    ran = verify(artifact, "--kv-cache", "fp8_e4m3", model=bad)
    assert (ran.code, "mean KLD from the runtime is" in ran.err) == (4, True)
    ran = verify(bad, "--kv-cache", "fp8_e4m3", "--source", source)  # in the artifact they are seen by what they clip
    assert (ran.code, "the KV cache of layer 0 clips " in ran.err) == (4, True)
    # SGLang has no scales of compressed-tensors.
    found = json.loads(verify(bad, "--kv-cache", "fp8_e4m3", "--source", source, "--json", engine="sglang").out)
    assert found["engine"]["artifact_faults"] == []


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_of_a_latent_cache_scales_are_as_the_engines_have_them(engine, artifact, wordy, verify, tmp_path):
    """1, whatever the artifact says."""
    bad = faults.copy(artifact, tmp_path / "bad", faults.cache_scales_halved)
    words = ("--kv-cache", "fp8_e4m3", "--source", wordy, "--json")
    found = [json.loads(verify(each, *words, engine=engine).out)["engine"] for each in (artifact, bad)]
    assert not any("KV cache" in fault for each in found for fault in each["artifact_faults"])


# Engines that fail


def failing(path: Path, code: str) -> Path:
    path.write_text(f"#!{sys.executable}\nimport sys\nfolder = sys.argv[2]\n{code}\n")
    path.chmod(0o755)
    return path


ANSWER = """
import json, numpy as np
open(folder + "/report.json", "w").write(json.dumps(
    {"versions": {}, "kernels": {}, "attention": None, "kv_cache": None, "device": "cpu"}))
"""
# A driver that fails, and an engine that prints more behind it.
DRIVER = f"""
import os
sys.argv[1:], leave = [folder], os._exit
sys.path.append({str(DRIVERS)!r})
os._exit = lambda code: (print("a warning", flush=True), leave(code))
from exchange import run
"""
BROKEN = {
    "reason": (f"{DRIVER}run(lambda: 1 // 0)", "ZeroDivisionError: integer division or modulo by zero (-vv"),
    "assertion": (f"{DRIVER}def main():\n    assert folder == 'x'\nrun(main)",
                  "vllm failed: AssertionError: assert folder == 'x' (-vv"),
    "exit": ("raise SystemExit('no such luck')", "vllm failed: no such luck (-vv shows all that it said)"),
    "killed": ("import os; os.kill(os.getpid(), 9)", "vllm failed: was ended by SIGKILL"),
    "module": ("import vllm", "has no vllm (give --engine-python"),
    "nothing": ("", "vllm's driver answered what was not asked: logprobs.npy can't be read"),
    "shape": (f"{ANSWER}np.save(folder + '/logprobs.npy', np.zeros((3, 31, 7), 'f4'))",
              "logprobs.npy is float32 [3, 31, 7], not float32 [3, 31, 4096]"),
    "NaN": (f"{ANSWER}np.save(folder + '/logprobs.npy', np.full((3, 31, 4096), np.nan, 'f4'))",
            "vllm's log-probabilities are NaN (it overflows: try another --dtype)"),
    "pickle": (f"{ANSWER}np.save(folder + '/logprobs.npy', np.array([{{}}]), allow_pickle=True)",
               "logprobs.npy can't be read: Array can't be memory-mapped: Python objects in dtype."),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_an_engine_that_fails_ends_in_one_line(name, artifact, fox, cli, tmp_path):
    code, message = BROKEN[name]
    python = failing(tmp_path / "python", code)
    ran = cli("verify", artifact, "--engine", "vllm", "--engine-python", python, "--text", fox, *ASKED)
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert message in ran.err


def test_a_python_that_is_not_there(artifact, fox, cli, tmp_path):
    ran = cli("verify", artifact, "--engine", "vllm", "--engine-python", tmp_path / "none", "--text", fox, *ASKED)
    assert (ran.code, "can't be run: No such file or directory" in ran.err) == (3, True)


def test_what_an_engine_started_ends_with_the_command(artifact, fox, tmp_path):
    """Terminated, the driver's own children end too."""
    pid = tmp_path / "pid"
    code = (
        f"import subprocess, time\np = subprocess.Popen(['sleep', '600'])\nopen('{pid}.new', 'w').write(str(p.pid))\n"
    )
    python = failing(tmp_path / "python", f"{code}import os; os.rename('{pid}.new', '{pid}')\np.wait()")
    command = ["verify", artifact, "--engine", "vllm", "--engine-python", python, "--text", fox, *ASKED]
    with subprocess.Popen([sys.executable, "-m", "dsv2quant", *map(str, command)], stderr=subprocess.PIPE) as started:
        while not pid.exists():
            assert started.poll() is None
            time.sleep(0.01)
        started.send_signal(signal.SIGTERM)  # SIGINT is ignored in what a script has in the background
        assert started.wait() == 143
    assert state(int(pid.read_text())) in ("Z", None)


def state(process: int) -> str | None:
    """'Z' of one that ended and that the system has not taken away yet; None of one that is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--engine", "llama.cpp", "--engine-python", "python"),
            "--engine-python: llama.cpp's programs are found on PATH",
        ),
        (("--engine", "transformers", "--tp", 2), "--tp 2 goes with vllm and sglang"),
        (("--engine", "transformers", "--kv-cache", "fp8_e4m3"), "--kv-cache fp8_e4m3 goes with vllm and sglang"),
        (("--engine", "transformers", "--engine-url", "http://x"), "--engine-url: transformers has no server"),
        (("--engine", "vllm", "--engine-python", "p", "--engine-url", "http://x"), "exclude each other"),
        (("--engine", "vllm", "--engine-url", "http://x", "--tp", 2), "a server has its own"),
        (("--windows", 3), "--windows goes with --engine"),
    ],
)
def test_what_contradicts_itself_is_told_before_anything_is_opened(args, message, cli):
    ran = cli("verify", "none", *args)
    assert (ran.code, message in ran.err) == (2, True)


# Distributions


@pytest.fixture(scope="module")
def passed(wordy):
    ids = np.random.default_rng(0).integers(2, 4096, (2, 12))
    return ids, run(Model(open_checkpoint(wordy)), ids, batches_of(2, 2))


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_divergence_from_whole_distributions_and_from_the_likeliest(passed, wordy):
    ids, runtime = passed
    logits = Model(open_checkpoint(wordy)).forward(torch.from_numpy(ids))[:, 3:-1].double().numpy()
    p = log_softmax(logits)
    q = log_softmax(logits * 1.1 + 0.05 * np.random.default_rng(1).standard_normal(logits.shape)).astype(np.float32)
    windows = Windows(ids, 3)
    found = compare(Answer(windows, Scores(q), REPORT), runtime)
    exact = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(found.kld, exact, rtol=1e-5)  # the runtime's logits are float32
    targets = ids[:, 4:, None]
    np.testing.assert_allclose(found.nll, -np.take_along_axis(q, targets, -1)[..., 0], rtol=1e-6)
    np.testing.assert_allclose(found.reference_nll, -np.take_along_axis(p, targets, -1)[..., 0], rtol=1e-5)
    assert (found.same_top1 == (p.argmax(-1) == q.argmax(-1))).all()

    def of_likeliest(k: int):
        top = np.argsort(-q, -1)[..., :k]
        scores = Scores(
            np.take_along_axis(q, top, -1), top.astype(np.int32), np.take_along_axis(q, targets, -1)[..., 0]
        )
        return compare(Answer(windows, scores, REPORT), runtime)

    few, many = of_likeliest(20), of_likeliest(4000)
    assert (few.kld <= exact * (1 + 1e-4) + 1e-9).all()
    assert few.kld.mean() < many.kld.mean()
    assert (many.kld >= 0.9 * exact).all()
    np.testing.assert_allclose(few.nll, found.nll, rtol=1e-6)
    assert (few.same_top1 == found.same_top1).all()
    best = np.take_along_axis(np.exp(p), np.argsort(-q, -1)[..., :20], -1).sum(-1)
    rest_q = np.log1p(-np.take_along_axis(np.exp(q.astype(float)), np.argsort(-q, -1)[..., :20], -1).sum(-1))
    top = np.argsort(-q, -1)[..., :20]
    kept_p, kept_q = np.take_along_axis(p, top, -1), np.take_along_axis(q, top, -1)
    by_hand = (np.exp(kept_p) * (kept_p - kept_q)).sum(-1) + (1 - best) * (np.log1p(-best) - rest_q)
    np.testing.assert_allclose(few.kld, by_hand, rtol=1e-3, atol=1e-9)
