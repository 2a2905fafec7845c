"""GGUF files that are there already, or partly: recognised by their hashes, made again where these differ."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import gguf_tiny
import pytest
import tiny
from gguf import GGUFValueType
from test_convert import contents
from test_folder import flip
from test_gguf_convert import LATE, interrupted

from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion import convert as conversion
from dsv2quant.conversion import gguf
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError
from dsv2quant.planning.gguf_plan import Options, make_gguf_plan
from dsv2quant.report.calibration import Conversion
from dsv2quant.storage.durable import resumable
from dsv2quant.storage.gguf import Metadata, Value

# Plain types, so that nothing is compiled.
ONE = {"split_max_size": None}
SHARDS = {"split_max_size": 800_000}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(
        tmp_path_factory.mktemp("odd") / "odd", gguf_tiny.ODD, gguf_tiny.weights(gguf_tiny.ODD)
    )


@pytest.fixture(autouse=True)
def _little_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of 4,096 tokens takes longer than all the rest."""

    def metadata(checkpoint: Checkpoint, *args: object, **options: object) -> Metadata:
        assert checkpoint.folder is not None
        text = (checkpoint.folder / "tokenizer_config.json").read_text()
        return {"tokenizer.config": Value(GGUFValueType.STRING, text)}

    monkeypatch.setattr(gguf, "model_metadata", metadata)


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def run(model: Path, out: Path, split: dict[str, int | None] = ONE, force: bool = False) -> Conversion:
    plan = make_gguf_plan(open_checkpoint(model), Options("F16"))
    return convert(plan, out / "m.gguf", command="c", force=force, **split)


def interrupt(model: Path, out: Path, split: dict[str, int | None] = ONE) -> None:
    with interrupted(LATE), pytest.raises(KeyboardInterrupt):
        run(model, out, split)


@pytest.mark.parametrize("split", [ONE, SHARDS], ids=["one file", "shards"])
def test_the_same_command_again_finds_it_complete(split, model, tmp_path):
    first = run(model, tmp_path / "out", split)
    before = contents(tmp_path / "out")
    assert first.files == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in before.items()
        if name.endswith(".gguf")
    }
    assert json.loads(before["m.gguf.json"])["files"] == first.files
    assert (len(first.files) > 1) == (split is SHARDS)
    again = run(model, tmp_path / "out", split)
    assert (again.already_complete, again.files) == (True, first.files)
    assert not first.already_complete
    assert contents(tmp_path / "out") == before
    assert not resumable(tmp_path / "out" / "m.gguf")
    plan = make_gguf_plan(open_checkpoint(model), Options("BF16"))
    with pytest.raises(InputError, match="is there already"):
        convert(plan, tmp_path / "out" / "m.gguf", **split)


def test_the_command_says_so(model, tmp_path, cli):
    command = ("convert", model, "--gguf", "F16", "-o", tmp_path / "m.gguf", "--token-embedding-type", "F32")
    assert json.loads(cli(*command, "--json", "-q").out)["already_complete"] is False
    assert json.loads(cli(*command, "--json", "-q").out)["already_complete"] is True
    assert cli(*command).out.endswith("bits/weight, was already complete\n")
    manifest = json.loads((tmp_path / "m.gguf.json").read_text())
    assert manifest["command"] == "dsv2quant convert model --gguf F16 --token-embedding-type F32"


@pytest.mark.parametrize("split", [ONE, SHARDS], ids=["one file", "shards"])
def test_what_differs_from_its_manifest_is_not_complete(split, model, tmp_path):
    files = list(run(model, tmp_path / "out", split).files)
    flip(tmp_path / "out" / files[-1], -3000)
    left = contents(tmp_path / "out")
    with pytest.raises(InputError, match=f"m.gguf: not as its manifest has it: {files[-1]} .*--force"):
        run(model, tmp_path / "out", split)
    assert contents(tmp_path / "out") == left
    assert not run(model, tmp_path / "out", split, force=True).already_complete
    run(model, tmp_path / "whole", split)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_source_is_never_already_complete(model, tmp_path):
    run(model, tmp_path / "out")
    before = contents(tmp_path / "out")
    flip(model / "model.safetensors", -5000)
    with pytest.raises(InputError, match=r"m\.gguf: was made from another source: the weights differ"):
        run(model, tmp_path / "out")
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"chat_template": "{{ messages }}"}))
    with pytest.raises(InputError, match=r"m\.gguf: is there already"):
        run(model, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_source_that_changes_meanwhile_finishes_nothing(model, tmp_path, monkeypatch):
    write = conversion._write_files

    def change_before(*args):
        flip(model / "model.safetensors", -5000)
        write(*args)

    monkeypatch.setattr(conversion, "_write_files", change_before)
    with pytest.raises(InputError, match="its weights changed while they were converted"):
        run(model, tmp_path / "out")
    assert not (tmp_path / "out" / "m.gguf").exists()
    assert not (tmp_path / "out" / "m.gguf.json").exists()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "early": lambda path: flip(path, path.stat().st_size // 2),
    "header": lambda path: flip(path, 30),
    "a link": lambda path: (path.rename(path.parent.parent / "x"), path.symlink_to(path.parent.parent / "x")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("split", [ONE, SHARDS], ids=["one file", "shards"])
def test_what_was_damaged_meanwhile_is_made_again(damage, split, model, tmp_path, caplog):
    out = tmp_path / "out"
    run(model, tmp_path / "whole", split)
    interrupt(model, out, split)
    assert resumable(out / "m.gguf")
    shutil.copytree(out, tmp_path / "copy")
    undamaged = run(model, tmp_path / "copy", split).resumed
    written = [path for path in sorted(out.iterdir()) if path.suffix in (".gguf", ".partial")]
    damage(written[0])
    outside = (tmp_path / "x").read_bytes() if (tmp_path / "x").exists() else None
    resumed = run(model, out, split)
    assert contents(out) == contents(tmp_path / "whole")
    assert not any(path.is_symlink() for path in out.iterdir())
    assert resumed.resumed < undamaged
    assert "is not what was written to it; it is made again" in caplog.text
    assert outside is None or (tmp_path / "x").read_bytes() == outside


def test_a_state_that_is_cut_or_edited_adopts_nothing_unseen(model, tmp_path):
    interrupt(model, tmp_path / "out")
    run(model, tmp_path / "whole")
    state = (tmp_path / "out" / "m.gguf.state").read_bytes()
    for content, some in (
        (state[: len(state) // 2], True),
        (re.sub(rb'"sha256": "..', b'"sha256": "..', state), False),
        (state.replace(b'"done": ', b'"done": -'), False),
        (state.replace(b'"file": 0', b'"file": 7'), False),
        (state.replace(b'"file": 0', b'"file": null'), False),
    ):
        shutil.copytree(tmp_path / "out", tmp_path / "copy")
        (tmp_path / "copy" / "m.gguf.state").write_bytes(content)
        assert (run(model, tmp_path / "copy").resumed > 0) == some
        assert contents(tmp_path / "copy") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "copy")


@pytest.mark.parametrize("name", ["m.gguf", "m.gguf.partial", "m.gguf.state", "m.gguf.json"])
@pytest.mark.parametrize("link", [os.link, os.symlink], ids=["hard", "sym"])
def test_no_input_is_overwritten_by_whatever_name(link, name, model, tmp_path):
    (tmp_path / "out").mkdir()
    before = contents(model)
    link(model / "model.safetensors", tmp_path / "out" / name)
    for force in (False, True):
        with pytest.raises(InputError, match="is an input of this command"):
            run(model, tmp_path / "out", force=force)
    assert contents(model) == before


@pytest.mark.parametrize(
    "make", [os.symlink, os.link, lambda target, path: os.mkfifo(path)], ids=["sym", "hard", "fifo"]
)
@pytest.mark.parametrize("name", ["m.gguf", "m.gguf.partial", "m.gguf.state", "m.gguf.json"])
def test_nothing_is_written_through_a_link_or_pipe(name, make, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("mine")
    make(tmp_path / "precious", tmp_path / "out" / name)
    with suppress(InputError):
        run(model, tmp_path / "out", force=True)
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_linked_partial_file_is_not_gone_on_with(model, tmp_path):
    interrupt(model, tmp_path / "out")
    os.link(tmp_path / "out" / "m.gguf.partial", tmp_path / "other")
    before = (tmp_path / "other").read_bytes()
    with pytest.raises(InputError, match=r"m\.gguf\.partial: is a link or no regular file"):
        run(model, tmp_path / "out")
    assert (tmp_path / "other").read_bytes() == before


def test_a_file_of_the_manifests_name_is_left_alone(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "m.gguf.json").write_text('{"mine": 1}')
    for force in (False, True):
        with pytest.raises(InputError, match=r"m\.gguf\.json: is there, and no manifest of dsv2quant's"):
            run(model, tmp_path / "out", force=force)
    assert contents(tmp_path / "out") == {"m.gguf.json": b'{"mine": 1}'}
