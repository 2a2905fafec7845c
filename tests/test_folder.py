"""The output folder: what is taken for finished, what is kept, and what is never removed or written through."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
from test_convert import contents

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion import convert as engine
from dsv2quant.conversion.convert import convert
from dsv2quant.conversion.shards import Folder
from dsv2quant.errors import InputError
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.report.calibration import Conversion
from dsv2quant.storage.durable import (
    MANIFEST_FILE,
    STATE_FILE,
    WORK_FOLDER,
    disk_errors,
    dump_json,
    resumable,
    write_whole,
)

SMALL = tiny.LITE | {"num_hidden_layers": 2, "n_routed_experts": 4}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write_checkpoint(tmp_path / "model", SMALL)


def run(model: Path, out: Path, *, force: bool = False, name: str = "fp8-channel", **options: object) -> Conversion:
    made = make_plan(open_checkpoint(model), recipe.builtin(name), max_shard_size=60_000)
    return convert(made, out, command="", force=force, **options)


def flip(path: Path, at: int = -9) -> None:
    """Other bytes, under the same size and times."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def interrupted(model: Path, out: Path) -> dict[str, bytes]:
    """All shards are written, and nothing else."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(engine, "_write_small_files", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, out)
    return contents(out)


# Another source


def train(model: Path) -> None:
    tiny.write_checkpoint(model, SMALL, tiny.random_weights(SMALL, seed=1))


def edit(name: str, content: bytes = b'{"a": 1}') -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content)


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "trained": (train, "the weights differ"),
    "one byte": (lambda model: flip(model / "model.safetensors"), "the weights differ"),
    "one byte amid a tensor": (lambda model: flip(model / "model.safetensors", -5000), "the weights differ"),
    "chat template": (edit("chat_template.jinja", b"{{ x }}"), "chat_template.jinja differs"),
    "tokenizer": (edit("tokenizer_config.json"), "tokenizer_config.json differs"),
    "generation": (edit("generation_config.json"), "generation_config.json differs"),
    "licence": (edit("README.md", b"---\nlicense: mit\n---\n"), "README.md differs"),
    "a file less": (lambda model: (model / "tokenizer_config.json").unlink(), "tokenizer_config.json differs"),
}


@pytest.mark.parametrize(("change", "words"), OTHERS.values(), ids=OTHERS)
def test_another_source_is_never_already_complete(change, words, model, tmp_path):
    run(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    change(model)
    with pytest.raises(InputError, match=f"out: holds the artifact of another source: {words} .*--force"):
        run(model, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    again = run(model, tmp_path / "out", force=True)
    run(model, tmp_path / "whole")
    assert not again.already_complete
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_times_alone_make_no_other_source(model, tmp_path):
    run(model, tmp_path / "out")
    for path in model.iterdir():
        os.utime(path, ns=(1, 1))
    shutil.copytree(model, tmp_path / "copy" / "model")
    for source in (model, tmp_path / "copy" / "model"):
        assert run(source, tmp_path / "out").already_complete


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "config.json", "tokenizer.json"])
def test_a_finished_artifact_is_read_before_it_is_called_complete(name, model, tmp_path):
    run(model, tmp_path / "out")
    shards = sorted(path.name for path in (tmp_path / "out").glob("model-*-of-*"))
    flip(tmp_path / "out" / (shards[1] if name.startswith("model-") else name))
    with pytest.raises(InputError, match=r"out: not as its manifest has it: .*--force to convert again"):
        run(model, tmp_path / "out")
    (tmp_path / "out" / shards[0]).unlink()
    with pytest.raises(InputError, match=f"{shards[0]}"):
        run(model, tmp_path / "out")
    assert not run(model, tmp_path / "out", force=True).already_complete


def test_the_card_of_an_artifact_may_be_edited(model, tmp_path):
    run(model, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    assert run(model, tmp_path / "out").already_complete


def test_a_manifest_from_elsewhere_leads_nowhere(model, tmp_path):
    run(model, tmp_path / "out")
    (tmp_path / "precious").write_text("mine")
    path = tmp_path / "out" / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    for name in ("../precious", str(tmp_path / "precious")):
        path.write_text(json.dumps(manifest | {"files": manifest["files"] | {name: {}}}))
        with suppress(InputError):
            run(model, tmp_path / "out", force=True)
        assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("change", [train, lambda m: flip(m / "model.safetensors", -5000)], ids=["trained", "one byte"])
def test_a_source_that_changes_meanwhile_finishes_nothing(change, model, tmp_path, monkeypatch):
    write = engine._write_files

    def change_behind(*args):
        written = write(*args)
        change(model)
        return written

    monkeypatch.setattr(engine, "_write_files", change_behind)
    with pytest.raises(InputError, match="model: its weights changed while they were converted"):
        run(model, tmp_path / "out")
    assert not {"config.json", MANIFEST_FILE} & contents(tmp_path / "out").keys()


def test_a_new_link_to_the_source_is_no_change(model, tmp_path, monkeypatch):
    write = engine._write_files
    monkeypatch.setattr(
        engine, "_write_files", lambda *a: (write(*a), os.link(model / "model.safetensors", tmp_path / "link"))[0]
    )
    assert run(model, tmp_path / "out").files


# Damage between two runs


def test_a_source_that_keeps_its_times_is_found_changed(model, tmp_path):
    left = interrupted(model, tmp_path / "out")
    flip(model / "model.safetensors", -5000)
    with pytest.raises(InputError, match="unfinished conversion with another plan or source"):
        run(model, tmp_path / "out")
    assert contents(tmp_path / "out") == left


def relink(shard: Path) -> None:
    shard.rename(shard.parent.parent / "elsewhere")
    shard.symlink_to(shard.parent.parent / "elsewhere")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte": flip,
    "a byte of the header": lambda shard: flip(shard, 20),
    "cut": lambda shard: os.truncate(shard, 1000),
    "gone": lambda shard: shard.unlink(),
    "a link": relink,
    "another shard": lambda shard: shutil.copy(next(shard.parent.glob("*-00003-of-*")), shard),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_shard_that_was_damaged_meanwhile_is_made_again(damage, model, tmp_path, caplog):
    left = interrupted(model, tmp_path / "out")
    shards = sorted(name for name in left if name.endswith(".safetensors"))
    damage(tmp_path / "out" / shards[1])
    resumed = run(model, tmp_path / "out")
    run(model, tmp_path / "whole")
    assert resumed.resumed == len(shards) - 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out" / shards[1]).is_symlink()
    noticed = [m for m in caplog.messages if f"{shards[1]}: is not what was written to it; it is made again" in m]
    assert len(noticed) == 1


def test_a_state_that_is_cut_or_edited_adopts_nothing_unseen(model, tmp_path):
    interrupted(model, tmp_path / "out")
    state = tmp_path / "out" / STATE_FILE
    whole, lines = state.read_bytes(), state.read_bytes().splitlines(keepends=True)
    run(model, tmp_path / "whole")
    for content, kept in (
        (b"".join(lines[:3]) + lines[3][:20], 2),
        (whole.replace(b'"sha256": "', b'"sha256": "0'), 0),
        (b"".join(lines[:2]) + b'{"file": 5}\n[]\n' + lines[2], 1),
    ):
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        (tmp_path / "copy" / STATE_FILE).write_bytes(content)
        assert run(model, tmp_path / "copy").resumed == kept
        assert contents(tmp_path / "copy") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "copy")


def test_what_looks_finished_makes_way_while_a_shard_is_made_again(model, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(Folder, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
    flip(next((tmp_path / "out").glob("*-00002-of-*")))
    monkeypatch.setattr(engine, "_write_files", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out")
    assert not {"config.json", MANIFEST_FILE} & contents(tmp_path / "out").keys()


def test_whether_anything_is_kept_can_be_asked(model, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert not resumable(out)
    with monkeypatch.context() as m:
        m.setattr(engine, "_write_files", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, out)
    assert not resumable(out)
    interrupted(model, out)
    assert resumable(out)
    run(model, out)
    assert not resumable(out)


# --force


def test_force_leaves_another_checkpoint_alone(model, tmp_path):
    other = tiny.write_checkpoint(tmp_path / "other", SMALL, shards=3)
    before = contents(other)
    for folder in (other, tmp_path / "stray"):
        folder.mkdir(exist_ok=True)
        (folder / "adapter.safetensors").write_bytes(b"mine")
        for _ in range(2):
            with pytest.raises(InputError, match=r"no conversion of dsv2quant's wrote adapter\.safetensors.*--force"):
                run(model, folder, force=True)
        assert contents(folder) == (before if folder == other else {}) | {"adapter.safetensors": b"mine"}


@pytest.mark.parametrize("name", ["a\0b", "..", "../x", ""])
def test_a_manifest_of_names_that_no_artifact_has_is_none_of_ours(name, model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    forged = {"schema": "dsv2quant.manifest/1", "plan": "x", "files": {name: {"size": 1, "sha256": "0" * 64}}}
    (out / MANIFEST_FILE).write_text(json.dumps(forged))
    (tmp_path / "x").touch()
    for force in (False, True):
        with pytest.raises(InputError, match=r"is not empty|no conversion of dsv2quant's wrote"):
            run(model, out, force=force)
    assert os.listdir(out) == [MANIFEST_FILE]
    assert (tmp_path / "x").exists()


def test_force_replaces_what_we_wrote_finished_or_not(model, tmp_path):
    out = tmp_path / "out"
    interrupted(model, out)
    (out / "notes.txt").write_text("mine")
    run(model, out, force=True, name="fp8-tensor")
    run(model, out, force=True)
    run(model, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole") | {"notes.txt": b"mine"}


def test_force_that_is_killed_while_it_removes_can_be_given_again(model, tmp_path, monkeypatch):
    run(model, tmp_path / "out")
    unlink, calls = Path.unlink, []

    def stop(self, missing_ok=False):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out", force=True)
    run(model, tmp_path / "out", force=True)


def test_no_input_is_overwritten_by_whatever_name(model, tmp_path):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("calibrate on this")
    ours = run(model, out)
    for name, source in ((next(iter(ours.files)), model / "model.safetensors"), (MANIFEST_FILE, text)):
        for link in (os.link, os.symlink):
            kept = (out / name).read_bytes()
            (out / name).unlink()
            link(source, out / name)
            before = source.read_bytes()
            with pytest.raises(InputError, match="is an input of this command"):
                run(model, out, force=True, inputs=[text])
            assert source.read_bytes() == before
            (out / name).unlink()
            (out / name).write_bytes(kept)
    # The checkpoint's own file lies in the output folder.
    shard = sorted(name for name in ours.files if name.endswith(".safetensors"))[0]
    shutil.move(model / "model.safetensors", out / shard)
    (model / "model.safetensors").symlink_to(out / shard)
    with pytest.raises(InputError, match="is an input of this command"):
        run(model, out, force=True)
    (tmp_path / "same").symlink_to(model)
    with pytest.raises(InputError, match="is the checkpoint's own folder"):
        run(model, tmp_path / "same", force=True)
    assert open_checkpoint(model)


# Links, pipes, and descriptors


@pytest.mark.parametrize(
    "make", [os.symlink, os.link, lambda target, path: os.mkfifo(path)], ids=["sym", "hard", "fifo"]
)
@pytest.mark.parametrize("name", [STATE_FILE, "model-00001-of-00004.safetensors.partial", MANIFEST_FILE, "config.json"])
def test_nothing_is_written_through_a_link_or_pipe(name, make, model, tmp_path):
    made = make_plan(open_checkpoint(model), recipe.builtin("fp8-channel"), max_shard_size=60_000)
    name = f"{made.shards[0].file}.partial" if name.endswith(".partial") else name
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("{}")
    make(tmp_path / "precious", tmp_path / "out" / name)
    for force in (False, True):
        with pytest.raises(InputError, match=r"is a link or no regular file|is not empty|no conversion of dsv2quant"):
            run(model, tmp_path / "out", force=force)
    assert (tmp_path / "precious").read_text() == "{}"
    write_whole(tmp_path / "out" / name, [b"whole"])
    assert (tmp_path / "precious").read_text() == "{}"


def test_a_linked_partial_file_or_work_folder_is_no_way_out(model, tmp_path):
    interrupted(model, tmp_path / "out")
    (tmp_path / "precious").write_text("mine")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    shard.unlink()
    shard.with_name(f"{shard.name}.partial").symlink_to(tmp_path / "precious")
    (tmp_path / "out" / WORK_FOLDER).symlink_to(tmp_path)
    with pytest.raises(InputError, match="is a link"):
        run(model, tmp_path / "out")
    (tmp_path / "out" / WORK_FOLDER).unlink()
    run(model, tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate", "pread"])
def test_no_descriptor_stays_open_where_the_state_cant_be_made(call, model, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = make_plan(open_checkpoint(model), recipe.builtin("fp8-channel"))
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(InputError, match="out: can't be written: No space left on device"):
        convert(made, tmp_path / "out")
    assert len(os.listdir("/proc/self/fd")) == len(before)


# Words


def test_an_error_that_names_another_file_is_not_blamed_on_the_output(tmp_path):
    for where, ours in (
        (tmp_path / "out" / "x", True),
        (tmp_path / "out.partial", True),
        (tmp_path, True),
        (tmp_path / "model", False),
    ):
        with pytest.raises(InputError if ours else OSError), disk_errors(tmp_path / "out"):
            raise OSError(errno.EIO, "Input/output error", str(where))


def test_names_and_words_that_are_no_unicode(tmp_path, cli):
    assert dump_json({"a\ud800": "é\udcff"}) == '{\n  "a\\ud800": "é\\udcff"\n}\n'.encode()
    model = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"))
    tiny.write_checkpoint(model, SMALL)
    result = run(model, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())["source"]["model"] == "m\\udcff"
    assert not result.already_complete
