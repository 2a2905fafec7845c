"""Tuned GGUF files: what is trained of each type, what stays, and runs that are cut."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf_tiny
import numpy as np
import pytest
import tiny
import torch
from calibrated import interrupt
from gguf import GGUFReader
from gguf.quants import dequantize
from test_tuning import divergence

import dsv2quant as dq
from dsv2quant.calib import trained, tuning
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.storage.durable import dump_json
from dsv2quant.storage.manifest import DIGEST, sealed
from dsv2quant.text.calibration import load, windows

pytestmark = pytest.mark.usefixtures("one_thread")
CTX, TOKENS = 32, 768
RECIPE = """
name: mixed
gguf:
  - {tensors: ["attn_q_a", "ffn_down_exps"], type: Q6_K}
  - {tensors: ["attn_q_b"], type: MXFP4}
  - {tensors: ["ffn_gate_exps"], type: IQ4_XS}
  - {tensors: ["attn_k_b", "attn_kv_a_mqa"], type: Q4_0}
  - {tensors: ["ffn_*"], layers: "0", type: IQ3_S}
  - {tensors: ["attn_output"], type: BF16}
  - {tensors: ["*"], type: Q3_K}
"""


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Few steps that are large."""
    monkeypatch.setattr(trained, "RATE", 2e-2)
    monkeypatch.setattr(tuning, "STEP_TOKENS", 128)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Each of its tensors fills blocks of 256."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("v2") / "v2", gguf_tiny.V2, gguf_tiny.weights(gguf_tiny.V2))


@pytest.fixture(scope="module")
def mix(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mix") / "mix.yaml"
    path.write_text(RECIPE)
    return path


def made(model: Path, out: Path, fox: Path, mix: object, tune: int | None = TOKENS, **more: Any) -> Path:
    asked: dict[str, Any] = {"calibration": fox, "length": CTX, "tune": tune} if tune is not None else {}
    dq.convert(model, out, gguf=str(mix), **asked, **more)
    return out


def about(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_name(path.name + ".json").read_text())
    return found


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def plain(model, fox, mix, tmp_path_factory) -> Path:
    return made(model, tmp_path_factory.mktemp("plain") / "m.gguf", fox, mix, None)


@pytest.fixture(scope="module")
def tuned(model, fox, mix, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as m:
        m.setattr(trained, "RATE", 2e-2)
        m.setattr(tuning, "STEP_TOKENS", 128)
        return made(model, tmp_path_factory.mktemp("tuned") / "m.gguf", fox, mix)


def test_blocks_norms_and_routers_are_trained_and_nothing_else(plain, tuned):
    before, after = tensors(plain), tensors(tuned)
    assert [(t.name, t.tensor_type, tuple(t.shape)) for t in before.values()] == [
        (t.name, t.tensor_type, tuple(t.shape)) for t in after.values()
    ]
    same = {name for name in before if np.array_equal(before[name].data, after[name].data)}
    held = {name for name in before if name.split(".")[-2] in ("attn_k_b", "attn_v_b", "attn_output")}
    assert same == held | {"token_embd.weight"}
    assert about(tuned)["tuned"]["accepted"]


def test_no_block_moves_beyond_a_tenth_and_codes_by_few_steps(plain, tuned):
    for name, tensor in tensors(plain).items():
        wanted, found = (dequantize(t.data, t.tensor_type) for t in (tensor, tensors(tuned)[name]))
        if tensor.tensor_type.name in ("IQ3_S", "F32"):  # no codes: factors alone
            moved = np.log(found[wanted != 0] / wanted[wanted != 0])
            assert np.abs(moved).max() < trained.BOUND + 2**-8, name
        assert np.abs(found - wanted).max() < np.abs(wanted).max(), name


def test_the_divergence_of_what_is_held_out_falls_as_the_manifest_says(model, fox, plain, tuned):
    said = about(tuned)["tuned"]
    assert said["kld_after"] < 0.97 * said["kld_before"]
    tokenizer = open_checkpoint(model).tokenizer()
    held = torch.from_numpy(windows(load(fox, model), tokenizer, TOKENS // CTX, CTX, 0))[8::16]
    assert held.numel() == said["held_out_tokens"]
    for key, path in (("kld_before", plain), ("kld_after", tuned)):
        assert divergence(model, path, held) == pytest.approx(said[key], rel=1e-3)


@pytest.mark.parametrize("together", [True, False], ids=["whole", "by-layers"])
@pytest.mark.parametrize("config", [gguf_tiny.LLAMA, gguf_tiny.ODD], ids=["llama", "tied"])
def test_rows_in_another_order_and_tied_heads_are_trained_in_place(config, together, fox, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "RATE", 5e-3)
    monkeypatch.setattr(tuning, "_fits", lambda *args: together)
    source = tiny.write_checkpoint(tmp_path / "model", config, gguf_tiny.weights(config))
    path = made(source, tmp_path / "m.gguf", fox, "Q4_0")
    said = about(path)["tuned"]
    assert said["accepted"]
    assert open_checkpoint(path).config == open_checkpoint(made(source, tmp_path / "p.gguf", fox, "Q4_0", None)).config
    tokenizer = open_checkpoint(source).tokenizer()
    held = torch.from_numpy(windows(load(fox, source), tokenizer, TOKENS // CTX, CTX, 0))[8::16]
    assert divergence(source, path, held) == pytest.approx(said["kld_after"], rel=1e-3)
    before = divergence(source, tmp_path / "p.gguf", held)
    assert before == pytest.approx(said["kld_before"], rel=1e-3)


def test_where_it_rises_the_file_is_the_untuned_one(model, fox, mix, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "RATE", -2e-2)
    path = made(model, tmp_path / "m.gguf", fox, mix)
    assert not about(path)["tuned"]["accepted"]
    assert path.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("at", ["untuned", "snapshot", "end"])
def test_cut_anywhere_it_continues_to_the_same_bytes(at, model, fox, mix, tuned, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    with monkeypatch.context() as m:
        if at == "untuned":
            m.setattr(tuning, "whole_model", interrupt)
        elif at == "end":
            m.setattr("dsv2quant.conversion.convert._write_small_files", interrupt_late(path))
        else:
            share = tuning._share
            m.setattr(tuning, "_share", lambda step, steps: interrupt() if step == 4 else share(step, steps))
        with pytest.raises(KeyboardInterrupt):
            made(model, path, fox, mix)
    assert not path.exists() or at == "end"
    made(model, path, fox, mix)
    assert path.read_bytes() == tuned.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "m.gguf.json"]


def interrupt_late(path: Path) -> Any:
    """Ctrl-C when the tuned file is written, not the untuned one before it."""
    from dsv2quant.conversion import convert

    write = convert._write_small_files

    def wrapped(sink: Any, *rest: Any) -> Any:
        return interrupt() if sink.out == path else write(sink, *rest)

    return wrapped


def test_split_files_hold_the_same_tensors(model, fox, mix, tuned, tmp_path):
    made(model, tmp_path / "m.gguf", fox, mix, split_max_size="2MB")
    files = sorted(tmp_path.glob("m-*.gguf"))
    assert len(files) > 1
    found = {t.name: t.data for path in files for t in GGUFReader(path).tensors}
    assert found.keys() == tensors(tuned).keys()
    assert all(np.array_equal(found[name], tensor.data) for name, tensor in tensors(tuned).items())


def test_it_is_told_what_came_of_it(model, fox, tmp_path, cli):
    asked = ["--gguf", "Q4_0", "--tune", TOKENS, "--calibration", fox, "--max-seq-length", CTX]
    ran = cli("convert", model, "-o", tmp_path / "m.gguf", *asked)
    said = about(tmp_path / "m.gguf")
    counts = said["tuned"]["tokens"], said["tuned"]["held_out_tokens"]
    assert ran.out.startswith("tuned on {:,} tokens: KLD of {:,} held out".format(*counts))
    assert said["command"].endswith(f"--tune {TOKENS} --gguf Q4_0 --calibration fox.txt --max-seq-length 32 --seed 0")
    assert said["calibration"]["tuning"]["tokens"] == TOKENS


def test_tuned_scales_are_no_wrong_scales_but_larger_ones_are(model, fox, mix, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "RATE", 5e-3)
    tuned = made(model, tmp_path / "tuned.gguf", fox, mix)
    assert cli("verify", tuned, "--source", model).code == 0
    folder = tmp_path / "m"
    folder.mkdir()
    blocks = bytearray(tuned.read_bytes())
    tensor = next(t for t in GGUFReader(tuned).tensors if t.name == "blk.1.attn_q_a.weight")
    rows = np.frombuffer(blocks, np.uint8, tensor.n_bytes, tensor.data_offset).reshape(-1, 210)
    rows[:, 208:] = (rows[:, 208:].copy().view(np.float16) * np.float16(1.2)).view(np.uint8)
    (folder / "m.gguf").write_bytes(blocks)
    said = about(tuned)
    said["files"] = {"m.gguf": {"size": len(blocks), "sha256": hashlib.sha256(blocks).hexdigest()}}
    del said[DIGEST]
    (folder / "m.gguf.json").write_bytes(dump_json(sealed(said)))
    ran = cli("verify", folder / "m.gguf", "--source", model)
    assert (ran.code, "model.layers.1.self_attn.q_a_proj.weight" in ran.err) == (4, True), ran.err
