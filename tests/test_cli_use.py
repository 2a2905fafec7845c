"""What people type: mistakes that are told early and rightly, completion in their shell, terminals of few letters."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys

import click
import pytest
import tiny
from click.shell_completion import BashComplete, FishComplete, ZshComplete
from test_cli import modules_after

from dsv2quant.cli.main import VERBS, main
from dsv2quant.cli.main import cli as group

MISTAKES = [
    (("convert", "{lite}", "--fp8", "blok", "-o", "x"), "--fp8 blok: it takes block, channel, tensor, static"),
    (("plan", "--int4", "quarter", "{lite}"), "--int4 quarter: it takes mixed, pure, experts, or nothing, for mixed"),
    (("plan", "--fp8", "{lite}", "more"), "unexpected extra argument (more)"),
    (("plan", "{lite}", "--fp8=blok"), "'blok' is not one of 'block', 'channel', 'tensor', 'static'"),
    (("convrt", "{lite}"), "No such verb 'convrt'. Did you mean 'convert'?"),
    (("eval_ppl", "{lite}"), "Did you mean 'eval-ppl'?"),
    (("frobnicate",), "No such verb 'frobnicate'."),
    (("plan", "{lite}", "--targt", "vllm"), "--target"),
    (("convert", "{lite}", "-o", "x", "--device", "gpu"), "'gpu' is none of cpu, cuda and cuda:N, as cuda:1."),
    (("eval-ppl", "{lite}", "--device", "cpu:0"), "'cpu:0' is none of cpu, cuda and cuda:N, as cuda:1."),
    (("generate", "{lite}", "--prompt", "x", "--device", "cuda:x"), "'cuda:x' is none of cpu, cuda and cuda:N"),
    (("calibrate", "{lite}", "-o", "x", "--device", "mps"), "'mps' is none of cpu, cuda and cuda:N"),
    (("plan", "{lite}", "-v", "-q"), "--verbose and --quiet exclude each other"),
    (("plan", "{lite}", "--target", "transformers", "--tp", "2"), "--tp goes with vLLM and SGLang"),
    (("convert", "{lite}", "-o", "x", "--seed", "1"), "--seed: nothing of this recipe calibrates here"),
    (("convert", "{lite}", "-o", "x", "--num-calibration-samples", "9"), "--num-calibration-samples: nothing"),
    (("convert", "{lite}", "-o", "x", "--max-seq-length", "9"), "--max-seq-length: nothing of this recipe"),
    (("generate", "{lite}", "--prompt", "x", "--seed", "1"), "--seed goes with --temperature above 0"),
    (("generate", "{lite}", "--prompt", "x", "--top-p", "0.5"), "--top-p goes with --temperature above 0"),
    (("calibrate", "{lite}", "-o", "x", "--protocol", "llama.cpp", "--calibration", "a.txt", "--seed", "1"),
     "--seed goes with the default protocol"),
    (("bench", "model", "v2", "--revision", "main"), "--revision goes with a hub id: v2's weights are random"),
    (("bench", "model", "v2-lite", "--offline"), "--offline goes with a hub id"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message"), MISTAKES, ids=[" ".join(args).replace("{lite} ", "") for args, _ in MISTAKES]
)
def test_a_mistake_on_the_command_line_is_told(args, message, lite, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = cli(*(arg.format(lite=lite) for arg in args))
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        # Neither the model nor what the option needs is there: the cheaper check comes first.
        (("convert", "{no}", "-o", "x", "--fp8", "--int4"), 2, "exclude each other"),
        (("plan", "{no}", "--group-size", "64"), 2, "--method and --group-size go with --int4"),
        (("convert", "{no}", "-o", "x", "--int4", "--calibration", "nosuch"), 3, "nosuch: can't be read"),
        (("convert", "{no}", "-o", "x", "--int4", "--figure", "a.bmp"), 2, "--figure"),
        (("calibrate", "{no}", "-o", "x", "--calibration", "nosuch"), 3, "nosuch: can't be read"),
        (("eval-ppl", "{no}", "--text", "nosuch"), 3, "nosuch: can't be read"),
        (("generate", "{no}", "--prompt", "@nosuch"), 3, "nosuch: can't be read"),
        (("convert", "{no}", "-o", "x", "--device", "cuda"), 2, "--device cuda can't be used: there is no GPU driver"),
        (("eval-ppl", "{no}", "--device", "cuda:1"), 2, "--device cuda:1 can't be used: there is no GPU driver"),
    ],
)
def test_cheap_checks_come_before_opening_anything(args, code, message, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsv2quant.planning.options._has_driver", lambda: False)
    ran = cli(*(arg.format(no="not/there/at/all") for arg in args))
    assert (ran.code, message in ran.err) == (code, True), ran.err


def test_cheap_checks_do_not_import_torch(tmp_path):
    assert "torch" not in modules_after("eval-ppl", "x", "--text", str(tmp_path / "nosuch"))
    args = ("--int4", "--statistics", str(tmp_path / "no"), "-o", str(tmp_path / "out"))
    assert "torch" not in modules_after("convert", str(tiny.MINI), *args)
    for args in (("verify", "no/such/x"), ("generate", "no/such/x", "--prompt", "a"), ("eval-ppl", "no/such/x")):
        assert "torch" not in modules_after(*args)
    assert "torch" not in modules_after("calibrate", "x", "--calibration", str(tmp_path / "no"), "-o", "out")


def test_help_groups_many_options(cli):
    shown = cli("convert", "--help").out
    sections = [line[:-1] for line in shown.splitlines() if line.endswith(":") and line[0] != " "]
    assert sections == [
        "Examples", "Output", "FP8 and integers", "Consumers of FP8 and integers", "GGUF", "Budget", "Calibration",
        "Computing", "Hub", "Output style",
    ][1:]  # fmt: skip
    for verb in VERBS:
        command = group.get_command(click.Context(group), verb)
        options = [opt for p in command.params for opt in p.opts if isinstance(p, click.Option)]
        shown = cli(verb, "--help").out
        assert set(options) <= set(re.findall(r"(?<=[ ,])--?[a-z0-9-]+", shown))


# --- completion ---


def completions(words: list[str], incomplete: str, cls=BashComplete) -> list[tuple[str, str]]:
    found = cls(group, {}, "dsv2quant", "_DSV2QUANT_COMPLETE").get_completions(words, incomplete)
    return [(item.type, item.value) for item in found]


@pytest.mark.parametrize("cls", [BashComplete, ZshComplete, FishComplete])
def test_paths_names_and_devices_complete(cls):
    for words in (
        ["plan"], ["convert"], ["inspect"], ["verify"], ["eval-ppl"], ["generate"], ["calibrate"], ["bench", "model"],
        ["convert", "m", "-o"], ["convert", "m", "--recipe"], ["convert", "m", "--calibration"],
        ["convert", "m", "--statistics"], ["convert", "m", "--imatrix"], ["convert", "m", "--figure"],
        ["eval-ppl", "m", "--reference"], ["eval-ppl", "m", "--text"], ["verify", "m", "--source"],
        ["calibrate", "m", "--imatrix"], ["bench", "kernels", "--results"],
    ):  # fmt: skip
        assert completions(words, "exam", cls) == [("file", "exam")], words
    assert completions(["plan", "m", "--cache-dir"], "", cls) == [("dir", "")]
    assert [value for _, value in completions(["convert", "m", "--device"], "c", cls)] == ["cpu", "cuda"]
    assert completions(["convert", "m", "--fp8"], "b", cls) == [("file", "b"), ("plain", "block")]
    assert [value for _, value in completions([], "co", cls)] == ["compare", "convert"]
    assert completions(["convrt"], "x", cls) == []


def test_gguf_types_and_presets_complete():
    found = [value for _, value in completions(["convert", "m", "--gguf"], "")]
    assert {"Q4_K_M", "Q8_0", "BF16", "DSV2_Q4_K_M"} <= set(found)
    assert [value for _, value in completions(["plan", "m", "--gguf"], "q4_k_")] == ["Q4_K_M", "Q4_K_S"]


def test_bash_itself_completes_names_of_files(tmp_path):
    bash = shutil.which("bash")
    assert bash is not None
    (tmp_path / "my-model").mkdir()
    (tmp_path / "dsv2quant").write_text(f"#!{sys.executable}\nfrom dsv2quant.cli.main import main\nmain()\n")
    (tmp_path / "dsv2quant").chmod(0o755)
    # COMPREPLY empty and `compopt -o default` called is what makes readline complete a file's name.
    script = """
        eval "$(_DSV2QUANT_COMPLETE=bash_source dsv2quant)"
        compopt() { printf "compopt %s %s\n" "$@"; }
        COMP_WORDS=(dsv2quant plan my-); COMP_CWORD=2; _dsv2quant_completion dsv2quant; echo "${#COMPREPLY[@]}"
        COMPREPLY=()
        COMP_WORDS=(dsv2quant convert m --gguf Q8); COMP_CWORD=4; _dsv2quant_completion dsv2quant
        echo "${COMPREPLY[@]}"
    """
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [bash, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.stdout.splitlines() == ["compopt -o default", "0", "Q8_0"], ran.stderr


# --- terminals of few letters ---


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding, write_through=True)

    def bytes(self) -> bytes:
        return self.buffer.getvalue()


def run_in(encoding: str, monkeypatch, *args: object) -> tuple[int, bytes, bytes]:
    out, err = Terminal(encoding), Terminal(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["dsv2quant", *map(str, args)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0), out.bytes(), err.bytes()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_of_few_letters_never_fails(encoding, lite, wordy, tmp_path, monkeypatch):
    code, out, _ = run_in(encoding, monkeypatch, "convert", lite, "--fp8=channel", "-o", tmp_path / "out")
    assert (code, b" kB -> " in out) == (0, True), out
    for args in (
        ("plan", lite, "--fp8=channel"),
        ("plan", tiny.MINI, "--gguf", "BF16"),
        ("convert", "-h"),
        ("bench", "-h"),
    ):
        code, _, err = run_in(encoding, monkeypatch, *args)
        assert code == 0, err
    prompt = ("--prompt", "Zażółć “gęślą” → 日本", "--max-new-tokens", "1")
    assert run_in(encoding, monkeypatch, "generate", wordy, *prompt)[0] == 0
    code, out, err = run_in(encoding, monkeypatch, "plan", tmp_path / "日本→")
    assert (code, out) == (3, b"")
    assert b"??->: no such folder" in err
    code, out, err = run_in(encoding, monkeypatch, "plan", lite, "--日本")
    assert (code, b"No such option" in err) == (2, True)


def test_json_is_whole_in_any_encoding(tmp_path, monkeypatch):
    folder = tiny.write_checkpoint(tmp_path / "日本→", tiny.LITE)
    for encoding in ("ascii", "latin-1", "utf-8"):
        code, out, _ = run_in(encoding, monkeypatch, "inspect", folder, "--json")
        assert (code, json.loads(out.decode(encoding))["model"]) == (0, "日本→")


def test_a_path_that_is_not_utf8_is_shown_and_never_fails(tmp_path, monkeypatch):
    for args in (("plan", "no\udcff"), ("plan", "no\udcff", "--json"), ("inspect", "no\udcff.gguf")):
        code, out, err = run_in("utf-8", monkeypatch, *args)
        assert (code, out) == (3, b"")
        assert err.startswith(b"error: no\\udcff")
