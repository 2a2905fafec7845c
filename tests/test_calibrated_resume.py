"""Calibrated conversions, interrupted and repeated: kills, Ctrl-C, lost files and full disks change no byte."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibrated import (
    CTX,
    WINDOWS,
    calibration,
    files,
    files_no_larger_than,
    interrupt,
    killer,
    layer_of,
    planned,
    recorded,
    run,
)
from test_convert import contents

from dsv2quant.calib import gptq, layerwise, streams
from dsv2quant.calib.calibration import Calibration
from dsv2quant.calib.hidden import Stream
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError
from dsv2quant.planning.recipe import CALIBRATED
from dsv2quant.storage.durable import MANIFEST_FILE, STATE_FILE, WORK_FOLDER

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def command(wordy: Path, fox: Path) -> Callable[..., list[str]]:
    """`command(out)`: a calibrated conversion on the command line, on windows of 32 tokens."""
    options = ["--group-size", "32", "--target", "transformers", "--max-shard-size", "400KB", "-q"]
    options += ["--calibration", str(fox), "--max-seq-length", "32"]

    def made(out: Path, count: int = 12) -> list[str]:
        return ["convert", str(wordy), "--int4=pure", "-o", str(out), "--num-calibration-samples", str(count), *options]

    return made


# The same bytes, or another artifact


def test_two_runs_give_the_same_bytes(grouped, tmp_path):
    run(planned(grouped, max_shard_size=100_000), tmp_path / "a")
    run(planned(grouped, max_shard_size=100_000), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("model-*"))) > 2


def test_how_sums_are_rounded_shows_in_no_manifest(grouped, tmp_path, monkeypatch):
    """The number of threads decides in which order torch adds, and with it the last digits of an error."""
    run(planned(grouped), tmp_path / "a")
    exact = gptq.relative_error
    monkeypatch.setattr(gptq, "relative_error", lambda *args: exact(*args) * (1 + sys.float_info.epsilon))
    run(planned(grouped), tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    "other",
    [
        calibration(seed=1),
        replace(calibration(), ids=calibration().ids.reshape(2 * WINDOWS, CTX // 2)),
        replace(calibration(), seed=1),
        replace(calibration(), text_sha256="f" * 64),
    ],
    ids=["tokens", "shorter windows", "seed", "text"],
)
def test_another_calibration_is_another_artifact(other, grouped, tmp_path):
    plan = planned(grouped, "int4-experts")
    with pytest.MonkeyPatch.context() as m:
        m.setattr("dsv2quant.conversion.convert._write_small_files", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(InputError, match="holds an unfinished conversion with another"):
        run(plan, tmp_path / "out", other)
    assert files(tmp_path / "out") == before
    assert not run(plan, tmp_path / "out").already_complete
    assert run(plan, tmp_path / "out").already_complete
    with pytest.raises(InputError, match="is not empty"):
        run(plan, tmp_path / "out", other)
    first = contents(tmp_path / "out")
    again = run(plan, tmp_path / "out", other, force=True)
    assert not again.already_complete
    same_tokens = other.ids.shape == (WINDOWS, CTX) and (other.ids == calibration().ids).all()
    assert (contents(tmp_path / "out")["model.safetensors"] == first["model.safetensors"]) == same_tokens
    assert contents(tmp_path / "out")[MANIFEST_FILE] != first[MANIFEST_FILE]


def test_a_calibrated_plan_needs_a_calibration(grouped, tmp_path):
    with pytest.raises(ValueError, match="recipe int4-pure needs calibration"):
        convert(planned(grouped), tmp_path / "out", command="")
    assert not (tmp_path / "out").exists()


# Interruptions


def test_killed_at_20_moments_and_resumed_the_bytes_are_the_same(command, tmp_path):
    with killer() as run_killed:
        run_killed(0, *command(tmp_path / "first"))  # counts changes of imports, too
        changes, status = run_killed(0, *command(tmp_path / "whole"))
        assert status == 0
        expected = contents(tmp_path / "whole")
        assert len([name for name in expected if name.startswith("model-")]) == 3
        # Few of the changes are calibration's, which keeps a layer's matrices when it is done with it.
        rng, calibrating = random.Random(0), 0
        early, late = range(1, 40), range(40, changes + 1)
        for n in sorted(rng.sample(early, 10) + rng.sample(late, 10)):
            out = tmp_path / f"out-{n}"
            assert run_killed(n, *command(out)) == [-signal.SIGKILL]
            left = files(out) if out.exists() else {}
            if "config.json" in left:
                assert expected.items() <= left.items()
            else:
                with pytest.raises(InputError):
                    open_checkpoint(out)
            assert all(left[name] == expected[name] for name in expected if name in left)
            calibrating += any(WORK_FOLDER in name for name in left) and not any("model-" in name for name in left)
            assert run_killed(0, *command(out))[1] == 0
            assert contents(out) == expected  # no work folder, no state file
        assert 3 <= calibrating <= 12


def interrupt_in_layer(m: pytest.MonkeyPatch, layer: int) -> None:
    """Ctrl-C at the first GPTQ of a layer."""
    original = layerwise.quantize_layer

    def quantize_layer(job, *args):
        if layer_of(job) == layer:
            m.setattr(gptq, "quantize", interrupt)
        original(job, *args)

    m.setattr(layerwise, "quantize_layer", quantize_layer)


def calibrated_layers(m: pytest.MonkeyPatch) -> list[int]:
    """Layers that are calibrated from here on, in the order in which they will be; not those gone through again."""
    original, layers = layerwise.quantize_layer, []

    def quantize_layer(job, *args):
        if any(method in CALIBRATED for _, _, method in job.choices.values()):
            layers.append(layer_of(job))
        original(job, *args)

    m.setattr(layerwise, "quantize_layer", quantize_layer)
    return layers


@pytest.mark.parametrize("layer", [0, 1])
def test_ctrl_c_while_calibrating_exits_130_and_the_next_run_continues(
    layer, command, tmp_path, cli, monkeypatch, caplog
):
    options = [option for option in command(tmp_path / "out") if option != "-q"]
    with monkeypatch.context() as m:
        interrupt_in_layer(m, layer)
        ran = cli(*options, "-q")
    assert ran.code == 130
    assert ran.err.strip() == "interrupted"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {STATE_FILE, WORK_FOLDER}
    layers = calibrated_layers(monkeypatch)
    assert cli(*options, "-v").code == 0
    assert layers == list(range(layer, 2))
    assert (f"calibration continues at layer {layer} of 2" in caplog.messages) == (layer > 0)
    assert cli(*command(tmp_path / "whole")).code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_calibration_is_not_repeated_for_shards_that_are_missing(grouped, tmp_path, monkeypatch):
    plan = planned(grouped, max_shard_size=100_000)
    with monkeypatch.context() as m:
        m.setattr("dsv2quant.conversion.convert._write_files", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path / "out")
    with monkeypatch.context() as m:
        m.setattr(layerwise, "quantize_layer", lambda *args: pytest.fail("calibrates again"))
        resumed = run(plan, tmp_path / "out")
    whole = run(plan, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert resumed.outcomes == whole.outcomes


@pytest.fixture(params=["snapshots", "layers gone through again"])
def snapshots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether hidden states are kept behind each layer, or never."""
    kept = request.param == "snapshots"
    monkeypatch.setattr(streams, "SNAPSHOT_AFTER", 0.0 if kept else float("inf"))
    return kept


@pytest.mark.parametrize("lost", ["hidden-00002-real", "hidden-00002-ideal", "layer-00000.safetensors"])
@pytest.mark.parametrize("damaged", [False, True], ids=["lost", "damaged"])
def test_what_is_lost_of_the_work_folder_is_made_again(lost, damaged, snapshots, grouped, tmp_path, monkeypatch):
    plan = planned(grouped)
    with monkeypatch.context() as m:
        interrupt_in_layer(m, 2)
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path / "out")
    path = tmp_path / "out" / WORK_FOLDER / "gptq" / lost
    assert path.exists() == (snapshots or lost.startswith("layer"))
    if damaged and path.exists():
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    else:
        path.unlink(missing_ok=True)
    layers = calibrated_layers(monkeypatch)
    run(plan, tmp_path / "out")
    assert layers == ([0, 1, 2] if lost.startswith("layer") else [2])
    run(plan, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_was_made_of_a_layer_is_gone_through_again_to_the_last_bit(grouped, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "SNAPSHOT_AFTER", float("inf"))
    plan = planned(grouped, "int4-mixed")
    with monkeypatch.context() as m:
        whole = recorded(m)
        run(plan, tmp_path / "whole")
    with monkeypatch.context() as m:
        interrupt_in_layer(m, 2)
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path / "out")
    again = recorded(monkeypatch)
    run(plan, tmp_path / "out")
    assert whole.keys() == again.keys()
    assert all(torch.equal(states, again[at]) for at, states in whole.items())


@pytest.mark.parametrize(
    # With layer 0 behind it: two snapshots, a layer, and a layer more.
    ("owner", "name", "calls", "repeated"),
    [(Stream, "write", 3, [1, 2]), (streams, "save_layer", 2, [1, 2])],
    ids=["before its streams are kept", "before it is saved"],
)
def test_interrupted_at_a_layers_end_no_finished_layer_is_repeated(
    owner, name, calls, repeated, grouped, tmp_path, monkeypatch
):
    monkeypatch.setattr(streams, "SNAPSHOT_AFTER", 0.0)
    original, left = getattr(owner, name), iter(range(1, calls))
    plan = planned(grouped)
    with monkeypatch.context() as m:
        m.setattr(owner, name, lambda *args: original(*args) if next(left, None) else interrupt())
        with pytest.raises(KeyboardInterrupt):
            run(plan, tmp_path / "out")
    layers = calibrated_layers(monkeypatch)
    run(plan, tmp_path / "out")
    assert layers == repeated


# Full disks


@pytest.mark.parametrize(
    # A snapshot is 32 × 128 float32 for each window, 16 kB; layer 0's matrices take 50 kB, layer 1's 120 kB.
    ("count", "nbytes", "layers"),
    [(12, 150_000, 0), (2, 80_000, 1)],
    ids=["hidden states", "a layer"],
)
def test_a_full_disk_while_calibrating_ends_in_one_line_and_resumes(
    count, nbytes, layers, command, tmp_path, cli, monkeypatch
):
    monkeypatch.setattr(streams, "SNAPSHOT_AFTER", 0.0)
    out = tmp_path / "out"
    with files_no_larger_than(nbytes):
        ran = cli(*command(out, count))
    assert ran.code == 3
    assert f"error: {out}: can't be written: File too large (free space and run the same command again" in ran.err
    assert ran.err.count("\n") == 1
    assert {p.name for p in out.iterdir()} == {STATE_FILE, WORK_FOLDER}
    assert len(list((out / WORK_FOLDER / "gptq").glob("layer-*.safetensors"))) == layers
    assert cli(*command(out, count)).code == 0
    assert cli(*command(tmp_path / "whole", count)).code == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_hidden_states_have_their_disk_space_before_they_are_mapped(tmp_path):
    # Writing to a hole of a mapped file on a full disk would kill the process with SIGBUS.
    with files_no_larger_than(100_000), pytest.raises(OSError, match="File too large"):
        Stream(1000, 300, "cpu", tmp_path)
    before = os.statvfs(tmp_path).f_bfree
    stream = Stream(100_000, 300, "cpu", tmp_path)
    statvfs = os.statvfs(tmp_path)
    assert (before - statvfs.f_bfree) * statvfs.f_frsize >= 0.9 * stream.nbytes
    assert not list(tmp_path.iterdir())  # nothing is left of it where the process is killed


def test_the_space_check_counts_the_work_folder(grouped, tmp_path, monkeypatch):
    def needed(method: str | None, using: Calibration | None = None) -> int:
        with monkeypatch.context() as m:
            m.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
            with pytest.raises(InputError, match="the disk has 0 free") as refused:
                convert(planned(grouped, "int4-experts", method), tmp_path / "out", command="", calibration=using)
        assert files(tmp_path / "out") == {}
        return int(re.search(r"needs ([\d,]+) bytes", str(refused.value))[1].replace(",", ""))

    usage = shutil.disk_usage(tmp_path)
    plan = planned(grouped, "int4-experts")
    encoded = sum(line.nbytes for line in plan.entries if line.method == "gptq")
    one = (3 + 2 * 2) * 4 * CTX * 128  # of a window three streams, and two snapshots of two of them
    longer = len("gptq") - len("rtn") + len("- gptq\n")  # the model card shows the recipe, and has a tag
    assert needed(None, calibration()) - needed("rtn") == encoded + WINDOWS * one + longer
    assert needed(None, calibration(100)) - needed(None, calibration()) == (100 - WINDOWS) * one
