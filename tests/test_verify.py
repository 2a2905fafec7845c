"""inspect and verify: what an artifact holds, whether it is whole, and how far it is from its source."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError
from dsv2quant.evaluation.verify import _squares, bytes_compared, check, compare_tensors
from dsv2quant.formats.codec import Inputs
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.storage.durable import MANIFEST_FILE, STATE_FILE, dump_json
from dsv2quant.storage.manifest import DIGEST, read_manifest, sealed
from dsv2quant.storage.verified import VERIFIED_FILE


@pytest.fixture(scope="module")
def artifact(lite, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifact") / "out"
    convert(make_plan(open_checkpoint(lite), recipe.builtin("fp8-channel")), out, command="")
    return out


def test_inspect_lists_roles_schemes_and_configuration(artifact, cli):
    ran = cli("inspect", artifact)
    assert ran.code == 0
    assert "routed.down_proj    fp8-channel" in ran.out
    assert "3 of 8 routed, 2 shared, width 48, from layer 1" in ran.out
    assert "YaRN factor 40 over 32" in ran.out
    result = json.loads(cli("inspect", artifact, "--json").out)
    assert result["schema"] == "dsv2quant.inspect/2"
    assert result["parameters"] == sum(w.spec.size for w in open_checkpoint(artifact).weights)
    assert result["quantization_config"]["quant_method"] == "compressed-tensors"
    roles = {r["role"]: r["scheme"] for r in result["roles"]}
    assert (roles["o_proj"], roles["router"]) == ("fp8-channel", "bf16")


def test_verify_measures_what_consumers_decode(lite, artifact, cli):
    ran = cli("verify", artifact, "--source", lite, "--json", "-q")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    source, written = load_file(lite / "model.safetensors"), load_file(artifact / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    decoded = (written[name].float() * written[name.replace(".weight", ".weight_scale")]).to(torch.bfloat16)
    members = [n for n in source if n.endswith("o_proj.weight")]
    signal = sum(float(source[n].double().square().sum()) for n in members)
    noise = 0.0
    for n in members:
        back = (written[n].float() * written[n.replace(".weight", ".weight_scale")]).to(torch.bfloat16)
        noise += float((back.double() - source[n].double()).square().sum())
    role = next(r for r in result["roles"] if r["role"] == "o_proj")
    assert role["sqnr_db"] == pytest.approx(10 * np.log10(signal / noise), rel=1e-5)
    assert role["max_error"] >= float((decoded.float() - source[name].float()).abs().max())
    exact = next(r for r in result["roles"] if r["role"] == "embed")
    assert (exact["sqnr_db"], exact["exact"], exact["max_error"]) == (None, True, 0)
    assert role["exact"] is False
    assert result["files"]["model.safetensors"]["size"] == (artifact / "model.safetensors").stat().st_size
    assert (result["checked"], result["edited"], result["added"]) == ("manifest", [], [])
    assert len(result["worst"]) == 5
    assert result["worst"][0]["sqnr_db"] <= result["worst"][-1]["sqnr_db"]
    rows = {row["tensor"]: row for row in result["weights"]}
    assert list(rows) == [weight.spec.name for weight in open_checkpoint(artifact).weights]
    back = (decoded.double() - source[name].double()).square().sum()
    assert rows[name] == {
        "tensor": name, "role": "o_proj", "layer": 1, "scheme": "fp8-channel", "max_error": rows[name]["max_error"],
        "bits": 8 + 8 * written[name.replace(".weight", ".weight_scale")].nbytes / source[name].numel(),
        "sqnr_db": pytest.approx(10 * np.log10(float(source[name].double().square().sum() / back)), rel=1e-5),
    }  # fmt: skip
    assert (rows["model.embed_tokens.weight"]["layer"], rows["model.embed_tokens.weight"]["sqnr_db"]) == (None, None)
    text = cli("verify", artifact, "--source", lite, "-q").out
    assert "files match the manifest" in text
    assert "worst tensors:" in text


def change_byte(path, at=-100):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def resealed(folder, change):
    """A manifest after a change that somebody made with care."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    del manifest[DIGEST]
    change(manifest)
    (folder / MANIFEST_FILE).write_bytes(dump_json(sealed(manifest)))


def only(*names):
    return lambda folder: resealed(folder, lambda m: m.update(files={n: m["files"][n] for n in names}))


def listed(name, entry=None):
    return lambda folder: resealed(folder, lambda m: m["files"].update({name: entry or m["files"]["config.json"]}))


def replaced(name, make):
    def change(folder):
        (folder / name).rename(folder.parent / name)
        make(folder / name)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_byte(f / "model.safetensors"), "model.safetensors: its sha256 differs"),
        (lambda f: change_byte(f / "tokenizer.json"), "tokenizer.json: its sha256 differs"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "has 2 bytes; the manifest says"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
        (lambda f: (f / STATE_FILE).touch(), "the conversion is unfinished"),
        (lambda f: (f / MANIFEST_FILE).write_text("{}"), "is no manifest of dsv2quant's"),
        (lambda f: resealed(f, lambda m: m.pop("files")), "lists no files"),
        (lambda f: resealed(f, lambda m: m.update(files={})), "lists no files"),
        (only("model.safetensors"), "dsv2quant.json: does not list config.json"),
        (only("config.json"), "dsv2quant.json: does not list model.safetensors"),
        (only("config.json", "model.safetensors"), "holds generation_config.json, tokenizer.json, tokenizer_config"),
        (listed("../x"), "lists '../x', which is outside its folder"),
        (listed("/etc/passwd"), "which is outside its folder"),
        (listed("a\0b"), "which is outside its folder"),
        (listed("..."), "lists '...', which is outside its folder"),
        (listed("x", {"size": True, "sha256": "0" * 64}), "lists x without its size and sha256"),
        (listed("x", {"size": 1, "sha256": ["0"]}), "lists x without its size and sha256"),
        (replaced("tokenizer.json", lambda p: p.symlink_to(p.parents[1] / p.name)), "is a link out of its folder"),
        (replaced("tokenizer.json", os.mkfifo), "tokenizer.json: is no regular file"),
        (replaced("tokenizer.json", lambda p: p.mkdir()), "tokenizer.json: is no regular file"),
        (replaced("tokenizer.json", lambda p: p.symlink_to(p.name)), "tokenizer.json can't be read"),
        (replaced(MANIFEST_FILE, os.mkfifo), "dsv2quant.json: is no regular file"),
        (replaced(MANIFEST_FILE, lambda p: None), "copy: is no artifact of dsv2quant: it has no dsv2quant.json"),
    ],
)
def test_damage_is_found(damage, message, artifact, tmp_path, cli):
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    damage(copy)
    ran = cli("verify", copy, "-q")
    assert ran.code == 3
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_changed_bytes_of_the_manifest_is_found(artifact, tmp_path):
    content = (artifact / MANIFEST_FILE).read_bytes()
    path = tmp_path / MANIFEST_FILE
    path.write_bytes(content)
    assert read_manifest(path)["files"].keys() >= {"model.safetensors", "config.json"}
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        with pytest.raises(InputError):
            read_manifest(path)
    path.write_bytes(content.replace(b"  ", b" "))  # the same object
    with pytest.raises(InputError, match="was changed: its digest is another"):
        read_manifest(path)


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "consolidated.safetensors", "model.safetensors.index.json",
     "pytorch_model.bin", "x.pt", "modeling_x.py", "chat_template.jinja", "additional_chat_templates/x.jinja",
     "tokenizer.model", "added_tokens.json", "adapter_config.json", "hf_quant_config.json", "dsv2quant.folds"],
)  # fmt: skip
def test_an_added_file_that_programs_load_is_an_error(name, artifact, tmp_path, cli):
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"{}")
    ran = cli("verify", copy, "-q")
    assert ran.code == 3
    assert (name in ran.err) or ("LoRA adapter" in ran.err and name == "adapter_config.json")


def test_texts_may_be_edited_and_others_are_named(artifact, tmp_path, cli):
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    (copy / "README.md").write_text("# Mine")
    (copy / "notes.txt").touch()
    ran = cli("verify", copy, "-q")
    assert ran.code == 0, ran.err
    assert "edited since (texts may be): README.md" in ran.out
    assert "not in the manifest, and loaded by no program: notes.txt" in ran.out
    result = json.loads(cli("verify", copy, "--json", "-q").out)
    assert (result["edited"], result["added"]) == (["README.md"], ["notes.txt"])
    (copy / "README.md").unlink()
    assert "README.md is missing" in cli("verify", copy, "-q").err


def test_a_snapshot_of_the_hubs_cache_is_verified(artifact, tmp_path, cli):
    repository = tmp_path / "models--owner--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(artifact.iterdir())):
        shutil.copy(path, blobs / f"{i:040x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    ran = cli("verify", snapshot, "-q")
    assert ran.code == 0, ran.err
    assert "files match the manifest" in ran.out


def test_an_unquantized_folder_is_no_artifact(lite, cli):
    for more in ((), ("--source", lite)):
        ran = cli("verify", lite, *more, "-q")
        assert ran.code == 3
        assert "is no artifact of dsv2quant" in ran.err
        assert "`dsv2quant inspect` shows what it holds" in ran.err


def test_progress_counts_every_byte_that_is_read(lite, artifact):
    counted = []

    @contextmanager
    def progress(total, unit, label):
        seen = [0]

        def advance(nbytes):
            seen[0] += nbytes

        yield advance
        counted.append((label, total, seen[0]))

    opened, source = open_checkpoint(artifact), open_checkpoint(lite)
    checked = check(opened, progress)
    ((label, total, seen),) = counted
    assert (label, total) == ("checksums", seen)
    assert seen == sum(p.stat().st_size for p in artifact.iterdir() if p.name not in (MANIFEST_FILE, VERIFIED_FILE))
    assert checked.files.keys() == {p.name for p in artifact.iterdir()} - {MANIFEST_FILE, VERIFIED_FILE}
    seen = []
    compare_tensors(opened, source, seen.append)
    assert sum(seen) == bytes_compared(opened, source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_source_that_is_not_finite_is_no_reference(value, artifact, tmp_path, cli):
    weights = tiny.random_weights(tiny.LITE)
    weights["model.layers.0.self_attn.o_proj.weight"][3, 5] = value
    source = tiny.write_checkpoint(tmp_path / "source", tiny.LITE, weights)
    ran = cli("verify", artifact, "--source", source, "-q")
    assert ran.code == 3
    assert "model.layers.0.self_attn.o_proj.weight is NaN or infinite, there or in source" in ran.err


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_sums_of_squares_that_float32_does_not_hold(scale):
    x = torch.full((3, 5), scale)
    assert _squares(x) == pytest.approx(15 * scale**2)


@pytest.mark.parametrize("scheme", [s for s in CODECS if s != "bf16"])
def test_rows_decode_as_the_whole_does(scheme):
    codec, generator = CODECS[scheme], np.random.default_rng(0)
    rows = 328 if codec.refusal((328, 256)) is None else 352
    weight = generator.standard_normal((rows, 256)).astype(np.float32)
    (arrays,) = codec.encode([weight], inputs=[Inputs(np.ones(256, np.float32), 1.0)])
    torch_types = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16}
    parts = {
        part.suffix: torch.from_numpy(arrays[part.suffix]).view(
            torch_types.get(part.dtype, torch.from_numpy(arrays[part.suffix]).dtype)
        )
        for part in codec.layout(weight.shape)
    }
    whole = codec.decode(parts, torch.bfloat16)
    for begin, end in ((0, 128), (128, rows), (256, rows)):
        assert torch.equal(codec.decode(codec.rows(parts, begin, end), torch.bfloat16), whole[begin:end])


def test_another_source_is_refused(artifact, tmp_path, cli):
    other = tiny.write_checkpoint(tmp_path / "other", tiny.LITE | {"v_head_dim": 24})
    ran = cli("verify", artifact, "--source", other, "-q")
    assert ran.code == 3
    assert "other is another model" in ran.err
