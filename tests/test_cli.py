"""The command itself: help, exit codes, and what it imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dsv2quant.cli.main import VERBS


def modules_after(*args: str) -> set[str]:
    """Names of the modules that a run of the command has loaded when it exits."""
    code = (
        "import sys\nfrom dsv2quant.cli.main import main\n"
        f"sys.argv = ['dsv2quant', *{list(args)!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    print(*sys.modules, file=sys.stderr)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ran.stderr.split())


@pytest.mark.parametrize(
    "args",
    [
        ("--help",),
        ("--version",),
        *((verb, "--help") for verb in VERBS),
        ("bench", "kernels", "-h"),
        ("bench", "model", "-h"),
    ],
)
def test_help_imports_nothing_heavy(args):
    assert not modules_after(*args) & {"torch", "numpy", "numba", "huggingface_hub", "yaml", "tqdm", "tokenizers"}


def test_planning_does_not_import_torch_or_numba(lite):
    assert not modules_after("plan", str(lite)) & {"torch", "numba", "transformers"}


def test_converting_on_the_cpu_does_not_import_torch(lite, tmp_path):
    assert "torch" not in modules_after("convert", str(lite), "--fp8=channel", "-o", str(tmp_path / "out"), "-q")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_shows_an_example(verb, cli):
    ran = cli(verb, "--help")
    assert ran.code == 0
    assert "Example" in ran.out
    assert f"dsv2quant {verb}" in ran.out


def test_help_names_every_verb(cli):
    ran = cli("--help")
    assert ran.code == 0
    assert all(verb in ran.out for verb in VERBS)


@pytest.mark.parametrize("args", [(), ("quantise",), ("plan",), ("plan", "--no-such-option", "x")])
def test_wrong_usage_exits_with_2(args, cli):
    ran = cli(*args)
    assert ran.code == 2
    assert "Usage:" in ran.err or "Usage:" in ran.out
    assert "Traceback" not in ran.err


def test_a_reader_that_leaves_is_no_error(lite):
    command = f"{sys.executable} -m dsv2quant inspect {lite} | head -1"
    ran = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert ran.stderr == ""
    assert ran.stdout.startswith("lite: DeepseekV2ForCausalLM")


def test_progress_goes_to_stderr_and_can_be_silenced(lite, tmp_path, cli, monkeypatch):
    ran = cli("convert", lite, "--fp8=channel", "-o", tmp_path / "out", "-q")
    assert (ran.out, ran.err) == ("", "")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    ran = cli("convert", lite, "--fp8=channel", "-o", tmp_path / "again")
    assert ran.err == ""
    assert ran.out.count("\n") == 1


def test_the_progress_bar_shows_rate_and_time_left(capsys, monkeypatch):
    from dsv2quant.cli import terminal

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("tqdm.std.time", iter(range(0, 1000, 10)).__next__)  # ten seconds between any two looks
    with terminal.progress_bar(4000, "B", "convert", quiet=False) as advance:
        advance(1000)
        advance(1000)
    shown = capsys.readouterr().err
    assert "convert:  50%" in shown
    assert "B/s]" in shown
    assert "<" in shown
