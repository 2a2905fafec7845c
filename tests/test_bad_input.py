"""Every ordinary kind of bad input: one line that says what, where and what to do; the exit code; nothing written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

SHARD = "model.safetensors"
SECOND = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def edit_json(folder: Path, name: str, **changes: object) -> None:
    raw = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))


def edit_header(folder: Path, change: Callable[[dict], object], file: str = SHARD) -> None:
    """Rewrite a shard's header, keeping its data."""
    data = (folder / file).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], config: dict = tiny.LITE) -> None:
    """Write the checkpoint anew with changed tensors."""
    tensors = tiny.random_weights(config)
    change(tensors)
    tiny.write_checkpoint(folder, config, tensors)


def set_weight(index: tuple[int, int], value: float, name: str = O_PROJ) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][index] = value

    return lambda folder: rewrite(folder, change)


def block_fp8(folder: Path, drop: str = "", resize: str = "", dtype: torch.dtype = torch.float32) -> None:
    """o_proj of layer 1 as block FP8, with its scales missing, of another shape, or of another dtype."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        rows, cols = tensors[O_PROJ].shape
        tensors[O_PROJ] = torch.zeros(rows, cols, dtype=torch.float8_e4m3fn)
        if not drop:
            shape = (3, 3) if resize else (1, 1)
            tensors[f"{O_PROJ}_scale_inv"] = torch.ones(shape, dtype=dtype)

    rewrite(folder, change)


def write_bytes(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def resize(name: str, by: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + by)

    return change


def pop_scale(folder: Path) -> None:
    block_fp8(folder, drop="scale")


def overlap(header: dict) -> None:
    gate, up = (header[f"model.layers.1.mlp.experts.0.{name}_proj.weight"] for name in ("gate", "up"))
    up["data_offsets"] = gate["data_offsets"]


def set_entry(**changes: object) -> Callable[[Path], None]:
    """Change o_proj's entry in the header."""
    return lambda folder: edit_header(folder, lambda header: header[O_PROJ].update(changes))


def wrong_length(header: dict) -> None:
    header[O_PROJ]["data_offsets"][1] -= 2


def rename(header: dict) -> None:
    header["model.layers.1.self_attn.wrong.weight"] = header.pop(O_PROJ)


def duplicate_name(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + length].rstrip()
    entry = b'"lm_head.weight":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}'
    text = text[:-1] + b"," + entry + b"}"
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def sharded(change: Callable[[Path, dict], object]) -> Callable[[Path], None]:
    """Three shards, then a change to folder or index."""

    def apply(folder: Path) -> None:
        (folder / SHARD).unlink()
        tiny.write_checkpoint(folder, tiny.LITE, shards=3)
        index = json.loads((folder / INDEX).read_text())
        change(folder, index)
        if (folder / INDEX).exists():
            (folder / INDEX).write_text(json.dumps(index))

    return apply


def recipe_file(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder.parent / "recipe.yaml").write_text(text)


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, "config.json", **changes)


def in_shard_two(header: dict) -> None:
    header["stray.weight"] = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}


NAN = "is NaN, infinite or beyond BF16's range at"
CONVERT = ("convert", "{model}", "--fp8=channel", "-o", "{out}", "-q")
RECIPE = ("convert", "{model}", "--recipe", "{recipe}", "-o", "{out}")
EVAL = ("eval-ppl", "{model}", "-q", "--ctx", "16", "--limit", "1")
CASES: list[tuple[str, Callable[[Path], object] | None, tuple[str, ...], int, str]] = [
    # name, what is done to a good checkpoint, command, exit code, message
    ("no such model", None, ("plan", "no-such-folder"), 3, "no-such-folder: no such folder"),
    ("a file as model", None, ("plan", "{model}/config.json"), 3, "not a folder"),
    ("no config", lambda f: (f / "config.json").unlink(), CONVERT, 3, "config.json: missing"),
    ("config not JSON", write_bytes("config.json", b"{"), CONVERT, 3, "config.json: not valid JSON"),
    ("config not UTF-8", write_bytes("config.json", b"\xff\xfe{}"), CONVERT, 3, "config.json: not valid JSON"),
    ("config a list", write_bytes("config.json", b"[]"), CONVERT, 3, "config.json: not a JSON object"),
    ("deeply nested config", write_bytes("config.json", b"[" * 100_000), CONVERT, 3, "config.json: not valid JSON"),
    (
        "another architecture",
        config(architectures=["MixtralForCausalLM"]),
        CONVERT,
        3,
        "architectures is",
    ),
    (
        "no architecture",
        config(architectures="absent", model_type="absent"),
        CONVERT,
        3,
        "supported: Deepseek",
    ),
    ("wrong type of a key", config(hidden_size="64"), CONVERT, 3, "hidden_size is '64'"),
    ("unknown RoPE", config(rope_scaling={"type": "longrope", "factor": 2}), CONVERT, 3, "rope type is 'longrope'"),
    (
        "quantized otherwise",
        config(quantization_config={"quant_method": "hqq"}),
        CONVERT,
        3,
        "is quantized with 'hqq'",
    ),
    ("shape against config", config(kv_lora_rank=24), CONVERT, 3, "config.json implies"),
    (
        "more layers than tensors",
        config(num_hidden_layers=4),
        CONVERT,
        3,
        "missing: model.layers.3.",
    ),
    (
        "fewer layers than tensors",
        config(num_hidden_layers=2),
        CONVERT,
        3,
        "35 tensors beyond the 2 layers of config.json: model.layers.2.",
    ),
    ("no weights", lambda f: (f / SHARD).unlink(), CONVERT, 3, "neither model.safetensors nor"),
    (
        "only pickle",
        lambda f: (f / SHARD).rename(f / "pytorch_model.bin"),
        CONVERT,
        3,
        "convert the checkpoint to safetensors first",
    ),
    ("empty shard", write_bytes(SHARD, b""), CONVERT, 3, "truncated or not a safetensors file"),
    ("not safetensors", write_bytes(SHARD, b"PK\x03\x04" * 100), CONVERT, 3, "not a safetensors file"),
    ("huge header", write_bytes(SHARD, struct.pack("<Q", 1 << 60) + b"{}"), CONVERT, 3, "not a safetensors file"),
    ("header not JSON", write_bytes(SHARD, struct.pack("<Q", 4) + b"abcd"), CONVERT, 3, "header can't be parsed"),
    ("header a list", write_bytes(SHARD, struct.pack("<Q", 2) + b"[]"), CONVERT, 3, "its header is not an object"),
    ("truncated shard", resize(SHARD, -100), CONVERT, 3, "model.safetensors: truncated: "),
    ("bytes too many", resize(SHARD, 100), CONVERT, 3, "model.safetensors: too long: "),
    ("overlapping tensors", lambda f: edit_header(f, overlap), CONVERT, 3, "overlaps the tensor before it"),
    ("size against shape", lambda f: edit_header(f, wrong_length), CONVERT, 3, "the header gives it"),
    (
        "negative offset",
        set_entry(data_offsets=[-2, 5]),
        CONVERT,
        3,
        "malformed",
    ),
    (
        "unknown dtype",
        set_entry(dtype="F4"),
        CONVERT,
        3,
        "malformed header entry",
    ),
    (
        "huge shape",
        set_entry(shape=[1 << 40, 1 << 40]),
        CONVERT,
        3,
        "malformed header entry",
    ),
    ("misnamed tensor", lambda f: edit_header(f, rename), CONVERT, 3, f"are missing: {O_PROJ}"),
    ("a name twice", duplicate_name, CONVERT, 3, "a name occurs twice"),
    (
        "wrong dtype",
        lambda f: rewrite(f, lambda t: t.update({O_PROJ: t[O_PROJ].to(torch.int16)})),
        CONVERT,
        3,
        f"{O_PROJ} has dtype I16",
    ),
    (
        "surplus tensor",
        lambda f: rewrite(f, lambda t: t.update({"model.mtp.weight": torch.ones(2)})),
        CONVERT,
        3,
        "does not imply: model.mtp.weight",
    ),
    (
        "shard missing",
        sharded(lambda f, i: (f / "model-00002-of-00003.safetensors").unlink()),
        CONVERT,
        3,
        "is missing",
    ),
    ("no weight map", sharded(lambda f, i: i.pop("weight_map")), CONVERT, 3, "weight_map is not an object"),
    (
        "shard outside",
        sharded(lambda f, i: i["weight_map"].update({O_PROJ: "../evil.safetensors"})),
        CONVERT,
        3,
        "names the shard '../evil.safetensors'",
    ),
    (
        "shard of another kind",
        sharded(lambda f, i: i["weight_map"].update({O_PROJ: "weights.bin"})),
        CONVERT,
        3,
        "names the shard 'weights.bin'",
    ),
    (
        "index against shards",
        sharded(lambda f, i: i["weight_map"].update({"lm_head.weight": "model-00001-of-00003.safetensors"})),
        CONVERT,
        3,
        "lists tensors that their shard does not hold: lm_head.weight",
    ),
    (
        "tensor the index lacks",
        sharded(lambda f, i: edit_header(f, in_shard_two, SECOND)),
        CONVERT,
        3,
        "does not list tensors that a shard holds: stray.weight",
    ),
    (
        "NaN weight",
        set_weight((3, 5), float("nan")),
        CONVERT,
        3,
        f"{O_PROJ} {NAN} [3, 5]",
    ),
    ("infinite weight", set_weight((0, 1), float("inf")), CONVERT, 3, "at [0, 1]"),
    (
        "NaN in an unquantized tensor",
        set_weight((7, 2), float("nan"), "model.embed_tokens.weight"),
        CONVERT,
        3,
        f"model.embed_tokens.weight {NAN} [7, 2]",
    ),
    ("FP8 without scales", pop_scale, CONVERT, 3, "is FP8 but has no o_proj.weight_scale_inv"),
    (
        "FP8 with misshaped scales",
        lambda f: block_fp8(f, resize="yes"),
        CONVERT,
        3,
        "does not fit a weight of shape [64, 64]",
    ),
    ("FP8 with integer scales", lambda f: block_fp8(f, dtype=torch.int32), CONVERT, 3, "I32 [1, 1], does not fit"),
    (
        "unknown recipe key",
        recipe_file("name: x\nrulez: []"),
        RECIPE,
        3,
        "unknown key 'rulez'",
    ),
    ("recipe is no file", None, RECIPE, 3, "recipe.yaml: no such file"),
    (
        "recipe quantizes nothing",
        recipe_file("name: x\nrules: [{roles: ['*'], scheme: bf16}]"),
        RECIPE,
        3,
        "nothing would be quantized",
    ),
    (
        "fp8 and recipe",
        None,
        (*CONVERT, "--recipe", "x.yaml"),
        2,
        "--fp8, --int4, --int3, --int2, --int8, --w4a8 and --recipe exclude each other",
    ),
    ("unknown grid", None, ("convert", "{model}", "--fp8=row", "-o", "{out}"), 2, "'row' is not one of"),
    ("unknown target", None, (*CONVERT, "--target", "tgi"), 2, "'tgi' is not one of"),
    ("no output", None, ("convert", "{model}", "--fp8"), 2, "give -o OUT"),
    ("tp that does not divide", None, (*CONVERT, "--tp", "3"), 2, "--tp 3 does not divide num_attention_heads, 4"),
    ("size that is none", None, (*CONVERT, "--max-shard-size", "big"), 2, "'big' is not a size"),
    ("device that is none", None, (*CONVERT, "--device", "warp"), 2, "'warp' is none of cpu, cuda and cuda:N"),
    (
        "output is the input",
        None,
        (*CONVERT[:3], "-o", "{model}"),
        3,
        "the checkpoint's own folder",
    ),
    (
        "output is a file",
        None,
        (*CONVERT[:3], "-o", "{model}/config.json"),
        3,
        "can't be written",
    ),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), EVAL, 3, "tokenizer.json: missing"),
    ("damaged tokenizer", write_bytes("tokenizer.json", b"{}"), EVAL, 3, "tokenizer.json: not a tokenizer"),
    (
        "tokenizer of another model",
        lambda f: shutil.copy(tiny.MINI / "tokenizer.json", f),
        EVAL,
        3,
        "knows ids beyond the model's vocabulary of 160",
    ),
    ("text that is none", None, (*EVAL, "--text", "{model}/no.txt"), 3, "no.txt: can't be read"),
    ("gate without reference", None, (*EVAL, "--max-kld", "0.1"), 2, "need --reference"),
    ("context out of range", None, ("eval-ppl", "{model}", "--ctx", "5000", "-q"), 2, "--ctx 5000 is out of range"),
    ("verify without manifest", None, ("verify", "{model}", "-q"), 3, "is no artifact of dsv2quant"),
]


@pytest.mark.parametrize(("change", "command", "code", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bad_input_is_one_line_and_an_exit_code(change, command, code, message, tmp_path, lite, cli):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(lite, model)
    if change is not None:
        change(model)
    before = snapshot(model)
    places = {"model": model, "out": out, "recipe": tmp_path / "recipe.yaml"}
    ran = cli(*(word.format(**places) for word in command))
    assert ran.code == code
    assert message in ran.err
    assert "Traceback" not in ran.err
    if code == 3:
        assert ran.err.count("\n") == 1, ran.err
        assert ran.err.startswith("error: ")
    assert ran.out == ""
    assert snapshot(model) == before
    assert not (out / "config.json").exists()
    assert not list(out.glob("*.safetensors"))


def test_there_are_many_kinds():
    assert len(CASES) >= 40


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_float32_beyond_bf16_is_named(tmp_path, cli):
    tensors = tiny.random_weights(tiny.LITE, dtype=torch.float32)
    tensors["model.norm.weight"][9] = float(np.finfo(np.float32).max)
    model = tiny.write_checkpoint(tmp_path / "model", tiny.LITE | {"torch_dtype": "float32"}, tensors)
    ran = cli("convert", model, "--fp8=channel", "-o", tmp_path / "out", "-q")
    assert ran.code == 3
    assert "model.norm.weight is NaN, infinite or beyond BF16's range at [9]" in ran.err
