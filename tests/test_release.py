"""`release`: artifacts as `convert` writes them, figures as `eval-ppl` has them, gates, and what a kill leaves."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from calibrated import killer
from engine_stand_in import program
from hub_server import serve

import dsv2quant as dq
from dsv2quant.publishing import wanted
from dsv2quant.publishing.run import REFERENCE, STATE, _options

KINDS = {
    "wordy-FP8-CHANNEL": {"scheme": "fp8-channel"},
    "wordy-INT4-EXPERTS-RTN": {"scheme": "int4-experts", "method": "rtn"},
}
GGUF = "wordy-GGUF/wordy-Q8_0.gguf"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wordy(tmp_path_factory) -> Path:
    """With query latents, without which llama.cpp takes no model of two layers."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "wordy", tiny.WORDY | {"q_lora_rank": 16})


@pytest.fixture(scope="module")
def recipe(fox, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    python = program(folder / "python")
    path = folder / "release.yaml"
    path.write_text(f"""
artifacts:
  - {{artifact: fp8-channel, target: [vllm]}}
  - {{artifact: int4-experts, method: rtn, max-kld: 100}}
  - Q8_0
evaluation: {{text: {fox}, ctx: 32, limit: 4}}
gates: {{max-kld: 10}}
engines: [{{engine: vllm, python: {python}, windows: 2, ctx: 32}}]
""")
    return path


@pytest.fixture(scope="module")
def released(wordy, recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("released") / "out"
    dq.release(wordy, out, wanted.load(recipe, "wordy")).check()
    return out


def files(out: Path) -> dict[str, bytes]:
    """Contents by name, but of what a later run goes on from."""
    found = (path for path in out.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def test_it_holds_artifacts_cards_sums_and_a_report(released):
    names = set(files(released))
    assert {"report.html", "report.json", "SHA256SUMS", "release.yaml", GGUF, "wordy-GGUF/README.md"} <= names
    assert {f"{name}/{file}" for name in KINDS for file in ("README.md", "dsv2quant.json", "config.json")} <= names
    listed = dict(reversed(line.split("  ", 1)) for line in (released / "SHA256SUMS").read_text().splitlines())
    assert listed == {
        name: hashlib.sha256(content).hexdigest() for name, content in files(released).items() if name != "SHA256SUMS"
    }


def test_artifacts_are_what_convert_writes(wordy, released, tmp_path):
    for name, options in KINDS.items():
        dq.convert(wordy, tmp_path / name, **options | ({"targets": ["vllm"]} if "FP8" in name else {}))
        ours, theirs = files(released / name), files(tmp_path / name)
        more = {name for name in ours if ours[name] != theirs.get(name)}
        assert {name for name in more if not name.startswith("figures/")} == {"README.md", "dsv2quant-verify.json"}
        assert theirs.keys() <= ours.keys()
    dq.convert(wordy, tmp_path / "x.gguf", gguf="Q8_0")
    assert (released / GGUF).read_bytes() == (tmp_path / "x.gguf").read_bytes()


def test_figures_are_the_live_references(wordy, fox, released):
    report = json.loads((released / "report.json").read_text())
    assert [each["name"] for each in report["artifacts"]] == [*KINDS, Path(GGUF).name]
    for each, path in zip(report["artifacts"], [*KINDS, GGUF], strict=True):
        live = dq.evaluate(released / path, reference=wordy, text=fox, ctx=32, limit=4)
        assert each["scores"]["kld"] == {"value": live.comparison.kld.mean, "stderr": live.comparison.kld.stderr}
        assert each["scores"]["perplexity"]["value"] == live.perplexity.value
        assert each["cells"]
    assert [len(each["engines"]) for each in report["artifacts"]] == [1, 1, 0]


def test_cards_have_the_figures(released):
    report = json.loads((released / "report.json").read_text())
    for each, path in zip(report["artifacts"], [*KINDS, "wordy-GGUF"], strict=True):
        card = (released / path / "README.md").read_text()
        assert f"{each['scores']['kld']['value']:.5f}" in card
        assert each["scores"]["text_sha256"] in card


def test_a_second_run_measures_nothing(wordy, recipe, released, cli, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in released.rglob("*.safetensors")}
    monkeypatch.setattr("dsv2quant.publishing.run._Run.measure", None)
    ran = cli("release", wordy, "--recipe", recipe, "-o", released, "-q", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["schema"] == "dsv2quant.release/1"
    assert {path: path.stat().st_mtime_ns for path in released.rglob("*.safetensors")} == before


def test_a_gate_that_fails_leaves_the_others_done(wordy, fox, cli, tmp_path):
    path = tmp_path / "release.yaml"
    path.write_text(
        f"artifacts: [{{artifact: int4-pure, method: rtn, max-kld: 1e-9}}, Q8_0]\n"
        f"evaluation: {{text: {fox}, ctx: 32, limit: 4}}\ngates: {{max-kld: 10, min-top1: 0.1}}\n"
    )
    ran = cli("release", wordy, "--recipe", path, "-o", tmp_path / "out", "-q")
    assert ran.code == 4
    assert re.search(r"error: wordy-INT4-PURE-RTN: mean KLD is [\d.]+ nats, more than 1e-09\n", ran.err)
    assert (tmp_path / "out" / "wordy-GGUF" / "wordy-Q8_0.gguf").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [bool(each["failed"]) for each in report["artifacts"]] == [True, False]


def test_text_goes_to_what_calibrates_and_to_what_is_tuned(wordy, fox, tmp_path):
    path = tmp_path / "release.yaml"
    path.write_text(f"""
artifacts:
  - fp8-channel
  - int4-pure
  - {{artifact: int4-experts, method: rtn, tune: 1k}}
  - {{artifact: Q4_0, tune: 1k}}
calibration: {{text: {fox}, samples: 8, length: 32}}
""")
    release = wanted.load(path, "wordy")
    found = [_options(dq.open(wordy), each, release.calibration, None) for each in release.artifacts]
    text = {"calibration": str(fox), "length": 32}
    assert [{k: v for k, v in options.items() if k in ("calibration", "samples", "length")} for options in found] == [
        {}, text | {"samples": 8}, text, text,
    ]  # fmt: skip


def test_what_cannot_be_made_is_told_before_anything_is_written(wordy, cli, tmp_path):
    path = tmp_path / "release.yaml"
    path.write_text("artifacts: [fp8-block, {artifact: int4-pure, format: gptq, group-size: 32, target: transformers}]")
    ran = cli("release", wordy, "--recipe", path, "-o", tmp_path / "out", "-q")
    assert (ran.code, (tmp_path / "out").exists()) == (2, False)
    assert "no gptq for --target transformers" in ran.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give --recipe FILE or --artifacts NAME,…, one of them"),
        (("--recipe", "x", "--artifacts", "fp8-block"), "one of them"),
        (("--recipe", "x", "--calibration", "y"), "--calibration goes with --artifacts"),
        (("--artifacts", "fp9"), "unknown artifact 'fp9'"),
    ],
)
def test_wrong_usage(args, message, wordy, cli, tmp_path):
    ran = cli("release", wordy, "-o", tmp_path / "out", *args)
    assert ran.code in (2, 3)
    assert message in ran.err


def test_a_kill_at_any_moment_leaves_what_goes_on_to_the_same_files(wordy, fox, tmp_path):
    path = tmp_path / "release.yaml"
    path.write_text(f"artifacts: [fp8-channel, Q8_0]\nevaluation: {{text: {fox}, ctx: 32, limit: 4}}\n")
    words = tuple(map(str, ("release", wordy, "--recipe", path, "-q", "-o")))
    with killer() as run_killed:
        run_killed(0, *words, str(tmp_path / "first"))  # counts changes of imports, too
        changes, status = run_killed(0, *words, str(tmp_path / "whole"))
        assert status == 0
        whole = files(tmp_path / "whole")
        # The last are those of the report, the sums and the log.
        for number in [*range(1, changes - 4, max(1, changes // 6)), *range(changes - 4, changes)]:
            out = tmp_path / f"killed-{number}"
            # A run may make a change or two fewer, and be at its end.
            assert run_killed(number, *words, str(out)) == [-signal.SIGKILL] or number >= changes - 4
            assert run_killed(0, *words, str(out))[1] == 0
            found = files(out)
            assert {name for name in {*found, *whole} if found.get(name) != whole.get(name)} == set(), number
            assert (out / STATE).exists()
            assert (out / REFERENCE).exists()


def test_two_at_a_time_make_the_same_files(wordy, recipe, released, cli, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv2quant.publishing.run._Run.measure", None)  # other processes have their own
    ran = cli("release", wordy, "--recipe", recipe, "-o", tmp_path / "out", "--jobs", 2, "-q")
    assert ran.code == 0, ran.err
    assert files(tmp_path / "out") == files(released)


def test_other_processes_end_with_the_one_that_is_killed():
    begun = """if True:
        import os, signal
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context
        from dsv2quant.publishing.run import _ready
        with ProcessPoolExecutor(1, get_context("spawn"), _ready, (1,)) as workers:
            print(workers.submit(os.getpid).result(), flush=True)
            signal.pause()
    """
    with subprocess.Popen([sys.executable, "-c", begun], cwd=ROOT, stdout=subprocess.PIPE, text=True) as ran:
        assert ran.stdout.readline().strip().isdecimal()
        ran.kill()
        assert ran.communicate(timeout=60)[0] == ""  # at an end: nobody holds the pipe any more


def test_what_fails_in_another_process_is_one_line(wordy, fox, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "release.yaml"
    path.write_text(f"artifacts: [Q8_0]\nevaluation: {{text: {fox}, ctx: 32, limit: 4}}\n"
                    "engines: [{engine: llama.cpp, windows: 1, ctx: 32}]\n")  # fmt: skip
    ran = cli("release", wordy, "--recipe", path, "-o", tmp_path / "out", "--jobs", 2, "-q")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "--engine llama.cpp: llama-perplexity is not on PATH" in ran.err


def test_the_pipelines_script_makes_a_release_and_uploads_it(wordy, fox, tmp_path):
    """With a hub of our own, that the commands of the script ask."""
    recipe = tmp_path / "release.yaml"
    recipe.write_text(f"artifacts: [fp8-channel, Q8_0]\nevaluation: {{text: {fox}, ctx: 32, limit: 4}}\n")
    with serve({}, tmp_path / "hf") as hub:
        environment = hub.environment | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_TOKEN": "x", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT), "MODEL": str(wordy), "RECIPE": str(recipe), "OUT": str(tmp_path / "out"),
            "NAMESPACE": "me",
        }  # fmt: skip
        ran = subprocess.run(["bash", ROOT / "examples/release.sh"], env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        sent = {name: set(hub.state.repos[f"me/wordy-{name}"].branches["main"][1]) for name in ("FP8-CHANNEL", "GGUF")}
        assert sent["FP8-CHANNEL"] >= {"model.safetensors", "config.json", "dsv2quant.json", "README.md"}
        assert sent["GGUF"] >= {"wordy-Q8_0.gguf", "wordy-Q8_0.gguf.json", "README.md"}
