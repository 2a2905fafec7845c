"""Conversion to GGUF, interrupted, repeated and refused: the same bytes in the end, or none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf_tiny
import numpy as np
import pytest
import tiny
from calibrated import files_no_larger_than, killer
from gguf import GGUFReader
from gguf_expected import write_imatrix
from test_convert import contents

from dsv2quant.conversion import gguf
from dsv2quant.storage import engine

SPLIT = ("--split-max-size", "417792")  # the embedding, alone in the second of three
LATE = "blk.1.attn_output.weight"  # most tensors are before it
Convert = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-odd in two shards."""
    folder = tmp_path_factory.mktemp("odd") / "odd"
    return tiny.write_checkpoint(folder, gguf_tiny.ODD, gguf_tiny.weights(gguf_tiny.ODD), shards=2)


@pytest.fixture
def to_gguf(cli, tmp_path) -> Convert:
    """`to_gguf(model, "Q8_0", …)` converts into out/m.gguf with the command."""

    def run(model: Path, file_type: str = "Q4_K_M", *more: object) -> Any:
        out = tmp_path / "out" / "m.gguf"
        return cli("convert", model, "--gguf", file_type, "-o", out, "--json", "-q", *more)

    return run


@pytest.fixture
def whole(cli, tmp_path) -> Convert:
    """`whole(model, "Q8_0", …)`: {file: bytes} of an uninterrupted conversion into a folder of its own."""

    def run(model: Path, file_type: str = "Q4_K_M", *more: object) -> dict[str, bytes]:
        out = tmp_path / "whole"
        assert cli("convert", model, "--gguf", file_type, "-o", out / "m.gguf", "-q", *more).code == 0
        found = contents(out)
        shutil.rmtree(out)
        return found

    return run


@contextmanager
def interrupted(at: str = LATE) -> Iterator[list[str]]:
    """Every tensor is recorded, and Ctrl-C comes in place of tensor `at`; yields the names of those encoded."""
    encode, encoded = gguf._encode_rows, []

    def encode_rows(piece, *args):
        if piece.entry.name == at:
            raise KeyboardInterrupt  # is seen when all before it is written
        encoded.append(piece.entry.name)
        return encode(piece, *args)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(engine, "RECORD_EVERY", 1)
        m.setattr(gguf, "_encode_rows", encode_rows)
        yield encoded


def interrupt(to_gguf: Convert, *args: object, at: str = LATE) -> None:
    with interrupted(at):
        ran = to_gguf(*args)
    assert ran.code == 130
    assert ran.err.strip() == "interrupted"


def one_line(ran: Any, message: str, code: int = 3) -> None:
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert message in ran.err
    assert ran.err.count("\n") == 1, ran.err


# Kills


@pytest.mark.parametrize("split", [(), SPLIT], ids=["one file", "shards"])
def test_killed_at_10_moments_and_resumed_the_bytes_are_the_same(split, model, tmp_path, cli):
    def command(out: Path) -> tuple[str, ...]:
        return ("convert", str(model), "--gguf", "Q4_K_M", "-o", str(out / "m.gguf"), *split)

    with killer() as run_killed:
        run_killed(0, *command(tmp_path / "first"), "-q")  # counts changes of imports, too
        changes, status = run_killed(0, *command(tmp_path / "whole"), "-q")
        assert status == 0
        expected = contents(tmp_path / "whole")
        assert len(expected) == (4 if split else 2)
        kept = []
        # At the last change the state file is gone already: the file is whole, and recognised as such.
        for n in sorted(random.Random(0).sample(range(1, changes), 10)):
            out = tmp_path / f"out-{n}"
            assert run_killed(n, *command(out), "-q") == [-signal.SIGKILL]
            left = contents(out) if out.exists() else {}
            assert all(data == expected[name] for name, data in left.items() if name.endswith(".gguf"))
            again = cli(*command(out), "-q", "--json")
            kept.append(json.loads(again.out)["resumed_tensors"])
            assert contents(out) == expected  # nothing partial, no state file
            shutil.rmtree(out)
        assert len(set(kept) - {0}) > 5


def test_resuming_encodes_only_what_is_missing(model, whole, to_gguf, tmp_path):
    interrupt(to_gguf, model)
    with interrupted(at="") as encoded:
        ran = to_gguf(model)
    names = [tensor.name for tensor in GGUFReader(tmp_path / "out" / "m.gguf").tensors]
    assert set(encoded) == set(names[names.index(LATE) :])
    assert json.loads(ran.out)["resumed_tensors"] == names.index(LATE)
    assert contents(tmp_path / "out") == whole(model)


def test_ctrl_c_while_workers_work(model, to_gguf, tmp_path, monkeypatch):
    begun, ended = threading.Event(), threading.Event()

    def work(*args):
        begun.set()
        assert ended.wait(60)

    def wait(self):
        assert begun.wait(60)
        raise KeyboardInterrupt

    def exit_(self, *exception, leave=engine._Writing.__exit__):
        monkeypatch.undo()
        ended.set()
        return leave(self, *exception)

    monkeypatch.setattr(gguf, "_encode_rows", work)
    monkeypatch.setattr(engine._Writing, "_settle", wait)
    monkeypatch.setattr(engine._Writing, "__exit__", exit_)
    ran = to_gguf(model)
    assert (ran.code, ran.err) == (130, "\ninterrupted\n")
    assert list((tmp_path / "out").iterdir()) == []


# Another conversion than the one that is unfinished


def rewrite(model: Path, imatrix: Path) -> tuple[object, ...]:
    """Other weights in files of the same sizes."""
    tiny.write_checkpoint(model, gguf_tiny.ODD, tiny.random_weights(gguf_tiny.ODD), shards=2)
    return ("Q4_K_M", "--imatrix", imatrix)


def weigh(model: Path, imatrix: Path) -> tuple[object, ...]:
    """The same file name with other contents."""
    data = bytearray(imatrix.read_bytes())
    data[-(96 * 4) :] = np.ones(96, np.float32).tobytes()
    imatrix.write_bytes(data)
    return ("Q4_K_M", "--imatrix", imatrix)


CHANGES: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "source rewritten": rewrite,
    "imatrix rewritten": weigh,
    "no imatrix": lambda model, imatrix: ("Q4_K_M",),
    "another type": lambda model, imatrix: ("Q5_K_M", "--imatrix", imatrix),
    "one tensor's type": lambda model, imatrix: ("Q4_K_M", "--imatrix", imatrix, "--tensor-type", "attn_k_b=q8_0"),
    "shrunk": lambda model, imatrix: ("Q4_K_M", "--imatrix", imatrix, "--imatrix-shrink"),
    "shards": lambda model, imatrix: ("Q4_K_M", "--imatrix", imatrix, *SPLIT),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_unfinished_file_refuses_another_conversion(change, model, whole, to_gguf, tmp_path):
    source, imatrix = tmp_path / "odd", write_imatrix(tmp_path / "imatrix.gguf", "tiny-odd")
    shutil.copytree(model, source)
    interrupt(to_gguf, source, "Q4_K_M", "--imatrix", imatrix)
    left = contents(tmp_path / "out")
    assert set(left) == {"m.gguf.partial", "m.gguf.state"}
    options = change(source, imatrix)
    one_line(to_gguf(source, *options), "m.gguf.state: an unfinished conversion with another plan or source (give")
    assert contents(tmp_path / "out") == left
    forced = to_gguf(source, *options, "--force")
    assert json.loads(forced.out)["resumed_tensors"] == 0
    assert contents(tmp_path / "out") == whole(source, *options)


def test_a_changed_time_is_a_changed_source(model, to_gguf, tmp_path):
    source = tmp_path / "odd"
    shutil.copytree(model, source)
    interrupt(to_gguf, source)
    os.utime(next(source.glob("*.safetensors")), ns=(1, 1))
    one_line(to_gguf(source), "another plan or source")


def test_what_force_replaces_is_never_taken_for_the_new_file(model, whole, to_gguf, tmp_path):
    """The old file is as large as the new one."""
    source = tmp_path / "odd"
    shutil.copytree(model, source)
    assert to_gguf(source).code == 0
    tiny.write_checkpoint(source, gguf_tiny.ODD, tiny.random_weights(gguf_tiny.ODD), shards=2)
    for at in ("blk.0.attn_k_b.weight", LATE):
        interrupt(to_gguf, source, "Q4_K_M", "--force", at=at)
    assert json.loads(to_gguf(source).out)["resumed_tensors"] > 0
    assert contents(tmp_path / "out") == whole(source)


def test_shards_and_their_unfinished_neighbours_make_way_for_one_file(model, whole, to_gguf, tmp_path):
    other = tmp_path / "out" / "m-two.gguf.partial"
    interrupt(to_gguf, model, "Q4_K_M", *SPLIT)
    other.write_bytes(b"another conversion's")
    assert list((tmp_path / "out").glob("m-*-of-*.partial"))
    shards = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("m-*-of-*.gguf")}
    assert to_gguf(model, "Q4_K_M", "--force").code == 0
    # Whole files of other names stay: they can be used.
    assert contents(tmp_path / "out") == whole(model) | shards | {other.name: b"another conversion's"}


# Damage between two runs


def edit_state(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda out: (out / "m.gguf.state").write_bytes(change((out / "m.gguf.state").read_bytes()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "state empty": edit_state(lambda data: b""),
    "state not JSON": edit_state(lambda data: b"\xff[{" + data),
    "state says more": edit_state(lambda data: data.replace(b'"done": ', b'"done": 1')),
    "state of an object": edit_state(lambda data: b"[]"),
    "state gone": lambda out: (out / "m.gguf.state").unlink(),
    "partial cut": lambda out: os.truncate(out / "m.gguf.partial", 200_000),
    "partial empty": lambda out: (out / "m.gguf.partial").write_bytes(b""),
    "partial too long": lambda out: os.truncate(out / "m.gguf.partial", 9_999_999),
    "partial gone": lambda out: (out / "m.gguf.partial").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_after_damage_it_starts_over(damage, model, whole, to_gguf, tmp_path):
    interrupt(to_gguf, model)
    damage(tmp_path / "out")
    ran = to_gguf(model)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["resumed_tensors"] == 0
    assert contents(tmp_path / "out") == whole(model)


@pytest.mark.parametrize("split", [(), SPLIT], ids=["one file", "shards"])
def test_damage_is_remembered(split, model, whole, to_gguf, tmp_path):
    """What was durable is lost, and written again up to the size that it had: it must not count any more."""
    interrupt(to_gguf, model, "Q4_K_M", *split)
    for path in (tmp_path / "out").glob("m*.gguf*"):
        if path.suffix != ".state":
            os.truncate(path, 100)
    interrupt(to_gguf, model, "Q4_K_M", *split, at="output_norm.weight")
    assert to_gguf(model, "Q4_K_M", *split).code == 0
    assert contents(tmp_path / "out") == whole(model, "Q4_K_M", *split)


def test_another_version_does_not_go_on(model, whole, to_gguf, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr("dsv2quant.conversion.gguf.__version__", "0.0")
        interrupt(to_gguf, model)
    one_line(to_gguf(model), "an unfinished conversion with another plan or source")
    assert to_gguf(model, "Q4_K_M", "--force").code == 0
    assert contents(tmp_path / "out") == whole(model)


def test_a_lost_shard_is_written_again(model, whole, to_gguf, tmp_path):
    interrupt(to_gguf, model, "Q4_K_M", *SPLIT)
    first, second = sorted((tmp_path / "out").glob("m-*.gguf"))[:2]
    first.unlink()
    os.truncate(second, 1000)
    assert to_gguf(model, "Q4_K_M", *SPLIT).code == 0
    assert contents(tmp_path / "out") == whole(model, "Q4_K_M", *SPLIT)


def test_two_runs_into_one_file_do_not_mix(model, whole, to_gguf, tmp_path):
    interrupt(to_gguf, model)
    left = contents(tmp_path / "out")
    with (tmp_path / "out" / "m.gguf.state").open("r+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for options in ((), ("--force",), SPLIT):
            one_line(to_gguf(model, "Q4_K_M", *options), "m.gguf: another run is writing to it (wait for it, or stop")
        assert contents(tmp_path / "out") == left
    assert to_gguf(model).code == 0
    assert contents(tmp_path / "out") == whole(model)


def test_a_state_file_that_its_run_removes_locks_nobody_out(model, to_gguf, tmp_path, monkeypatch):
    """Another run ends between our opening of its state file and our lock: what we lock is not the file of the name."""
    state, flock, calls = tmp_path / "out" / "m.gguf.state", fcntl.flock, []

    def late(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            state.unlink()
            state.touch()  # and a third begins
        flock(descriptor, operation)

    interrupt(to_gguf, model)
    monkeypatch.setattr(fcntl, "flock", late)
    ran = to_gguf(model)
    assert ran.code == 0, ran.err
    assert len(calls) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"m.gguf", "m.gguf.json"}


# Disks and folders


def test_a_file_size_limit_ends_in_one_line_and_a_resumable_state(model, whole, to_gguf, tmp_path):
    with files_no_larger_than(300_000):
        one_line(to_gguf(model), "m.gguf: can't be written: File too large (free space and run the same command again")
    assert list((tmp_path / "out").iterdir()) == []
    assert to_gguf(model).code == 0
    assert contents(tmp_path / "out") == whole(model)


@pytest.mark.parametrize("call", ["pwrite", "ftruncate", "fsync", "fdatasync", "rename"])
def test_a_disk_that_fails_once_ends_in_one_line_and_resumes(call, model, whole, to_gguf, tmp_path, monkeypatch):
    """A late call fails, and no call after it: an error that the kernel reports once must not be lost."""
    original, done = getattr(os, call), []
    counts = {"pwrite": 70, "ftruncate": 2, "fsync": 12, "fdatasync": 20, "rename": 1}

    def full(*args):
        done.append(1)
        if len(done) == counts[call]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    with monkeypatch.context() as m:
        m.setattr(engine, "RECORD_EVERY", 1)
        m.setattr(os, call, full)
        one_line(to_gguf(model), "can't be written: No space left on device (free space and run the same command")
    assert not (tmp_path / "out" / "m.gguf").exists()
    again = to_gguf(model)
    assert (json.loads(again.out)["resumed_tensors"] > 0) == (call != "ftruncate")
    assert contents(tmp_path / "out") == whole(model)


def test_the_last_flush_behind_the_work_must_not_fail_unseen(model, to_gguf, monkeypatch, tmp_path):
    def fail(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    monkeypatch.setattr(engine, "RECORD_EVERY", 450_000)  # once, at the end
    one_line(to_gguf(model), "m.gguf: can't be written: Input/output error (check the folder)")
    assert not (tmp_path / "out" / "m.gguf").exists()


def test_space_is_checked_before_the_first_byte(model, to_gguf, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    one_line(to_gguf(model), "bytes, the disk has 100,000 free (free space, or give a file on another disk)")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_written_counts_as_free_space(model, to_gguf, tmp_path, monkeypatch):
    interrupt(to_gguf, model)
    written = (tmp_path / "out" / "m.gguf.partial").stat().st_blocks * 512
    usage = shutil.disk_usage(tmp_path)._replace(free=(tmp_path / "out" / "m.gguf.partial").stat().st_size - written)
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda path: usage._replace(free=usage.free - 1))
        one_line(to_gguf(model), "the disk has")
        m.setattr(shutil, "disk_usage", lambda path: usage)
        assert json.loads(to_gguf(model).out)["resumed_tensors"] > 0


def test_a_file_that_is_there_is_left_alone(model, whole, to_gguf, tmp_path):
    for name, options in (("m.gguf", ()), ("m-00002-of-00003.gguf", SPLIT)):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"mine")
        one_line(to_gguf(model, "Q4_K_M", *options), f"{name}: is there already (give another name, or --force")
        assert contents(tmp_path / "out") == {name: b"mine"}
        assert to_gguf(model, "Q4_K_M", *options, "--force").code == 0
        assert contents(tmp_path / "out") == whole(model, "Q4_K_M", *options)
        shutil.rmtree(tmp_path / "out")


def test_missing_folders_are_made(model, whole, cli, tmp_path):
    out = tmp_path / "a" / "b" / "m.gguf"
    assert cli("convert", model, "--gguf", "Q4_K_M", "-o", out, "-q").code == 0
    assert contents(out.parent) == whole(model)
