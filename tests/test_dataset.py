"""`--calibration ORG/NAME[:SPLIT][#COLUMN]`: data sets from a small hub of our own."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny
from hub_server import COMMIT, Repo, Served, serve, use
from huggingface_hub import constants
from pyarrow import parquet

from dsv2quant.errors import InputError
from dsv2quant.text import dataset
from dsv2quant.text.calibration import load

CHATS = [
    [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}] for i in range(40)
]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def as_parquet(columns: dict[str, list[Any]]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.table(columns), sink, row_group_size=8)
    return sink.getvalue()


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FILES = {
    "README.md": b"# no front matter\n",
    "data/train_sft-00000-of-00002.parquet": as_parquet({"prompt": ["p"] * 20, "messages": CHATS[:20]}),
    "data/train_sft-00001-of-00002.parquet": as_parquet({"prompt": ["p"] * 20, "messages": CHATS[20:]}),
    "data/train-00000-of-00001.parquet": as_parquet({"text": [f"Text {i}." for i in range(30)], "n": list(range(30))}),
    "script.py": b"raise SystemExit",
}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Served]:
    """A hub that has org/chats."""
    with serve({}, tmp_path / "hf") as served:
        served.state.repos["datasets/org/chats"] = Repo(dict(FILES))
        use(served, monkeypatch)
        yield served


@pytest.fixture
def folder(tmp_path) -> Path:
    """Of a checkpoint that has a chat template."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "model"


def put(hub: Served, files: dict[str, bytes]) -> None:
    """Commit these files, and only these."""
    repo = hub.state.repos["datasets/org/chats"] = Repo(files)
    repo.branches["main"] = (hashlib.sha1(repr(files).encode()).hexdigest(), files)


def texts(spec: str, folder: Path, **where: Any) -> list[str]:
    return [document.text for document in load(spec, folder, **where).documents]


def test_a_split_of_texts_and_its_commit(hub, folder):
    found = load("org/chats", folder)
    assert [document.text for document in found.documents] == [f"Text {i}." for i in range(30)]
    assert found.source == f"org/chats@{COMMIT}:train"
    assert {name for name, _ in hub.sent} == {"README.md", "data/train-00000-of-00001.parquet"}
    assert load(found.source, folder) == found
    assert load("org/chats@main:train#text", folder).documents == found.documents


def test_chats_go_through_the_template(hub, folder):
    found = load("org/chats:train_sft#messages", folder)
    assert len(found.documents) == 40
    assert found.documents[37].text == "<user>Question 37?<assistant>Answer 37."
    assert all(document.is_chat for document in found.documents)
    assert found.source == f"org/chats@{COMMIT}:train_sft#messages"


def test_json_lines_of_every_form_and_a_file_of_one_list(hub, folder):
    share = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "id": 3}
    put(hub, {"chats.jsonl": as_lines([share, {"text": "A text."}, {"messages": CHATS[0]}])})
    assert texts("org/chats", folder) == ["<user>Hi<assistant>Ho", "A text.", "<user>Question 0?<assistant>Answer 0."]
    put(hub, {"ShareGPT_cleaned.json": json.dumps([share, share]).encode(), "dataset_infos.json": b"{}"})
    assert texts("org/chats", folder) == ["<user>Hi<assistant>Ho"] * 2
    put(hub, {"a/train.jsonl": as_lines([{"body": "One."}, {"body": "Two."}]), "a/test.jsonl": b"no JSON"})
    assert texts("org/chats#body", folder) == ["One.", "Two."]


def test_conversations_in_parquet_and_nulls_that_its_rows_have(hub, folder):
    messages = [[{"role": "user", "content": "Hi", "name": None}, {"role": "assistant", "content": "Ho", "name": "x"}]]
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.name is defined }} {% endfor %}")
    put(hub, {"train.parquet": as_parquet({"messages": messages, "system": [None]})})
    assert texts("org/chats", folder) == ["False True "]
    conversations = [[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]]
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    put(hub, {"train.parquet": as_parquet({"conversations": conversations, "system": ["Be."]})})
    assert texts("org/chats", folder) == ["<system>Be.<user>Hi<assistant>Ho"]


CARD = """---
configs:
- config_name: extra
  data_files: other.jsonl
- config_name: main
  default: true
  data_files:
  - split: train
    path: ["part-*.jsonl"]
  - split: held
    path: held/*.jsonl
---
# card
"""


def test_the_card_says_which_files_make_a_split(hub, folder):
    names = ("part-1.jsonl", "part-2.jsonl", "held/x.jsonl", "other.jsonl")
    lines = {name: as_lines([{"text": name}]) for name in names}
    put(hub, lines | {"README.md": CARD.encode()})
    assert texts("org/chats", folder) == ["part-1.jsonl", "part-2.jsonl"]
    assert texts("org/chats:held", folder) == ["held/x.jsonl"]
    put(hub, lines | {"README.md": CARD.replace("  default: true\n", "").encode()})
    with pytest.raises(InputError, match=r"has several configurations: extra, main \(give a file of it\)"):
        load("org/chats", folder)
    put(hub, lines | {"README.md": b"---\nconfigs: [\n---\n"})  # as if it said nothing
    with pytest.raises(InputError, match=r"has several configurations: , held"):
        load("org/chats", folder)


def test_no_more_rows_are_read_than_calibration_needs(hub, folder, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_ROWS", 25)
    assert len(texts("org/chats:train_sft#messages", folder)) == 25
    hub.sent.clear()
    monkeypatch.setattr(dataset, "MAX_ROWS", 7)
    assert texts("org/chats", folder) == [f"Text {i}." for i in range(7)]
    put(hub, {"train.jsonl": as_lines([{"text": "1"}, {"text": "2"}]) * 4 + b"no JSON", "x/y.txt": b""})
    assert texts("org/chats", folder) == ["1", "2"] * 3 + ["1"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("org/none", "org/none: no such data set on the hub and no such file (check the spelling"),
        ("org/chats@nowhere", "org/chats: no such revision (give a branch, tag or commit of it)"),
        (
            "org/chats:test",
            "org/chats:test: has no split 'test': there are train, train_sft (give ORG/NAME:SPLIT#COLUMN",
        ),
        ("org/chats#body", "train-00000-of-00001.parquet: has no column 'body': there are text, n (give ORG/NAME"),
        ("org/chats:train_sft", "has the columns messages and prompt (name one, as org/chats#messages)"),
        ("org/chats#n", "parquet, row 1: 'n' is neither a text nor a list of messages: 0 (name another column)"),
    ],
)
def test_what_is_not_there_is_one_line(spec, message, hub, folder):
    with pytest.raises(InputError) as raised:
        load(spec, folder)
    assert message in str(raised.value)


def test_files_that_are_no_data_or_damaged_are_one_line(hub, folder):
    for files, message in (
        ({"data.csv": b"a,b"}, "holds no parquet and no JSON files (give a text"),
        ({"train.parquet": b"PAR1 no"}, "org/chats, train.parquet: can't be read: "),
        ({"train.parquet": as_parquet({"n": [1]})}, "has none of the columns text, messages, conversations, prompt"),
        ({"train.jsonl": b'{"text": 3}'}, "org/chats, train.jsonl, line 1: its 'text' is not what it must be"),
        ({"train.jsonl": b"\xff\xfe"}, "can't be read: 'utf-8' codec can't decode"),
        ({"train.jsonl": as_lines([{"text": "  "}])}, "org/chats: holds no text"),
    ):
        put(hub, files)
        with pytest.raises(InputError) as raised:
            load("org/chats", folder)
        assert message in str(raised.value)


def test_offline_the_cache_serves_what_was_read_once(hub, folder, monkeypatch):
    found = load("org/chats:train_sft#messages", folder)
    hub.sent.clear()
    assert load(found.source, folder, offline=True) == found
    assert load("org/chats:train_sft#messages", folder, offline=True) == found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load("org/chats:train_sft#messages", folder) == found
    assert hub.sent == []
    with pytest.raises(InputError, match=r"org/other:train: not in the local cache \(run once online"):
        load("org/other", folder)


def test_a_path_that_is_there_wins_and_names_of_files_are_no_ids(hub, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org/chats").write_text("A file.")
    assert texts("org/chats", folder) == ["A file."]
    for spec in ("no/text.txt", "no/chats.jsonl", "./no/chats", "chats", "a/b/c"):
        with pytest.raises(InputError, match="can't be read: no such file"):
            load(spec, folder)
    assert hub.state.requests == []


def test_manifest_card_and_statistics_have_the_commit(hub, tmp_path, cli):
    long = [f"The quick brown fox jumps over {i} lazy dogs, once more and again." for i in range(300)]
    put(hub, {"train.jsonl": as_lines([{"text": line} for line in long])})
    commit = hub.state.repos["datasets/org/chats"].branches["main"][0]
    model = tiny.write_checkpoint(tmp_path / "model", tiny.WORDY)
    asked = ("--calibration", "org/chats", "--num-calibration-samples", "8", "--max-seq-length", "32")
    ran = cli("convert", model, "--fp8=static", "--target", "vllm", *asked, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    source = f"org/chats@{commit}:train"
    assert json.loads((tmp_path / "out/dsv2quant.json").read_text())["calibration"]["source"] == source
    card = (tmp_path / "out/README.md").read_text()
    assert f"--calibration {source}" in card
    assert "datasets:\n- org/chats\n" in card
    ran = cli("calibrate", model, *asked, "-o", tmp_path / "stats.safetensors", "--json")
    assert ran.code == 0, ran.err
    assert source in (tmp_path / "stats.safetensors").read_bytes().decode("utf-8", "replace")
    # The card's own command reads the same again, though main went on.
    hub.state.repos["datasets/org/chats"].branches |= {"old": (commit, hub.state.repos["datasets/org/chats"].files)}
    hub.state.repos["datasets/org/chats"].branches |= {"main": ("f" * 40, {"train.jsonl": b"{}"})}
    again = ("--calibration", source, *asked[2:])
    assert cli("convert", model, "--fp8=static", "--target", "vllm", *again, "-o", tmp_path / "out").code == 0
    ran = cli("calibrate", model, *asked, "--protocol", "llama.cpp", "-o", tmp_path / "x.safetensors")
    assert (ran.code, "needs --calibration FILE, a plain text file" in ran.err) == (2, True)
