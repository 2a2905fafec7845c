"""Hub ids, against a small hub of our own on the loopback interface."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import tiny
from hub_server import COMMIT, Served, serve, use
from huggingface_hub import constants


@pytest.fixture
def hub(lite, tmp_path) -> Iterator[Served]:
    """A hub that serves owner/name, for other processes."""
    files = {path.name: path.read_bytes() for path in lite.iterdir()}
    files["pytorch_model.bin"] = b"pickle"
    files["modeling_deepseek.py"] = b"raise SystemExit"
    files["README.md"] = b"---\nlicense: other\nlicense_name: deepseek\n---\n"
    with serve(files, tmp_path / "hf") as served:
        yield served


@pytest.fixture
def near_hub(hub, monkeypatch) -> Served:
    """The same for this process."""
    use(hub, monkeypatch)
    return hub


def dsv2quant(environment: dict[str, str], *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv2quant", *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_plan_reads_headers_and_no_weights(hub):
    environment, sent, files = hub.environment, hub.sent, hub.files
    ran = dsv2quant(environment, "plan", "owner/name", "--fp8=channel", "--json")
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert (result["model"], result["revision"]) == ("owner/name", COMMIT)
    assert result["bytes_in"] == result["parameters"] * 2
    # huggingface_hub reads the first 100 kB of a shard, where headers usually end.
    assert sum(size for file, size in sent if file.endswith(".safetensors")) < 101_000
    assert len(files["model.safetensors"]) > 400_000


def test_quiet_is_quiet_while_it_downloads(hub, tmp_path):
    ran = dsv2quant(hub.environment, "convert", "owner/name", "--fp8=channel", "-q", "-o", tmp_path / "out")
    assert (ran.returncode, ran.stderr) == (0, "")


def test_convert_downloads_safely_and_records_the_commit(hub, tmp_path):
    environment, sent = hub.environment, hub.sent
    out = tmp_path / "out"
    ran = dsv2quant(environment, "convert", "owner/name", "--fp8=channel", "-o", out, "-q")
    assert ran.returncode == 0, ran.stderr
    assert not {file for file, _ in sent} & {"pytorch_model.bin", "modeling_deepseek.py"}
    source = json.loads((out / "dsv2quant.json").read_text())["source"]
    assert (source["model"], source["revision"]) == ("owner/name", COMMIT)
    card = (out / "README.md").read_text()
    assert "license_name: deepseek" in card
    assert "base_model: owner/name" in card
    assert f"at revision {COMMIT}" in card
    assert not (out / "modeling_deepseek.py").exists()
    sent.clear()
    offline = dsv2quant(environment, "plan", "owner/name", "--offline", "--json")
    assert json.loads(offline.stdout)["revision"] == COMMIT
    assert sent == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("plan", "owner/missing"), "owner/missing: no such model on the hub and no such folder"),
        (("plan", "owner/name", "--revision", "nowhere"), "owner/name: no such revision"),
        (("plan", "owner/name", "--offline"), "owner/name: not in the local cache"),
        (("convert", "owner/name", "--offline", "--fp8", "-o", "x"), "not in the local cache"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(hub, args, message):
    ran = dsv2quant(hub.environment, *args)
    assert ran.returncode == 3, ran.stderr
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_hub_without_safetensors_and_a_hub_that_is_away(hub, tmp_path):
    environment, files = hub.environment, hub.files
    del files["model.safetensors"]
    ran = dsv2quant(environment, "plan", "owner/name")
    assert (ran.returncode, ran.stderr.count("\n")) == (3, 1)
    assert "only safetensors checkpoints are read" in ran.stderr
    ran = dsv2quant(environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}, "plan", "owner/name")
    assert (ran.returncode, ran.stderr.count("\n")) == (3, 1), ran.stderr
    assert "the hub can't be reached" in ran.stderr


HTML = (200, b"<html>Please log in</html>", {"Content-Type": "text/html"})
API, SHARD = "/api/models/owner/name", "model.safetensors"


@pytest.mark.parametrize("verb", [("plan",), ("convert", "-o", "out")], ids=["plan", "convert"])
@pytest.mark.parametrize(
    ("part", "answer", "message"),
    [
        (API, (401, b"{}", {}), "the hub refuses the token (set a valid HF_TOKEN"),
        (API, (401, b"{}", {"X-Error-Code": "RepoNotFound"}), "no such model on the hub and no such folder"),
        (API, (403, b"{}", {"X-Error-Code": "GatedRepo"}), "the hub refuses access (accept its licence"),
        (API, (403, b"{}", {}), "the hub refuses access (set an HF_TOKEN that may read it)"),
        (API, (404, b"", {}), "the hub answers with status 404 (check the id and HF_ENDPOINT)"),
        (API, (429, b"", {"Retry-After": "3600"}), "the hub has had too many requests (429) (wait"),
        (API, (503, b"", {}), "the hub fails with status 503 (retry"),
        (API, HTML, "the answer is not the hub's: "),
        (API, (200, b"[]", {}), "the answer is not the hub's: "),
        (API, (200, b"{}", {}), "the answer is not the hub's: "),
        (API, (0, b"", {}), "the hub can't be reached: "),
        ("config.json", (404, b"", {"X-Error-Code": "EntryNotFound"}), "the hub has no such file"),
        ("config.json", (200, b"<html>", {}), "the hub can't be reached: "),
        ("config.json", (403, b"", {}), "the hub refuses access"),
    ],
)
def test_what_goes_wrong_at_the_hub_is_one_line(part, answer, message, verb, near_hub, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    near_hub.broken[part] = answer
    ran = cli(verb[0], "owner/name", *verb[1:], "-q")
    assert ran.code == 3, ran.err
    assert ran.err.splitlines()[-1].startswith(f"error: owner/name: {message}")
    assert ran.err.count("error") == 1
    assert not (tmp_path / "out").exists()


def test_a_hub_that_refuses_connections_is_unreachable_for_every_verb(near_hub, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for args in (("plan",), ("inspect",), ("convert", "-o", tmp_path / "out"), ("verify",)):
        ran = cli(args[0], "owner/name", *args[1:])
        assert ran.code == 3
        assert ran.err.startswith("error: owner/name: the hub can't be reached: ")
        assert "(retry, or use --offline for what the cache holds)" in ran.err


@pytest.mark.parametrize("content", [b"no JSON", b"[]", b"\xff\xfe", b"{}", b"[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_bad_json_of_the_hub_is_one_line(file, content, near_hub, cli):
    near_hub.files[file] = content
    ran = cli("plan", "owner/name")
    assert (ran.code, ran.err.count("\n")) == (3, 1), ran.err
    assert file in ran.err


def test_a_truncated_shard_is_one_line(near_hub, cli, tmp_path):
    near_hub.files[SHARD] = near_hub.files[SHARD][:5]
    ran = cli("plan", "owner/name")
    assert (ran.code, "a safetensors header can't be parsed" in ran.err) == (3, True), ran.err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            "https://huggingface.co/owner/name/blob/main/config.json",
            "part of a model (give owner/name or owner/name@main)",
        ),
        ("https://huggingface.co/owner/name/tree/main/fp8", "part of a model (give owner/name or owner/name@main)"),
        ("https://huggingface.co/owner/name/discussions", "part of a model (give owner/name)"),
        ("https://huggingface.co/datasets/owner/name", "is no model's address (give a hub id, owner/name)"),
        ("https://huggingface.co/owner", "is no model's address (give a hub id, owner/name)"),
        ("https://[example/owner/name", "is a web address, not of the hub"),
        ("s3://bucket/owner/name.gguf", "is a web address, not of the hub"),
        ("https://example.com/owner/name", "is a web address, not of the hub (give a folder or a hub id"),
        ("owner/name/x", "no such folder (give a checkpoint's folder or a hub id, owner/name or owner/name@REVISION)"),
        ("./owner/name", "no such folder"),
        ("../name", "no such folder"),
    ],
)
def test_what_is_no_hub_id_says_what_to_give(model, message, cli):
    ran = cli("plan", model)
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert ran.err.startswith(f"error: {model}: ")
    assert message in ran.err


def test_an_address_and_a_revision_in_the_id_are_hub_ids(near_hub, cli):
    for model in (
        f"owner/name@{COMMIT}",
        "owner/name@refs/pr/1",
        "https://huggingface.co/owner/name",
        "https://huggingface.co/owner/name/",
        "https://huggingface.co/owner/name/tree/refs%2Fpr%2F1",
    ):
        ran = cli("plan", model, "--json", "--fp8=channel")
        assert ran.code == 0, ran.err
        assert (json.loads(ran.out)["model"], json.loads(ran.out)["revision"]) == ("owner/name", COMMIT)
    assert "no such revision" in cli("plan", "owner/name@nowhere").err
    ran = cli("plan", "owner/name@main", "--revision", "nowhere")
    assert (ran.code, "name two revisions" in ran.err) == (2, True)


def test_a_typo_suggests_what_lies_beside(near_hub, cli, tmp_path, monkeypatch):
    tiny.write_checkpoint(tmp_path / "examples" / "dsv2-mini", tiny.LITE)
    monkeypatch.chdir(tmp_path)
    for model in (
        "examples/dsv2-min",
        "examples/dsv2_mini",
        "./examples/dsv2-mini-",
        str(tmp_path / "examples/dsv-mini"),
    ):
        ran = cli("plan", model)
        assert (ran.code, ran.err.count("\n")) == (3, 1)
        assert "dsv2-mini?" in ran.err
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "did you mean examples/dsv2-mini?" in cli("convert", "examples/dsv2-min", "-o", "out").err
    assert "did you mean" not in cli("convert", "examples/other", "-o", "out").err
    assert "did you mean examples/dsv2-mini?" in cli("plan", "examples/dsv2-min", "--offline").err


def sharded(hub: Served, awkward) -> list[str]:
    """Put a checkpoint of two shards on the hub, beside weights that its index does not name."""
    hub.files.clear()
    hub.files.update({path.name: path.read_bytes() for path in awkward.iterdir()})
    shards = [name for name in hub.files if name.endswith(".safetensors")]
    others = ("consolidated.safetensors", "original/model.safetensors", "fp8/model-00001-of-00002.safetensors",
              "original/params.json", "onnx/config.json", "pytorch_model.bin", "model.gguf", "model.onnx")  # fmt: skip
    hub.files.update(dict.fromkeys(others, b"not fetched"))
    hub.files["additional_chat_templates/tool.jinja"] = b"{{ messages }}"
    return shards


def test_only_what_the_index_names_is_fetched(near_hub, awkward, cli, tmp_path):
    shards = sharded(near_hub, awkward)
    ran = cli("plan", "owner/name", "--json", "--fp8=channel")
    assert ran.code == 0, ran.err
    assert {file for file, _ in near_hub.sent if file.endswith(".safetensors")} == set(shards)
    near_hub.sent.clear()
    ran = cli("convert", "owner/name", "--fp8=channel", "-o", tmp_path / "out", "-q")
    assert ran.code == 0, ran.err
    fetched = {file for file, size in near_hub.sent if size}
    small = {"config.json", "model.safetensors.index.json", "additional_chat_templates/tool.jinja"}
    assert set(shards) <= fetched
    assert not {file for file in fetched - small if "/" in file or file.endswith((".bin", ".gguf", ".onnx"))}
    assert "consolidated.safetensors" not in fetched


def test_two_sets_of_weights_on_the_hub_are_an_error(near_hub, awkward, cli, tmp_path):
    shards = sharded(near_hub, awkward)
    near_hub.files[SHARD] = b"another"
    for args in (("plan",), ("convert", "-o", tmp_path / "out")):
        ran = cli(args[0], "owner/name", *args[1:])
        assert (ran.code, "two sets of weights" in ran.err) == (3, True), ran.err
    del near_hub.files[SHARD], near_hub.files[shards[1]]
    ran = cli("plan", "owner/name")
    assert (ran.code, f"the hub lacks {shards[1]}, which its index names" in ran.err) == (3, True), ran.err
    assert not [file for file, size in near_hub.sent if size and file.endswith(".safetensors")]


def test_offline_the_cache_serves_every_verb_and_a_part_of_it_is_told(near_hub, awkward, cli, tmp_path, monkeypatch):
    shards = sharded(near_hub, awkward)
    assert cli("convert", "owner/name", "--fp8=channel", "-o", tmp_path / "out", "-q").code == 0
    near_hub.sent.clear()
    for args in (("plan", "--fp8=channel", "--offline"), ("inspect", "--offline"), ("plan", "--fp8=channel")):
        if "--offline" not in args:
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        ran = cli(args[0], "owner/name", *args[1:], "--json")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["revision"] == COMMIT
    assert near_hub.sent == []
    cached = tmp_path / "hf/hub/models--owner--name/snapshots" / COMMIT
    (cached / shards[1]).unlink()
    ran = cli("plan", "owner/name")
    assert ran.code == 3
    assert f"owner/name: the local cache lacks {shards[1]} of it (run once online" in ran.err
    (cached / "config.json").unlink()
    assert cli("plan", "owner/name").code == 3


def test_a_full_disk_names_the_cache(hub, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    run = "from dsv2quant.cli.main import main; main()"
    args = ("convert", "owner/name", "-o", str(tmp_path / "out"), "-q")
    ran = subprocess.run(
        [sys.executable, "-c", limit + run, *args], env=hub.environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 3, ran.stderr
    assert f"error: {tmp_path / 'hf' / 'hub'}: can't keep downloads of owner/name: File too large" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_revision_of_what_is_here_is_a_usage_error(lite, cli, tmp_path):
    for model in (lite, tmp_path / "no.gguf"):
        ran = cli("plan", model, "--revision", "main")
        assert (ran.code, "--revision goes with a hub id" in ran.err) == (2, True)
