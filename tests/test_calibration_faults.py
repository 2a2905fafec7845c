"""Calibration of a source, with files or into files that are not what they should be: made again, or one line."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
from calibrated import files, interrupt, layer_of, planned, run
from safetensors.numpy import load_file, save_file
from test_statistics import calibration

from dsv2quant.calib import awq, collect, layerwise
from dsv2quant.calib.calibrate import calibrate
from dsv2quant.calib.statistics import Statistics, digest_of, vectors
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError
from dsv2quant.formats.gguf import imatrix
from dsv2quant.planning.smoothing import SMOOTHING_FILE, Smoothing, smoothing_pairs

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ("--num-calibration-samples", "2", "--max-seq-length", "16", "-q")


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


@pytest.fixture(scope="module")
def made(lite, tmp_path_factory):
    """(checkpoint, its statistics file)."""
    checkpoint = open_checkpoint(lite)
    return checkpoint, calibrate(checkpoint, tmp_path_factory.mktemp("stats") / "s.safetensors", calibration()).path


def cut_short(checkpoint: Checkpoint, out: Path, layer: int = 2) -> None:
    """A calibration that ends in the middle of a layer."""
    original = collect._measured

    def measured(layer_, at, *args):
        return interrupt() if at == f"model.layers.{layer}" else original(layer_, at, *args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(collect, "_measured", measured)
        with pytest.raises(KeyboardInterrupt):
            calibrate(checkpoint, out, calibration())


# Another configuration


@pytest.mark.parametrize("change", [{"num_experts_per_tok": 2}, {"rope_theta": 5000}, {"rms_norm_eps": 1e-5}])
def test_statistics_are_of_one_configuration(change, made, tmp_path):
    model = tiny.write_checkpoint(tmp_path / "model", tiny.LITE)
    cut_short(open_checkpoint(model), tmp_path / "stats")
    (model / "config.json").write_text(json.dumps(tiny.LITE | change))
    other = open_checkpoint(model)
    with pytest.raises(InputError, match=r"stats\.work: holds an unfinished calibration of another model"):
        calibrate(other, tmp_path / "stats", calibration())
    with pytest.raises(InputError, match=r"statistics of lite with another config.json \(calibrate model\)"):
        Statistics(made[1]).check(other)


def test_weights_that_change_meanwhile_are_an_error(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(tiny.write_checkpoint(tmp_path / "model", tiny.LITE))
    original = collect._measured

    def meanwhile(*args):
        os.utime(checkpoint.folder / "model.safetensors", ns=(0, 0))
        return original(*args)

    monkeypatch.setattr(collect, "_measured", meanwhile)
    with pytest.raises(InputError, match="its weights changed"):
        calibrate(checkpoint, tmp_path / "stats", calibration())
    assert not (tmp_path / "stats").exists()


# Work that was damaged between two runs


@pytest.mark.parametrize("name", ["layer-00000.safetensors", "layer-00001.safetensors", "hidden-00002-ideal"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_a_damaged_piece_of_calibration_is_made_again(name, damage, made, tmp_path, caplog):
    checkpoint, whole = made
    cut_short(checkpoint, tmp_path / "stats")
    piece = tmp_path / "stats.work" / "layers" / name
    content = piece.read_bytes()
    if damage == "flipped":
        flipped(piece, len(content) - 5)
    else:
        piece.write_bytes(content[:-1] if damage == "truncated" else b"")
    caplog.clear()
    calibrate(checkpoint, tmp_path / "stats", calibration())
    assert caplog.messages == [f"{piece}: is not what was written to it; what it held is made again"]
    assert (tmp_path / "stats").read_bytes() == whole.read_bytes()
    assert not (tmp_path / "stats.work").exists()


def test_a_damaged_piece_of_gptq_is_made_again(grouped, tmp_path, monkeypatch, caplog):
    plan, original = planned(grouped, "int4-experts"), layerwise.quantize_layer
    run(plan, tmp_path / "whole")
    with monkeypatch.context() as m:
        m.setattr(layerwise, "quantize_layer", lambda job, *a: interrupt() if layer_of(job) == 1 else original(job, *a))
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path / "out")
    flipped(tmp_path / "out" / ".dsv2quant-work" / "gptq" / "layer-00000.safetensors", -5)
    run(plan, tmp_path / "out")
    assert "is not what was written to it" in caplog.text
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_damaged_statistics_and_folds_of_awq_are_made_again(grouped, tmp_path, monkeypatch, caplog):
    plan = planned(grouped, "int4-pure", "awq")
    convert(plan, tmp_path / "whole", command="", calibration=calibration())
    with monkeypatch.context() as m:
        m.setattr("dsv2quant.conversion.convert._write_small_files", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(plan, tmp_path / "out", command="", calibration=calibration())
    work, smoothing = tmp_path / "out" / ".dsv2quant-work", []
    flipped(work / "statistics.safetensors", -5)
    flipped(work / "awq" / "layer-00001.safetensors", -5)
    for path in (tmp_path / "out").glob("*.safetensors"):
        path.unlink()
    original = awq.smoothing_pairs
    monkeypatch.setattr(
        awq, "smoothing_pairs", lambda config, layer: (smoothing.append(layer), original(config, layer))[1]
    )
    convert(plan, tmp_path / "out", command="", calibration=calibration())
    assert smoothing == [1]
    assert "(calibrate again); it is made again" in caplog.text
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# Statistics that are not true


def forged(source: Path, out: Path, change) -> Path:
    """A copy, changed and with a digest of its own: `change(about, arrays)`."""
    arrays, about = load_file(source), Statistics(source).about
    change(about, arrays)
    if "digest" in about:
        about["digest"] = digest_of(about, sorted(arrays.items()))
    save_file(arrays, out, {"statistics": json.dumps(about)})
    return out


GATE, EXPERT = "model.layers.1.mlp.gate", "model.layers.1.mlp.experts.3.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about, a: a[f"{GATE}.square"].__imul__(-1), f"{GATE}.square is not finite, or negative"),
        (lambda about, a: a[f"{GATE}.amax"].__imul__(-1), f"{GATE}.amax is not finite, or negative"),
        (lambda about, a: a[f"{EXPERT}.weighted_square"].__imul__(-1), "weighted_square is not finite, or negative"),
        (lambda about, a: a[f"{GATE}.amax"].fill(np.nan), f"{GATE}.amax is not finite, or negative"),
        (lambda about, a: a[f"{GATE}.amax"].fill(0), f"{GATE}.square and .amax can't be of the same 60 tokens"),
        (lambda about, a: a[f"{GATE}.amax"].__imul__(9), "can't be of the same 60 tokens at channel 0"),
        (lambda about, a: [a[f"{GATE}.{s}"].fill(0) for s in ("amax", "square")], f"{GATE}.amax is all zeros"),
        (lambda about, a: a.pop(f"{GATE}.amax"), f"holds no {GATE}.amax"),
        (lambda about, a: a.update(x=np.ones(3, np.float32)), "holds unknown x"),
        (lambda about, a: a.update({f"{GATE}.amax": a[f"{GATE}.amax"][:9]}), r"float32 \[9\], not float32 \[64\]"),
        (lambda about, a: a.update({f"{GATE}.amax": a[f"{GATE}.amax"].astype("f8")}), "float64"),
        (lambda about, a: about.pop("fingerprint"), "its header is incomplete: fingerprint"),
        (lambda about, a: about.pop("digest"), "its header is incomplete: digest"),
        (lambda about, a: about["model"].pop("config"), "its header is incomplete: model"),
        (lambda about, a: about["counts"].update({GATE: -1}), "its header is incomplete: counts"),
        (lambda about, a: about["counts"].update({GATE: 61}), f"{GATE} was measured on 61 of 60 tokens"),
        (lambda about, a: about["counts"].pop(GATE), f"holds no count of {GATE}"),
        (lambda about, a: about["counts"].update(x=1), "tokens of x don't add up"),
        (lambda about, a: about["calibration"].update(ctx=1e400), "its header is incomplete: calibration"),
        (lambda about, a: about.update(schema="dsv2quant.statistics/1"), "calibrate again with this version"),
    ],
)  # fmt: skip
def test_statistics_that_can_not_be_true_are_refused(change, message, made, tmp_path):
    checkpoint, path = made
    with pytest.raises(InputError, match=message):
        Statistics(forged(path, tmp_path / "s", change)).check(checkpoint)


def test_convert_refuses_them_before_it_writes(made, lite, tmp_path, cli):
    path = forged(made[1], tmp_path / "s", lambda about, a: a[f"{GATE}.square"].__imul__(-1))
    ran = cli("convert", lite, "--fp8=static", "--statistics", path, "-o", tmp_path / "out", "-q")
    assert (ran.code, ran.err) == (
        3, f"error: {path}: {GATE}.square is not finite, or negative (calibrate again)\n"
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_vectors_are_those_of_the_file(made):
    checkpoint, path = made
    assert {name: len(array) for name, array in load_file(path).items()} == vectors(checkpoint.config, False)


def damages(content: bytes, count: int):
    """Copies with one byte changed or cut off, half of them in the first quarter."""
    rng = random.Random(0)
    for i in range(count):
        at = rng.randrange(len(content) // (4 if i % 2 else 1))
        bad = bytes([content[at] ^ 1 << rng.randrange(8)])
        yield content[:at] if i % 5 == 0 else content[:at] + bad + content[at + 1 :]


def test_no_byte_of_statistics_changes_unseen(made, tmp_path):
    checkpoint, path = made
    for content in damages(path.read_bytes(), 60):
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(InputError):
            Statistics(tmp_path / "s").check(checkpoint)


def test_damaged_folds_are_one_line(made, tmp_path):
    config, rng = made[0].config, np.random.default_rng(0)
    tensors = {}
    for pair in smoothing_pairs(config, 1)[:6]:
        tensors |= Smoothing.of(pair, rng.integers(-8, 9, pair.consumers[0].shape[1]).astype(np.int8))
    path = tmp_path / SMOOTHING_FILE
    path.write_bytes(Smoothing(tensors).to_bytes())
    opened = Smoothing.open(path, config).tensors
    assert opened.keys() == tensors.keys()
    assert all(np.array_equal(opened[name], tensors[name]) for name in tensors)
    for content in damages(path.read_bytes(), 100):
        path.write_bytes(content)
        with pytest.raises(InputError, match=SMOOTHING_FILE):
            Smoothing.open(path, config)


# Files in the way


def test_no_input_is_an_output(tmp_path, fox, cli):
    model = tiny.write_checkpoint(tmp_path / "model", tiny.WORDY)
    text = tmp_path / "text.txt"
    text.write_bytes(fox.read_bytes())
    os.link(model / "tokenizer.json", tmp_path / "hard")
    (tmp_path / "soft").symlink_to(model / "config.json")
    before = files(tmp_path)
    stats, weights = tmp_path / "s.safetensors", model / "model.safetensors"
    named = "is named for two outputs"
    for outputs, message in (
        (["-o", weights], "is an input"),
        (["-o", model / "new.safetensors"], "would lie among the checkpoint's weights"),
        (["-o", text], "is an input"),
        (["-o", tmp_path / "hard"], "is an input"),
        (["-o", tmp_path / "soft"], "is an input"),
        (["-o", stats, "--imatrix", weights], "is there and no importance matrix"),
        (["-o", stats, "--imatrix", text], "is there and no importance matrix"),
        (["-o", tmp_path / "x.svg", "--figure", tmp_path / "x.svg"], named),
    ):
        for force in ([], ["--force"]):
            ran = cli("calibrate", model, "--calibration", text, *FEW, *outputs, *force)
            assert ran.code == 3
            assert ran.err.count("\n") == 1
            assert message in ran.err or "exists" in ran.err
            assert files(tmp_path) == before


def test_force_replaces_statistics_and_nothing_else(made, tmp_path):
    checkpoint, path = made
    out = tmp_path / "out"
    for content in (b"letters", b"", path.read_bytes()[:-9], (checkpoint.folder / "model.safetensors").read_bytes()):
        out.write_bytes(content)
        with pytest.raises(InputError, match=r"out: is there, and not a statistics file.*remove it yourself"):
            calibrate(checkpoint, out, calibration(), force=True)
        assert out.read_bytes() == content
    out.unlink()
    imatrix.write(out, imatrix.Imatrix({}, (), 1, 1))
    with pytest.raises(InputError, match="not a statistics file"):
        calibrate(checkpoint, out, calibration(), force=True)
    out.write_bytes(
        forged(path, tmp_path / "old", lambda about, a: about.update(schema="dsv2quant.statistics/1")).read_bytes()
    )
    calibrate(checkpoint, out, calibration(), force=True)
    assert out.read_bytes() == path.read_bytes()


def test_a_work_folder_of_others_is_left_alone(made, tmp_path):
    checkpoint, work = made[0], tmp_path / "out.work"
    target = tmp_path / "target"
    target.write_text("mine")

    def file():
        work.write_text("mine")

    def link():
        work.symlink_to(tmp_path)

    def photos():
        (work / "photos").mkdir(parents=True)

    def layers():
        (work / "layers").mkdir(parents=True), (work / "layers" / "mine").write_text("")

    def state():
        work.mkdir(), (work / "state.json").symlink_to(target)

    def both():
        layers(), (work / "state.json").write_text('{"schema": "theirs"}\n')

    for make in (file, link, photos, layers, state, both):
        make()
        before = files(tmp_path)
        with pytest.raises(InputError, match=r"out\.work"):
            calibrate(checkpoint, tmp_path / "out", calibration(), force=True)
        assert files(tmp_path) == before
        work.rename(tmp_path / make.__name__)
    (tmp_path / "out").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="is there and no file"):
        calibrate(checkpoint, tmp_path / "out", calibration(), force=True)
