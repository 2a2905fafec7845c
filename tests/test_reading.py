"""Files that nobody vouches for: what is opened, which weights are the model's, and what errors say."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors import SafetensorError, safe_open

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.cli.terminal import Lines
from dsv2quant.errors import InputError
from dsv2quant.storage.durable import dump_json
from dsv2quant.storage.files import read_bytes
from dsv2quant.storage.manifest import sealed
from dsv2quant.storage.safetensors import read_header

SHARD, INDEX = "model.safetensors", "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
CONVERT = ("convert", "{model}", "--fp8=channel", "-q", "-o", "{out}")
GGUF = ("convert", "{model}", "--gguf", "Q8_0", "-q", "-o", "{out}.gguf")


@pytest.fixture
def model(tmp_path, wordy) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(wordy, folder)
    (folder / "config.json").write_text(json.dumps(tiny.WORDY | {"num_hidden_layers": 2}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "LICENSE").write_text("Do what you like.")
    return folder


@pytest.fixture
def run(cli, tmp_path, model):
    return lambda command: cli(*(word.format(model=model, out=tmp_path / "out") for word in command))


def refused(ran, *parts: str) -> None:
    assert ran.code == 3, ran.err
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("error: ")
    assert all(part in ran.err for part in parts), ran.err


FILES = (
    "config.json", SHARD, "tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md", "LICENSE",
    "chat_template.jinja",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device", "nothing"])
def test_only_files_are_read(kind, name, model, run):
    (model / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(model / name)
    else:
        (model / name).symlink_to("/dev/zero" if kind == "device" else "/no/such/place")
    if (kind, name) == ("nothing", SHARD):
        refused(run(CONVERT), f"shard {SHARD} is missing")
    else:
        what = {"pipe": "a pipe", "device": "out of its folder", "nothing": "which is not there"}[kind]
        refused(run(CONVERT), name, "is a device, a pipe or a socket" if (kind, name) == ("device", SHARD) else what)


@pytest.mark.parametrize("name", [SHARD, INDEX, "config.json"])
def test_a_folder_is_no_file(name, model, run):
    (model / name).unlink(missing_ok=True)
    (model / name).mkdir()
    refused(run(CONVERT), f"{name}: is a folder, not a file")


def test_files_are_read_up_to_a_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(InputError, match="a: larger than 4 bytes"):
        read_bytes(tmp_path / "a", 4)


@pytest.mark.parametrize("command", [CONVERT, GGUF])
@pytest.mark.parametrize("name", ["LICENSE", "chat_template.jinja", "README.md", "additional_chat_templates/rag.jinja"])
def test_links_out_of_the_folder_are_not_followed(name, command, model, run, tmp_path):
    (tmp_path / "secret").write_text("---\nlicense: secret\n---\n")
    path = model / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(tmp_path / "secret", path.parent))
    if "/" in name:
        (model / "chat_template.jinja").write_text("{{ messages }}")
    if command == GGUF:
        (model / "config.json").write_text(json.dumps(tiny.WORDY | {"q_lora_rank": 64}))
        tiny.write_checkpoint(model, tiny.WORDY | {"q_lora_rank": 64})
    refused(run(command), f"{name}: is a link out of its folder, to {tmp_path / 'secret'}", "put the file itself")
    assert not list(tmp_path.glob("out*"))


def test_nor_is_a_folder_of_templates_that_lies_elsewhere(model, run, tmp_path):
    (tmp_path / "others").mkdir()
    (tmp_path / "others/rag.jinja").write_text("secret")
    (model / "additional_chat_templates").symlink_to(tmp_path / "others")
    refused(run(CONVERT), "is a link out of its folder")


def test_shards_may_lie_on_another_disk(model, run, tmp_path):
    shutil.move(model / SHARD, tmp_path / "weights")
    (model / SHARD).symlink_to(tmp_path / "weights")
    (model / "LICENSE").rename(model / "LICENSE-MODEL")
    (model / "LICENSE").symlink_to("LICENSE-MODEL")
    assert run(CONVERT).code == 0
    assert (tmp_path / "out/LICENSE").read_text() == "Do what you like."
    assert not (tmp_path / "out/LICENSE").is_symlink()


@pytest.mark.parametrize("linked", [False, True])
def test_the_hub_caches_links_are_followed(linked, model, run, tmp_path):
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/rag.jinja").write_text("{{ documents }}")
    repo = tmp_path / "hub/models--owner--name"
    snapshot, blobs = repo / "snapshots/0123abcd", repo / "blobs"
    blobs.mkdir(parents=True)
    for i, path in enumerate(path for path in sorted(model.rglob("*")) if path.is_file()):
        blob = blobs / f"{i:040x}"
        path.rename(blob)
        link = snapshot / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    shutil.rmtree(model)
    model.symlink_to(snapshot)
    if linked:  # a folder of links into the cache, to change one of them
        model.unlink()
        shutil.copytree(snapshot, model, symlinks=False, copy_function=lambda a, b: os.symlink(os.path.realpath(a), b))
    assert run(CONVERT).code == 0
    assert (tmp_path / "out/additional_chat_templates/rag.jinja").read_text() == "{{ documents }}"


def test_further_templates_are_copied_and_verified(model, run, tmp_path, cli):
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    (model / "additional_chat_templates/notes.txt").write_text("not a template")
    assert run(CONVERT).code == 0
    out = tmp_path / "out"
    name = "additional_chat_templates/tool_use.jinja"
    assert (out / name).read_text() == "{{ tools }}"
    assert sorted(path.name for path in (out / "additional_chat_templates").iterdir()) == ["tool_use.jinja"]
    assert name in json.loads((out / "dsv2quant.json").read_text())["files"]
    assert cli("verify", out, "-q").code == 0
    (out / name).write_text("{{ fools }}")
    refused(cli("verify", out, "-q"), name, "differs from the manifest")


@pytest.mark.parametrize("name", ["../rag.jinja", "additional_chat_templates/../rag.jinja", "chat/rag.jinja", ".rag"])
def test_a_manifest_names_no_other_path(name, model, run, tmp_path, cli):
    assert run(CONVERT).code == 0
    manifest = tmp_path / "out/dsv2quant.json"
    content = json.loads(manifest.read_text())
    content["files"][name] = content["files"].pop("LICENSE")
    del content["digest"]
    manifest.write_bytes(dump_json(sealed(content)))
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(tmp_path / "out/LICENSE", os.path.normpath(path))
    refused(cli("verify", tmp_path / "out", "-q"), name)


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json", "LICENSE"])
def test_pointers_of_git_lfs_are_told(name, model, run):
    (model / name).write_bytes(POINTER)
    refused(run(CONVERT), f"{name}: is a git-lfs pointer, not the file", "git lfs pull")


@pytest.mark.parametrize(
    "command",
    [
        "eval-ppl {model} --text {file}.txt --ctx 8",
        "convert {model} --int4 --calibration {file}.jsonl -o {out}",
        "convert {model} --int4 --method mse --statistics {file}.safetensors -o {out}",
        "convert {model} --recipe {file}.yaml -o {out}",
        "plan {model} --gguf Q8_0 --imatrix {file}.gguf",
        "inspect {file}.gguf",
        "verify {file}.gguf",
        "generate {model} --prompt @{file}.txt",
    ],
)
def test_pointers_of_git_lfs_are_told_of_every_file_that_is_given(command, wordy, tmp_path, cli):
    for suffix in ("txt", "jsonl", "safetensors", "yaml", "gguf"):
        (tmp_path / f"file.{suffix}").write_bytes(POINTER)
    ran = cli(*command.format(model=wordy, file=tmp_path / "file", out=tmp_path / "out").split(), "-q")
    refused(ran, "is a git-lfs pointer, not the file", "git lfs pull")
    assert not (tmp_path / "out").exists()


def shards(folder: Path, count: int = 3) -> None:
    (folder / SHARD).unlink(missing_ok=True)
    tiny.write_checkpoint(folder, tiny.WORDY, shards=count)


def add(name: str, source: str = SHARD) -> Callable[[Path], object]:
    return lambda folder: shutil.copy(folder / source, folder / name)


def two_sets(folder: Path) -> None:
    stale = (folder / SHARD).read_bytes()
    shards(folder)
    (folder / SHARD).write_bytes(stale)


def two_counts(folder: Path) -> None:
    shards(folder, 2)
    shards(folder, 3)


def no_index(folder: Path) -> None:
    shards(folder)
    (folder / INDEX).unlink()


def half_downloaded(folder: Path) -> None:
    shards(folder)
    for i in (1, 3):
        (folder / f"model-0000{i}-of-00003.safetensors").unlink()
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/abc.4f5e.incomplete").touch()


def adapter(folder: Path) -> None:
    (folder / SHARD).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def all_of(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [change(folder) for change in changes]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (two_sets, [f"holds {SHARD} beside model-00001-of-00003.safetensors and 2 more", "two sets of weights"]),
        (two_counts, ["holds model-00001-of-00002.safetensors and 1 more beside", "two sets of weights"]),
        (add("model-00001-of-00001.safetensors"), ["holds model-00001-of-00001.safetensors beside model.safe"]),
        (no_index, ["3 shards without their index, model.safetensors.index.json: model-00001", "download the index"]),
        (half_downloaded, ["2 of 3 shards are missing: model-00001-of-00003.safetensors, ", "4f5e.incomplete: run it"]),
        (adapter, ["is a LoRA adapter, not a checkpoint", "merge_and_unload"]),
        (add("adapter_model.safetensors"), ["holds a LoRA adapter beside the weights", "merge it first"]),
        (add("adapter_config.json", "config.json"), ["holds a LoRA adapter beside the weights"]),
        (all_of(shards, add("config.json", INDEX)), ["architectures is None"]),
    ],
)
def test_which_weights_are_the_models(change, parts, model, run):
    change(model)
    refused(run(CONVERT), *parts)


@pytest.mark.parametrize("change", [None, shards])
def test_other_weights_are_said_not_to_be_read(change, model, tmp_path, caplog):
    shutil.copy(model / SHARD, tmp_path / "copy")
    if change is not None:
        change(model)
    shutil.copy(tmp_path / "copy", model / "consolidated.safetensors")
    (model / "._model.safetensors").write_bytes(b"of a Mac")
    caplog.set_level(logging.WARNING, "dsv2quant")
    open_checkpoint(model)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{model}: consolidated.safetensors is not read: the model is model" in caplog.text


def test_an_index_may_name_the_single_file(model):
    names = list(read_header(model / SHARD)[0])
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SHARD)}))
    assert open_checkpoint(model).files == [SHARD]


@pytest.mark.parametrize("options", [CONVERT, GGUF])
def test_a_source_that_fails_is_named(options, model, run, monkeypatch):
    tiny.write_checkpoint(model, tiny.WORDY | {"q_lora_rank": 64})
    real, reads = os.preadv, iter(range(1000))

    def failing(descriptor: int, buffers: list, offset: int) -> int:
        if next(reads) == 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    refused(run(options), f"model/{SHARD}: can't be read: Input/output error")


ENTRY = '"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}'
HEADERS = [
    f"{{{ENTRY}}}", f" \n{{ {ENTRY} }} \n",
    f'{{"__metadata__":null,{ENTRY}}}', f'{{"__metadata__":{{"a":"b"}},{ENTRY}}}',
    f"\ufeff{{{ENTRY}}}", f"{{{ENTRY}}}x", f"{{{ENTRY}}}\0", f"[{ENTRY[4:]}]", "null", '"a"', "",
    *(f'{{"__metadata__":{value},{ENTRY}}}' for value in ("[]", "1", '"x"', '{"a":1}', '{"a":null}', '{"a":{}}')),
    f'{{"__metadata__":{{}},"__metadata__":{{}},{ENTRY}}}', f'{{{ENTRY},"b":NaN}}',
    *(ENTRY.join("{}").replace("[1]", shape) for shape in
      ("[1.0]", "{}", '""', "[true]", "[-1]", f"[1{'0' * 4000}]", f"[1{'0' * 5000}]", "[4294967296,4294967296,0]",
       "[9223372036854775807,2]", "[[1]]", "null", "[1,1]", "[]")),
    *(ENTRY.join("{}").replace("[0,2]", offsets) for offsets in ("{}", "[0]", "[0,2,3]", '"02"', "[2,0]", "null")),
    *(ENTRY.join("{}").replace('"BF16"', dtype) for dtype in ("[]", "1", "{}", '"bf16"', "null", "NaN")),
    *(ENTRY.join("{}").replace('"a"', name) for name in ('"\\ud800"', '"a\tb"', "1", '"\\u001b[31m"')),
    '{"a":' + "[" * 3000 + "]" * 3000 + "}",
]  # fmt: skip


def test_what_the_safetensors_library_refuses_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    encoded = [header.encode(encoding) for header in HEADERS for encoding in ("utf-8", "utf-16", "utf-16-le")]
    taken = 0
    for header in (*encoded, b'{"a\xff":1}'):
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0")
        try:
            read_header(path)
        except InputError:
            continue
        taken += 1
        with safe_open(path, "np") as file:
            file.keys()
    assert taken >= 6
    path.write_bytes(struct.pack("<Q", len(encoded[-1])) + encoded[-1])
    with pytest.raises(SafetensorError):
        safe_open(path, "np")


def test_damaged_headers_are_one_line(tmp_path):
    """Any byte of a header may be another one."""
    header = bytearray(HEADERS[3].encode())
    random = np.random.default_rng(0)
    path = tmp_path / "x.safetensors"
    for _ in range(200):
        damaged = bytearray(header)
        for at in random.integers(0, len(header), random.integers(1, 4)):
            damaged[at] = random.integers(0, 256)
        path.write_bytes(struct.pack("<Q", len(damaged)) + damaged + b"\0\0")
        try:
            read_header(path)
        except InputError:
            continue
        safe_open(path, "np").__exit__(None, None, None)


@pytest.mark.parametrize(
    "content", [b'{"a": 1' + b"0" * 5000 + b"}", b'{"a": "\\ud800"}', b"\xef\xbb\xbf{}", b"[" * 9999]
)
def test_json_that_could_not_be_written_again_is_refused(content, model, run):
    (model / "config.json").write_bytes(content)
    refused(run(CONVERT), "config.json: not valid JSON")


def test_names_do_not_drive_the_terminal(model, cli, run, tmp_path):
    tensors = tiny.random_weights(tiny.WORDY)
    tensors["\x1b[2J\x9b31m\u202e.weight"] = tensors["model.norm.weight"].clone()
    tiny.write_checkpoint(model, tiny.WORDY, tensors)
    ran = run(CONVERT)
    refused(ran, r"\x1b[2J\x9b31m\u202e.weight")
    assert "\x1b" not in ran.err
    named = tmp_path / "a\x1b[31mb"
    shutil.copytree(tiny.write_checkpoint(tmp_path / "plain", tiny.WORDY), named)
    for verb in ("inspect", "plan"):
        ran = cli(verb, named)
        assert ran.code == 0
        assert "\x1b" not in ran.out + ran.err
        assert r"a\x1b[31mb" in ran.out
    record = logging.LogRecord("dsv2quant", logging.WARNING, "", 1, "%s\n is not read", ("\x1b]0;x\x07\udc80",), None)
    assert Lines().format(record) == "\\x1b]0;x\\x07\\udc80\n is not read"
