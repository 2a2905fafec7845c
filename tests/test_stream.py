"""`convert --stream-hub`: shard by shard from a small hub of our own, with the bytes of a whole snapshot."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from hub_server import COMMIT, Repo, Served, serve, use
from huggingface_hub import constants
from safetensors.torch import load_file

import dsv2quant as dq
from dsv2quant.errors import InputError
from dsv2quant.storage import hub_errors, stream
from dsv2quant.storage.stream import Stream

SHARDS = 8


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """dsv2-mini in eight shards, in the order in which a model has its tensors."""
    tensors = {}
    for path in sorted(tiny.MINI.glob("*.safetensors")):
        tensors |= load_file(path)
    config = json.loads((tiny.MINI / "config.json").read_text())
    ordered = {weight.spec.name: tensors[weight.spec.name] for weight in dq.open(tiny.MINI).weights}
    return tiny.write_checkpoint(tmp_path_factory.mktemp("sharded") / "mini", config, ordered, SHARDS)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def hub(sharded, tmp_path, monkeypatch) -> Iterator[Served]:
    """A hub that has it in owner/name; this process asks it, and waits for nothing."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(hub_errors, "PAUSE", 0)
    with serve(contents(sharded), tmp_path / "hf") as served:
        use(served, monkeypatch)
        yield served


def fetched(hub: Served) -> list[str]:
    """Shards that were downloaded whole, or to their end, in order."""
    return [name for name, size in hub.sent if name.endswith(".safetensors") and size > 100_001]


def is_as_of_a_snapshot(made: Path, **options) -> None:
    """Raise AssertionError where an artifact of owner/name is not, in every byte, what its snapshot becomes."""
    other = made.parent / "of-a-snapshot" / made.name
    dq.convert("owner/name", other, **options)
    ours, theirs = (path if path.is_dir() else path.parent for path in (made, other))
    expected = contents(theirs)
    assert len(expected) > 1
    assert {name: content for name, content in contents(ours).items() if name in expected} == expected
    assert not list(ours.glob("*.partial"))


OPTIONS = [
    {"scheme": "fp8-block", "max_shard_size": "2MB"},
    {"scheme": "int4-pure", "method": "rtn"},
    {"gguf": "Q8_0"},
    {"gguf": "Q4_K_M", "split_max_size": "2MB"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_the_bytes_are_those_of_a_snapshot_and_the_disk_holds_a_few_shards(
    options, hub, tmp_path, monkeypatch
):  # fmt: skip
    most, fetch = [], Stream.fetch

    def watched(self: Stream, file: str) -> None:
        fetch(self, file)  # files grow by it alone: when it ends is when they are largest
        most.append(0)
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # dropped this moment
                most[-1] += path.stat().st_size if path.suffix in (".safetensors", ".incomplete") else 0
        assert not list(Path(hub.environment["HF_HOME"]).rglob("model-*.safetensors"))

    monkeypatch.setattr(Stream, "fetch", watched)
    out = tmp_path / ("out.gguf" if "gguf" in options else "out")
    dq.convert("owner/name", out, stream_hub=True, **options)
    assert sorted(fetched(hub)) == sorted(name for name in hub.files if name.endswith(".safetensors"))
    sizes = sorted(len(content) for name, content in hub.files.items() if name.endswith(".safetensors"))
    assert most
    assert max(most) <= sum(sizes[-3:])  # one that a job still waits over, the one in use, the next
    assert not Path(f"{out}.hub").exists()
    monkeypatch.undo()
    use(hub, monkeypatch)
    is_as_of_a_snapshot(out, **options)


def test_the_next_shard_comes_while_one_is_converted(hub, tmp_path, monkeypatch):
    begun, dropped, changed, fetch, drop = [], [], threading.Condition(), Stream.fetch, Stream.drop

    def noted(self: Stream, file: str) -> None:
        with changed:
            begun.append(file)
            changed.notify_all()
        fetch(self, file)

    def waiting(self: Stream, file: str, kept: object) -> None:
        dropped.append(file)
        with changed:  # the last job of a shard ends here, when a further one is on its way
            assert changed.wait_for(lambda: len(begun) > min(len(dropped), SHARDS - 1), 30)
        drop(self, file, kept)

    monkeypatch.setattr(Stream, "fetch", noted)
    monkeypatch.setattr(Stream, "drop", waiting)
    dq.convert("owner/name", tmp_path / "out", scheme="fp8-channel", stream_hub=True)
    assert len(dropped) == SHARDS


def test_tensors_scattered_over_shards_hold_few_of_them(sharded, tmp_path, monkeypatch):
    """In the alphabetical order of some tools layer 10 lies beside layer 1, and a weight's codes and scales apart."""
    config = tiny.GROUPED | {"num_hidden_layers": 12}
    weights = tiny.random_weights(config)
    source = tiny.write_checkpoint(tmp_path / "s", config, {name: weights[name] for name in sorted(weights)}, 10)
    held, fetch = [], Stream.fetch

    def watched(self: Stream, file: str) -> None:
        fetch(self, file)
        held.append(len(list(self.folder.glob("*.safetensors"))))

    monkeypatch.setattr(Stream, "fetch", watched)
    with serve(contents(source), tmp_path / "hf") as served:
        use(served, monkeypatch)
        dq.convert("owner/name", tmp_path / "out", scheme="fp8-channel", stream_hub=True)
        is_as_of_a_snapshot(tmp_path / "out", scheme="fp8-channel")
    assert len(held) == 10
    assert max(held) <= 3


def test_block_fp8_whose_scales_lie_in_another_shard(tmp_path, monkeypatch):
    source = tiny.write_checkpoint(tmp_path / "plain", tiny.GROUPED)
    dq.convert(source, tmp_path / "fp8", scheme="fp8-block", targets=("vllm",))
    tensors = load_file(tmp_path / "fp8/model.safetensors")
    order = sorted(tensors, key=lambda name: (name.endswith("_scale_inv"), name))
    config = json.loads((tmp_path / "fp8/config.json").read_text())
    parts = tiny.write_checkpoint(tmp_path / "parts", config, {name: tensors[name] for name in order}, 3)
    with serve(contents(parts), tmp_path / "hf") as served:
        use(served, monkeypatch)
        dq.convert("owner/name", tmp_path / "out", scheme="int4-pure", method="rtn", stream_hub=True)
        is_as_of_a_snapshot(tmp_path / "out", scheme="int4-pure", method="rtn")


def test_statistics_serve_what_calibrates_and_are_held_against_the_weights(wordy, fox, tmp_path, monkeypatch):
    weights = load_file(wordy / "model.safetensors")
    source = tiny.write_checkpoint(tmp_path / "source", tiny.WORDY, weights, 3)
    stats = tmp_path / "stats.safetensors"
    dq.calibrate(source, stats, text=fox, samples=8, length=32)
    options = {"scheme": "fp8-static", "statistics": stats}
    with serve(contents(source), tmp_path / "hf") as served:
        use(served, monkeypatch)
        dq.convert("owner/name", tmp_path / "out", stream_hub=True, **options)
        is_as_of_a_snapshot(tmp_path / "out", **options)
        weights = {name: tensor.flip(0) for name, tensor in weights.items()}
        other = tiny.write_checkpoint(tmp_path / "other", tiny.WORDY, weights, 3)
        served.state.repos["owner/other"] = Repo(contents(other))
        with pytest.raises(InputError, match="statistics of another model"):
            dq.convert("owner/other", tmp_path / "out2", stream_hub=True, **options)
    assert not (tmp_path / "out2/config.json").exists()


# --- continued ---


def environment(hub: Served) -> dict[str, str]:
    return hub.environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}


def killed_at(hub: Served, number: int, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).parent / "killer.py"), str(number), *map(str, args)]
    return subprocess.run(command, env=environment(hub), capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", [("--fp8", "--max-shard-size", "2MB"), ("--gguf", "Q8_0")], ids=lambda o: o[0])
def test_killed_and_continued_it_ends_with_the_same_bytes(options, hub, tmp_path):
    suffix = ".gguf" if "--gguf" in options else ""
    args = ("convert", "owner/name", *options, "--stream-hub", "-q", "-o")
    ran = killed_at(hub, 0, *args, tmp_path / f"whole{suffix}")
    assert ran.returncode == 0, ran.stderr
    changes = int(ran.stdout.split()[-1])
    hub.sent.clear()
    out, codes = tmp_path / f"out{suffix}", []
    for share in (0.1, 0.3, 0.4, 0.5, 0.6, 0):  # of the changes that a whole run makes; the last is not killed
        ran = killed_at(hub, int(changes * share), *args, out)
        codes.append(ran.returncode)
        assert len(list(Path(f"{out}.hub").glob("*.safetensors"))) <= 2
    assert codes[:3] == [-signal.SIGKILL] * 3
    assert codes[-1] == 0, ran.stderr
    if suffix:
        assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
        manifests = (json.loads(Path(f"{path}.json").read_text()) for path in (out, tmp_path / "whole.gguf"))
        assert len({manifest["source"]["identity"]["weights"] for manifest in manifests}) == 1
    else:
        assert contents(out) == contents(tmp_path / "whole")
    assert not Path(f"{out}.hub").exists()


def test_a_run_that_continues_needs_no_shard_again_whose_bytes_are_durable(hub, tmp_path, monkeypatch):
    fetch, calls = Stream.fetch, []

    def cut(self: Stream, file: str) -> None:
        calls.append(file)
        if len(calls) == 6:
            raise KeyboardInterrupt
        fetch(self, file)

    monkeypatch.setattr(Stream, "fetch", cut)
    options = {"scheme": "fp8-channel", "max_shard_size": "500KB", "stream_hub": True}
    with pytest.raises(KeyboardInterrupt):
        dq.convert("owner/name", tmp_path / "out", **options)
    first = fetched(hub)
    assert len(first) == 5
    hub.sent.clear()
    made = dq.convert("owner/name", tmp_path / "out", **options)
    assert made.resumed > 5
    again = set(first) & set(fetched(hub))
    assert len(again) <= 1  # the one that a shard of the artifact was amid
    assert len(fetched(hub)) <= SHARDS - 4
    hub.sent.clear()
    assert dq.convert("owner/name", tmp_path / "out", **options).already_complete
    assert fetched(hub) == []


def test_an_artifact_of_another_commit_is_another(hub, tmp_path, cli):
    args = ("convert", "owner/name", "--stream-hub", "-q", "-o", tmp_path / "out")
    assert cli(*args).code == 0
    hub.state.repos["owner/name"].branches["main"] = ("f" * 40, hub.files)
    ran = cli(*args)
    assert (ran.code, "holds the artifact of another source: the weights differ" in ran.err) == (3, True), ran.err
    assert cli(*args, "--force").code == 0
    # What a folder became is the same artifact where its manifest has the commit.
    manifest = json.loads((tmp_path / "out/dsv2quant.json").read_text())
    assert manifest["source"]["revision"] == "f" * 40


# --- faults ---


def at_the_second_shard(monkeypatch, happens) -> None:
    downloaded, calls = Stream._downloaded, []

    def wrapped(self: Stream, file: str) -> Path:
        calls.append(file)
        if len(calls) == 2:
            happens(file)
        return downloaded(self, file)

    monkeypatch.setattr(Stream, "_downloaded", wrapped)


AT = f"/owner/name/resolve/{COMMIT}/"
FAULTS = {
    "429": lambda state, file: state.faults.append((f"GET {AT}{file}", (429, b"", {"Retry-After": "0"}))),
    "503": lambda state, file: state.faults.append((f"GET {AT}{file}", (503, b"", {}))),
    "503 of a HEAD": lambda state, file: state.faults.append((f"HEAD {AT}{file}", (503, b"", {}))),
    "refused": lambda state, file: state.faults.append((f"GET {AT}{file}", (0, b"", {}))),
    "cut": lambda state, file: state.cuts.append((file, 150_000)),
    "cut twice": lambda state, file: state.cuts.extend([(file, 150_000), (file, 150_000)]),
    "damaged": lambda state, file: state.spoiled.append(file),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_for_a_moment_costs_nothing(fault, hub, tmp_path, monkeypatch):
    at_the_second_shard(monkeypatch, lambda file: FAULTS[fault](hub.state, file))
    dq.convert("owner/name", tmp_path / "out", scheme="fp8-channel", stream_hub=True)
    assert (hub.state.faults, hub.state.cuts, hub.state.spoiled) == ([], [], [])
    is_as_of_a_snapshot(tmp_path / "out", scheme="fp8-channel")


def test_a_shard_that_stays_damaged_ends_it_and_nothing_of_it_is_used(hub, tmp_path, monkeypatch, cli):
    at_the_second_shard(monkeypatch, lambda file: hub.state.spoiled.extend([file, file]))
    args = ("convert", "owner/name", "--stream-hub", "-o", tmp_path / "out")
    ran = cli(*args)
    assert ran.code == 3
    last = ran.err.splitlines()[-1]
    assert last.startswith("error: owner/name: model-0000")
    assert last.endswith("came twice with another hash than the hub's (retry)")
    assert cli(*args).code == 0


def test_a_hub_that_stays_away_is_one_line_and_the_next_run_continues(hub, tmp_path, monkeypatch, cli):
    at_the_second_shard(monkeypatch, lambda file: hub.broken.update({f"{AT}{file}": (503, b"", {})}))
    args = ("convert", "owner/name", "--fp8=channel", "--stream-hub", "-o", tmp_path / "out")
    ran = cli(*args)
    assert ran.code == 3
    assert ran.err.splitlines()[-1].startswith("error: owner/name: the hub "), ran.err
    hub.broken.clear()
    assert cli(*args).code == 0
    is_as_of_a_snapshot(tmp_path / "out", scheme="fp8-channel")


def test_ctrl_c_ends_a_download_where_it_is_and_leaves_no_thread(hub, tmp_path, monkeypatch, cli):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    half, held, drop = threading.Event(), threading.Event(), Stream.drop
    at_the_second_shard(monkeypatch, lambda file: hub.state.held.update({file: (half, held)}))

    def interrupted(self: Stream, file: str, kept: object) -> None:
        assert half.wait(30)  # of the second shard is here
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "drop", interrupted)
    monkeypatch.setattr(stream, "_abort_xet", held.set)  # behind what ends plain downloads
    args = ("convert", "owner/name", "--fp8=channel", "--stream-hub", "-q", "-o", tmp_path / "out")
    ran = cli(*args)
    assert (ran.code, ran.err.strip().splitlines()[-1]) == (130, "interrupted")
    assert len(list((tmp_path / "out.hub").glob("*.safetensors"))) == 1
    hub.state.held.clear()
    monkeypatch.setattr(Stream, "drop", drop)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("shards")]
    assert cli(*args).code == 0
    is_as_of_a_snapshot(tmp_path / "out", scheme="fp8-channel")


# --- what it is not for ---


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--int4",), "--stream-hub: gptq runs text through the whole model"),
        (("--gguf", "Q4_0", "--tune", "1M"), "--stream-hub: tuning runs text through the whole model"),
        (("--fp8=static",), "--stream-hub: what it calibrates runs text through the whole model: give --statistics"),
        (("--fp8", "--offline"), "--stream-hub downloads shard by shard: it goes neither with --offline"),
        (("--int4", "--method", "awq", "--statistics", "x"), "--stream-hub: awq looks for its scales in all layers"),
    ],
)
def test_what_needs_the_whole_model_is_one_line_before_a_shard_is_fetched(args, message, hub, tmp_path, cli):
    out = tmp_path / ("out.gguf" if "--gguf" in args else "out")
    ran = cli("convert", "owner/name", *args, "--stream-hub", "-q", "-o", out)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert fetched(hub) == []
    assert not (tmp_path / "out").exists()


def test_it_goes_with_a_hub_id(lite, tmp_path, cli, monkeypatch):
    ran = cli("convert", lite, "--stream-hub", "-o", tmp_path / "out")
    assert (ran.code, f"--stream-hub goes with a hub id: {lite} is on this machine" in ran.err) == (2, True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "nor HF_HUB_OFFLINE" in cli("convert", "owner/name", "--stream-hub", "-o", tmp_path / "out").err
    with pytest.raises(dq.errors.UsageError, match="goes with a hub id, which is not opened yet"):
        dq.convert(dq.open(lite), tmp_path / "out", stream_hub=True)


def test_a_folder_of_others_is_let_be(hub, tmp_path):
    beside = tmp_path / "out.hub"
    beside.mkdir()
    (beside / "mine.txt").write_text("mine")
    dq.convert("owner/name", tmp_path / "out", scheme="fp8-channel", stream_hub=True)
    assert os.listdir(beside) == ["mine.txt"]
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / ".cache/huggingface").mkdir(parents=True)
    (tmp_path / "two.hub").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"two.hub: is a link"):
        dq.convert("owner/name", tmp_path / "two", scheme="fp8-channel", stream_hub=True)
    assert os.listdir(elsewhere / ".cache") == ["huggingface"]
