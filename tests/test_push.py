"""`push`: artifacts into repositories of a small hub of our own."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from hub_server import Repo, Served, serve, use

import dsv2quant as dq
from dsv2quant.errors import InputError
from dsv2quant.storage import push, push_split
from dsv2quant.storage.card import addressed

SHARD = "model.safetensors"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Served]:
    """A hub that has an empty owner/name; this process asks it, and waits for nothing."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with serve({}, tmp_path / "hf") as served:
        use(served, monkeypatch)
        yield served


@pytest.fixture(scope="module")
def verified(lite, tmp_path_factory) -> Path:
    """An artifact that was held against its source."""
    out = tmp_path_factory.mktemp("push") / "LITE-FP8"
    dq.convert(lite, out, scheme="fp8-channel")
    dq.verify(out, lite)
    return out


@pytest.fixture
def artifact(verified, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(verified, tmp_path / "LITE-FP8"))


def on_the_hub(hub: Served, name: str = "me/lite", branch: str = "main") -> dict[str, bytes]:
    return hub.state.repos[name].branches[branch][1]


def test_a_verified_artifact_arrives_whole_with_its_card_last(hub, verified, cli):
    ran = cli("push", verified, "me/lite", "--private", "--json")
    assert ran.code == 0, ran.err
    made, repo = json.loads(ran.out), hub.state.repos["me/lite"]
    ours = {path.name: path.read_bytes() for path in verified.iterdir()}
    assert b"vllm serve OWNER/NAME\n" in ours["README.md"]
    ours["README.md"] = addressed(ours["README.md"], "me/lite")  # who reads it there can copy its commands
    assert b"vllm serve me/lite\n" in ours["README.md"]
    assert {name: content for name, content in on_the_hub(hub).items() if name != ".gitattributes"} == ours
    assert repo.private
    assert [branch for branch, _ in repo.commits] == ["main", "main"]
    assert repo.commits[1][1] == ["README.md"]
    assert "README.md" not in repo.commits[0][1]
    assert hub.state.received == [(hashlib.sha256(ours[SHARD]).hexdigest(), len(ours[SHARD]))]
    assert sorted(made["sent"]) == sorted(ours)
    assert made["bytes"] == sum(map(len, ours.values()))
    assert made["commit"] == repo.branches["main"][0]


def test_what_is_there_already_is_not_sent_again(hub, artifact, cli):
    assert cli("push", artifact, "me/lite").code == 0
    hub.state.received.clear()
    (artifact / "README.md").write_text("# mine\n")
    made = dq.push(artifact, "me/lite")
    assert made.sent == ["README.md"]
    assert hub.state.received == []
    assert on_the_hub(hub)["README.md"] == b"# mine\n"
    commits = list(hub.state.repos["me/lite"].commits)
    made = dq.push(artifact, "me/lite")
    assert (made.sent, made.nbytes, made.commit) == ([], 0, hub.state.repos["me/lite"].branches["main"][0])
    assert hub.state.repos["me/lite"].commits == commits


def test_files_that_the_manifest_does_not_list_stay_here(hub, artifact):
    (artifact / "notes.txt").write_text("private")
    (artifact / "events").mkdir()
    dq.push(artifact, "me/lite")
    assert "notes.txt" not in on_the_hub(hub)


def test_the_pictures_of_a_card_go_with_it(hub, artifact, cli):
    for name in ("sqnr.svg", "other.svg"):
        (artifact / "figures").mkdir(exist_ok=True)
        (artifact / "figures" / name).write_text("<svg/>")
    card = artifact / "README.md"
    card.write_text(
        card.read_text() + "![errors](figures/sqnr.svg) ![](figures/gone.svg) ![](figures/../config.json)\n"
    )
    assert dq.verify(artifact).checked.added == []
    sent = dq.push(artifact, "me/lite").sent
    assert [name for name in sent if name.startswith("figures")] == ["figures/sqnr.svg"]
    assert on_the_hub(hub)["figures/sqnr.svg"] == b"<svg/>"
    assert dq.push(artifact, "me/lite").sent == []


def test_a_branch_is_made_and_main_left_alone(hub, verified):
    made = dq.push(verified, "owner/name", revision="fp8")
    assert made.revision == "fp8"
    assert SHARD in on_the_hub(hub, "owner/name", "fp8")
    assert on_the_hub(hub, "owner/name") == {}
    again = dq.push(verified, "owner/name", revision="fp8")
    assert again.sent == []


def test_what_was_not_verified_is_refused_unless_forced(hub, lite, tmp_path, cli):
    out = tmp_path / "out"
    dq.convert(lite, out, scheme="fp8-channel")
    dq.verify(out)  # checksums alone: push looks at these itself
    ran = cli("push", out, "me/lite")
    assert ran.code == 3
    assert ran.err == (
        f"error: {out}: nothing says that it was verified "
        "(`dsv2quant verify` with --source or --engine, or --force to push it as it is)\n"
    )
    assert hub.state.requests == []
    assert cli("push", out, "me/lite", "--force", "-q").code == 0
    assert cli("verify", out, "--source", lite, "-q").code == 0
    assert cli("push", out, "me/lite", "-q").code == 0
    # Of an artifact that was made anew the record says nothing.
    dq.convert(lite, out, scheme="fp8-tensor", force=True)
    assert not (out / "dsv2quant-verify.json").exists()
    shutil.copy(out / "dsv2quant.json", tmp_path / "other")
    record = {"schema": "dsv2quant.verified/1", "manifest": "0" * 64, "against": {"source": {}}}
    (out / "dsv2quant-verify.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="nothing says that it was verified"):
        dq.push(out, "me/lite")


def test_the_record_says_what_it_was_held_against(verified, lite, cli):
    record = json.loads((verified / "dsv2quant-verify.json").read_text())
    manifest = hashlib.sha256((verified / "dsv2quant.json").read_bytes()).hexdigest()
    assert (record["schema"], record["manifest"]) == ("dsv2quant.verified/1", manifest)
    source = record["against"]["source"]
    assert (source["model"], source["revision"], source["dsv2quant"]) == (lite.name, None, dq.__version__)
    assert 20 < source["lowest_sqnr_db"] < 60
    # It is no file that came from elsewhere.
    assert json.loads(cli("verify", verified, "--json").out)["added"] == []


def test_other_weights_are_not_noted_as_verified(artifact, tmp_path):
    (artifact / "dsv2quant-verify.json").unlink()
    weights = {name: tensor.flip(0) for name, tensor in tiny.random_weights(tiny.LITE).items()}
    other = tiny.write_checkpoint(tmp_path / "other", tiny.LITE, weights)
    assert dq.verify(artifact, other).wrong
    assert not (artifact / "dsv2quant-verify.json").exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_damaged_file_stops_it_before_anything_is_sent(force, hub, artifact):
    with (artifact / SHARD).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(InputError, match=r"model.safetensors: is not as its manifest has it"):
        dq.push(artifact, "me/lite", force=force)
    assert hub.state.requests == []


def test_what_is_no_finished_artifact_is_refused(hub, lite, artifact, tmp_path):
    with pytest.raises(InputError, match=r"is no artifact of dsv2quant: there is no dsv2quant\.json"):
        dq.push(lite, "me/lite")
    with pytest.raises(InputError, match=r"is no artifact of dsv2quant: there is no no.gguf.json"):
        dq.push(tmp_path / "no.gguf", "me/lite")
    (artifact / ".dsv2quant-state.json").write_text("{}")
    with pytest.raises(InputError, match="the conversion is unfinished"):
        dq.push(artifact, "me/lite")
    assert hub.state.requests == []


def test_a_public_repository_is_no_private_one(hub, verified):
    hub.state.repos["me/lite"] = Repo({})
    with pytest.raises(InputError, match="me/lite: is a public repository"):
        dq.push(verified, "me/lite", private=True)
    assert on_the_hub(hub) == {}
    assert hub.state.received == []


def test_a_card_that_the_hub_refuses_is_told_before_the_weights_are_sent(hub, artifact):
    for content, why in (
        (b"---\nlicense: [mit]\n---\n", "the hub would refuse the card: license must be a string"),
        (b"\xff", "not UTF-8"),
    ):
        (artifact / "README.md").write_bytes(content)
        with pytest.raises(InputError, match=f"README.md: {why}"):
            dq.push(artifact, "me/lite")
    assert hub.state.received == []
    assert "me/lite" not in hub.state.repos


def test_weights_of_another_artifact_in_the_repository_are_told(hub, verified, caplog):
    hub.state.repos["me/lite"] = Repo({"model-00001-of-00002.safetensors": b"old", "notes.md": b"mine"})
    dq.push(verified, "me/lite")
    assert "me/lite also holds model-00001-of-00002.safetensors, which programs may load" in caplog.text
    assert on_the_hub(hub)["notes.md"] == b"mine"


def test_a_file_that_few_clients_can_download_is_told(hub, verified, caplog, monkeypatch):
    dq.push(verified, "me/lite")
    assert caplog.messages == []
    monkeypatch.setattr(push, "LARGE", 100_000)
    dq.push(verified, "me/lite")
    assert "model.safetensors has more than 50 GB: clients without hf_xet can't download it" in caplog.text


def test_a_gguf_file_goes_with_its_manifest_and_the_card_that_names_it(hub, tmp_path):
    out = tmp_path / "mini-Q8_0.gguf"
    dq.convert(tiny.MINI, out, gguf="Q8_0")
    with pytest.raises(InputError, match="nothing says that it was verified"):
        dq.push(out, "me/gguf")
    dq.verify(out, tiny.MINI)
    (tmp_path / "README.md").write_text("# my own notes\n")
    dq.push(out, "me/gguf")
    names = {"mini-Q8_0.gguf", "mini-Q8_0.gguf.json", "mini-Q8_0.gguf.verify.json"}
    assert on_the_hub(hub, "me/gguf").keys() == names | {".gitattributes"}
    (tmp_path / "README.md").write_text("# mini\n\n    llama-cli -m mini-Q8_0.gguf\n")
    assert dq.push(out, "me/gguf").sent == ["README.md"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A GGUF file of 3.4 MB that was verified, with a card."""
    out = tmp_path_factory.mktemp("gguf") / "mini-Q4_K_M.gguf"
    dq.convert(tiny.MINI, out, gguf="Q4_K_M")
    dq.verify(out, tiny.MINI)
    text = f"# mini\n\n    llama-cli -m {out.name}\n\n| file | size |\n|---|---|\n| {out.name} | 3.40 GB |\n"
    out.with_name("README.md").write_text(f"{text}\nSee {out.name}.json: dsv2quant convert -o {out.name}\n")
    return out


@pytest.mark.parametrize("small", [0, 10_000_000], ids=["by a file", "in memory"])
def test_a_gguf_file_is_cut_while_it_is_sent_as_convert_cuts_it(small, hub, whole, tmp_path, monkeypatch, cli):
    monkeypatch.setattr(push_split, "SMALL", small)
    beside = sorted(path.name for path in whole.parent.iterdir())
    assert cli("push", whole, "me/gguf", "--split", "2MB", "-q").code == 0
    assert sorted(path.name for path in whole.parent.iterdir()) == beside
    dq.convert(tiny.MINI, tmp_path / "cut" / whole.name, gguf="Q4_K_M", split_max_size="2MB")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "cut").glob("*-of-*.gguf")}
    assert len(expected) > 1
    arrived = on_the_hub(hub, "me/gguf")
    assert {name: content for name, content in arrived.items() if name.endswith(".gguf")} == expected
    # What was downloaded is an artifact that verifies, and that may be pushed again.
    for name, content in arrived.items():
        (tmp_path / "got").mkdir(exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    first = tmp_path / "got" / min(expected)
    assert sorted(expected) == [name for name in dq.push(first, "me/again").sent if name.endswith(".gguf")]
    assert not dq.verify(first, tiny.MINI).wrong
    manifest = json.loads(arrived[f"{whole.name}.json"])
    assert manifest["split_from"] == json.loads(whole.with_name(f"{whole.name}.json").read_text())["files"]
    hub.state.received.clear()
    assert dq.push(whole, "me/gguf", split="2MB").sent == []
    assert hub.state.received == []


def test_a_card_names_the_pieces(hub, whole):
    names = sorted(name for name in dq.push(whole, "me/gguf", split="2MB").sent if name.endswith(".gguf"))
    card = on_the_hub(hub, "me/gguf")["README.md"].decode()
    assert f"llama-cli -m {names[0]}\n" in card
    assert [line.split()[1] for line in card.splitlines() if line.startswith("| mini")] == names
    assert f"See {whole.name}.json: dsv2quant convert -o {whole.name}\n" in card


def test_what_needs_no_cut_is_sent_as_it_is_and_what_cant_be_cut_is_told(hub, whole, verified, cli):
    assert whole.name in dq.push(whole, "me/gguf", split="1GB").sent
    hub.state.requests.clear()
    for artifact, size, message in (
        (verified, "2MB", "--split goes with a single GGUF file (`convert --max-shard-size` cuts what is in a folder"),
        (whole, "10KB", "--split 10,000: "),
        (whole, "many", "'many' is not a size"),
    ):
        ran = cli("push", artifact, "me/gguf", "--split", size)
        assert (ran.code, message in ran.err) == (2, True), ran.err
    assert hub.state.requests == []


def test_a_disk_without_room_for_a_piece_and_a_file_that_is_too_large_are_told(hub, whole, monkeypatch):
    monkeypatch.setattr(push_split, "SMALL", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(InputError, match="for a piece at a time, the disk has 1,000 free"):
        dq.push(whole, "me/gguf", split="2MB")
    monkeypatch.setattr(push, "LARGEST", 1_000_000)
    with pytest.raises(
        InputError, match=r"has more than 500 GB, which the hub doesn't take \(`push --split 45GB` cuts"
    ):
        dq.push(whole, "me/gguf")
    assert hub.state.received == []


# --- faults ---


@pytest.mark.parametrize(
    "fault",
    [
        ("PUT /lfs/", (503, b"", {})),
        ("PUT /lfs/", (429, b"", {"Retry-After": "0"})),
        ("objects/batch", (503, b"", {})),
        ("objects/batch", (429, b"", {"Retry-After": "0"})),
        ("preupload", (503, b"", {})),
        ("/lfs/verify/", (503, b"", {})),
        ("/commit/", (503, b"", {})),
        ("/commit/", (0, b"", {})),
    ],
)
def test_a_hub_that_fails_for_a_moment_is_asked_again(fault, hub, verified):
    hub.state.faults.append(fault)
    dq.push(verified, "me/lite")
    assert hub.state.faults == []
    assert on_the_hub(hub)[SHARD] == (verified / SHARD).read_bytes()


def test_an_upload_that_is_cut_is_begun_again(hub, verified):
    hub.state.cuts.append(("PUT ", 100_000))
    dq.push(verified, "me/lite")
    assert hub.state.cuts == []
    assert on_the_hub(hub)[SHARD] == (verified / SHARD).read_bytes()


def test_after_a_run_that_was_cut_the_same_command_sends_the_rest(hub, verified, cli):
    hub.state.broken["/commit/"] = (503, b"", {})
    ran = cli("push", verified, "me/lite")
    assert ran.code == 3
    assert ran.err.splitlines()[-1] == (
        "error: me/lite: the hub fails with status 503 (run the same command again: it sends what is not there yet)"
    )
    assert len(hub.state.received) == 1
    del hub.state.broken["/commit/"]
    hub.state.received.clear()
    assert cli("push", verified, "me/lite").code == 0
    assert hub.state.received == []  # the object is there, though no commit had it
    assert on_the_hub(hub)[SHARD] == (verified / SHARD).read_bytes()


@pytest.mark.parametrize(
    ("part", "answer", "message"),
    [
        ("/api/repos/create", (401, b"{}", {}), "the hub refuses the token (log in with a token that may write there"),
        ("/api/repos/create", (403, b"{}", {}), "the hub refuses access (log in with a token that may write there"),
        ("/preupload/", (403, b"{}", {}), "the hub refuses access (log in with a token that may write there"),
        ("/api/models/", (401, b"{}", {"X-Error-Code": "RepoNotFound"}), "the hub shows no such repository (log in"),
        ("/lfs/", (500, b"", {}), "the hub fails with status 500 (run the same command again"),
        ("/lfs/", (0, b"", {}), "the hub can't be reached: "),
        ("/commit/", (0, b"", {}), "the hub can't be reached: "),
        ("/commit/", (412, b"{}", {}), "the hub answers with status 412"),
    ],
)
def test_what_the_hub_refuses_is_one_line(part, answer, message, hub, verified, cli):
    hub.state.broken[part] = answer
    ran = cli("push", verified, "me/lite", "-q")
    assert ran.code == 3
    assert ran.err.splitlines()[-1].startswith(f"error: me/lite: {message}"), ran.err
    assert ran.err.count("error:") == 1
    assert "Traceback" not in ran.err
