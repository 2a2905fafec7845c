"""Ctrl-C: what is said of work that stops, and whether it is true."""

from __future__ import annotations

import importlib

import pytest

CONTINUES = "interrupted; the same command continues where it stopped"
FEW = ("--num-calibration-samples", "2", "--max-seq-length", "16")
CALIBRATE = ("calibrate", "{model}", "--calibration", "{text}", "-o", "{out}.safetensors", *FEW)
FP8 = ("convert", "{model}", "--fp8=channel", "-o", "{out}")


def last_line(cli, args, model, text, out) -> str:
    ran = cli(*(arg.format(model=model, text=text, out=out) for arg in args))
    assert ran.code == 130, ran.err
    return ran.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "place"),
    [
        (("plan", "{model}"), "dsv2quant.plan.make_plan"),
        (("generate", "{model}", "--prompt", "The"), "dsv2quant.completion.complete"),
        (("eval-ppl", "{model}", "--text", "{text}"), "dsv2quant.evaluate.measure.evaluate"),
        (("verify", "{model}"), "dsv2quant.verify.check"),
        (FP8, "dsv2quant.convert._write_shards"),
        (CALIBRATE, "dsv2quant.calib.collect._moe"),
    ],
)
def test_work_that_left_nothing_is_not_said_to_continue(args, place, wordy, fox, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(place, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    if args[0] == "calibrate":  # its first layer is dense
        monkeypatch.setattr("dsv2quant.calib.collect._attention", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert last_line(cli, args, wordy, fox, tmp_path / "out") == "interrupted"


@pytest.mark.parametrize(
    ("args", "place"),
    [(FP8, "dsv2quant.convert._write_small_files"), (CALIBRATE, "dsv2quant.calib.collect._moe")],
)
def test_work_that_is_kept_is_said_to_continue(args, place, wordy, fox, tmp_path, cli, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(place, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert last_line(cli, args, wordy, fox, tmp_path / "out") == CONTINUES
    assert cli(*(arg.format(model=wordy, text=fox, out=tmp_path / "out") for arg in args)).code == 0


def test_a_gguf_file_that_has_begun_is_said_to_continue(tmp_path, cli, monkeypatch):
    import tiny

    convert = importlib.import_module("dsv2quant.formats.gguf.convert")
    args = ("convert", "{model}", "--gguf", "F16", "-o", "{out}.gguf")
    monkeypatch.setattr(convert, "RECORD_EVERY", 1)
    with monkeypatch.context() as m:
        m.setattr(convert._Writer, "__exit__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        said = last_line(cli, args, tiny.MINI, "", tmp_path / "out")
    assert said == CONTINUES
