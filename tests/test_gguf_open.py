"""GGUF files as checkpoints: weights and logits against the gguf library's own decoding, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf_files
import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from gguf_files import CONFIG, keep_plain, mixed, stacked, write_gguf

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError
from dsv2quant.formats.gguf import blocks
from dsv2quant.model.runtime import Model
from dsv2quant.storage import gguf as container
from dsv2quant.text.tokenizer import Tokenizer, cut

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {
    "as Q4_K_M": keep_plain(mixed),
    "Q8_0": keep_plain(lambda name: "Q8_0"),
    "MXFP4": keep_plain(lambda name: "MXFP4"),
    "kv_b of two kinds": keep_plain(lambda name: "Q4_0" if "attn_k_b" in name else "BF16"),
    "BF16": keep_plain(lambda name: "BF16"),
    "F16": keep_plain(lambda name: "F16"),
    "F32": lambda name: "F32",
}
MIXED = KINDS["as Q4_K_M"]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return tiny.random_weights(CONFIG)


@pytest.fixture(scope="module")
def arrays(weights) -> dict[str, np.ndarray]:
    return stacked(CONFIG, weights)


@pytest.fixture(scope="module")
def model(arrays, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, CONFIG, arrays, MIXED)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_decoded_weights(kind, weights, arrays, tmp_path):
    types = KINDS[kind]
    data = write_gguf(tmp_path / "model.gguf", CONFIG, arrays, types)
    opened = open_checkpoint(tmp_path / "model.gguf", headers_only=True)
    plain = gguf_files.decoded(CONFIG, data, types, weights)
    folder = tiny.write_checkpoint(tmp_path / "plain", opened.raw_config, plain)
    for weight in opened.weights:
        assert torch.equal(opened.decode(weight, torch.float32), plain[weight.spec.name]), weight.spec.name
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 4096, (2, 24)))
    assert torch.equal(Model(opened).forward(tokens), Model(open_checkpoint(folder)).forward(tokens))


def test_schemes_and_parts(model):
    weights = {w.spec.name.removeprefix("model.layers.1."): w for w in open_checkpoint(model).weights}
    assert weights["self_attn.kv_b_proj.weight"].scheme == "q5_0+q8_0"
    assert list(weights["self_attn.kv_b_proj.weight"].parts) == ["attn_k_b", "attn_v_b"]
    assert weights["mlp.gate.weight"].scheme == "bf16"
    experts = [weights[f"mlp.experts.{expert}.down_proj.weight"] for expert in range(4)]
    assert {w.scheme for w in experts} == {"q6_k"}
    begins = [w.parts["ffn_down_exps"].begin for w in experts]
    assert [w.nbytes for w in experts] == [256 * 210] * 4  # alone, not the whole stack
    assert np.diff(begins).tolist() == [256 * 210] * 3


def test_a_file_without_output_has_tied_embeddings(arrays, tmp_path):
    write_gguf(tmp_path / "m.gguf", CONFIG, {n: a for n, a in arrays.items() if n != "output.weight"}, MIXED)
    opened = open_checkpoint(tmp_path / "m.gguf")
    assert opened.config.tie_word_embeddings
    assert "lm_head.weight" not in {w.spec.name for w in opened.weights}


# Split files


@pytest.fixture
def split(arrays, tmp_path) -> list[Path]:
    write_gguf(tmp_path / "model.gguf", CONFIG, arrays, MIXED, tensors_per_file=15)
    return sorted(tmp_path.glob("*.gguf"))


def test_any_of_the_split_files_opens_them_all(split, model):
    assert [path.name for path in split] == [f"model-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    whole = open_checkpoint(model)
    for path in split:
        opened = open_checkpoint(path)
        assert opened.files == [p.name for p in split]
        assert opened.model == split[0].name
        for ours, wanted in zip(opened.weights, whole.weights, strict=True):
            assert ours.scheme == wanted.scheme
            assert torch.equal(opened.decode(ours, torch.float32), whole.decode(wanted, torch.float32))


def test_split_files_that_do_not_belong_together(split, arrays, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    more = arrays | {"blk.0.more_norm.weight": np.ones(8, np.float32)}
    write_gguf(other / "model.gguf", CONFIG, more, MIXED, tensors_per_file=15)
    original = split[2].read_bytes()
    split[2].write_bytes(split[1].read_bytes())
    with pytest.raises(InputError, match=r"00003-of-00003.gguf: split.no is 1, not 2"):
        open_checkpoint(split[0])
    split[2].write_bytes((other / split[2].name).read_bytes())
    with pytest.raises(InputError, match=r"split.tensors.count is \d+, not \d+"):
        open_checkpoint(split[0])
    split[2].unlink()
    with pytest.raises(InputError, match=r"1 of 3 files are missing: model-00003-of-00003\.gguf"):
        open_checkpoint(split[1])
    split[2].write_bytes(original)
    with pytest.raises(InputError, match="is one of 3 files, but not named so"):
        open_checkpoint(split[0].rename(tmp_path / "renamed.gguf"))


def test_a_tensor_in_two_split_files(split):
    data = split[1].read_bytes()
    first = next(w.stored.name for w in open_checkpoint(split[0]).weights if w.stored.file == split[1].name)
    double = next(
        w.stored.name for w in open_checkpoint(split[0]).weights
        if w.stored.file == split[0].name and len(w.stored.name) == len(first)
    )  # fmt: skip
    split[1].write_bytes(data.replace(first.encode(), double.encode(), 1))
    with pytest.raises(InputError, match=rf"00002-of-00003.gguf: {double} lies in model-00001-of-00003.gguf too"):
        open_checkpoint(split[0])


# What is refused


def without(name: str) -> Callable[[dict], object]:
    return lambda arrays: arrays.pop(name)


def transpose(name: str) -> Callable[[dict], object]:
    return lambda arrays: arrays.update({name: np.ascontiguousarray(arrays[name].T)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("blk.1.ffn_up_exps.weight"), "1 tensors that its metadata implies are missing: blk.1.ffn_up_exps"),
        (lambda a: a.update({"rope_freqs.weight": np.ones(8, "f4")}), "does not imply: rope_freqs.weight"),
        (
            transpose("blk.0.attn_q_b.weight"),
            r"attn_q_b.weight has shape \[64, 192\], its metadata implies \[192, 64\]",
        ),
    ],
)
def test_tensors_are_those_that_the_metadata_implies(change, message, arrays, tmp_path):
    changed = dict(arrays)
    change(changed)
    write_gguf(tmp_path / "m.gguf", CONFIG, changed, lambda name: "F32")
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "m.gguf")


def test_other_kinds_of_files(tmp_path, arrays, model):
    writer = GGUFWriter(tmp_path / "qwen2.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"qwen2\.gguf: its architecture is 'qwen2'"):
        open_checkpoint(tmp_path / "qwen2.gguf")
    with pytest.raises(InputError, match=r"no.gguf: no such file"):
        open_checkpoint(tmp_path / "no.gguf")
    (tmp_path / "text.gguf").write_text("This is a text, not a GGUF file.")
    with pytest.raises(InputError, match="truncated or not a GGUF file"):
        open_checkpoint(tmp_path / "text.gguf")
    data = model.read_bytes()
    at = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8  # behind its rank and only dimension
    (tmp_path / "i32.gguf").write_bytes(data[:at] + (26).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(InputError, match=r"output_norm\.weight has the type I32"):
        open_checkpoint(tmp_path / "i32.gguf")


@pytest.mark.parametrize("verb", ["plan", "convert", "calibrate"])
def test_a_gguf_file_is_no_source(verb, model, tmp_path, cli):
    out = {"convert": ("-o", tmp_path / "out"), "calibrate": ("-o", tmp_path / "s.safetensors")}.get(verb, ())
    ran = cli(verb, model, *out)
    assert ran.code == 3
    why, fix = "is a GGUF file, which is not converted", "give the Hugging Face checkpoint it was made from"
    assert ran.err == f"error: model.gguf: {why} ({fix})\n"
    assert list(tmp_path.iterdir()) == []


# The verbs


def test_inspect(model, split, cli):
    ran = cli("inspect", model)
    assert ran.code == 0, ran.err
    for words in ("in 1 file, ", "routed.down_proj    q6_k", "kv_b_proj           q5_0+q8_0", "file type: Q4_K_M"):
        assert words in ran.out
    assert "router              f32" in ran.out
    result = json.loads(cli("inspect", split[1], "--json").out)
    assert result["files"] == {path.name: {"size": path.stat().st_size} for path in split}
    assert result["gguf"]["file_type"] == "Q4_K_M"
    assert result["gguf"]["tensor_types"] == {
        "Q4_K": 13, "F32": 10, "Q6_K": 2, "Q4_0": 2, "Q5_0": 2, "Q5_1": 2, "Q8_0": 2,
    }  # fmt: skip
    assert result["bytes"] == sum(w.nbytes for w in open_checkpoint(model).weights)
    assert f"files: {', '.join(result['files'])}" in cli("inspect", split[0]).out


def test_types_that_the_gguf_library_does_not_know(model, tmp_path, cli):
    """A model whose experts are Q1_0 and whose embedding is Q2_0, of random codes."""
    found, generator = container.read(model), np.random.default_rng(0)
    headers, data = [], b""
    for tensor in found.tensors:
        kind = "Q1_0" if "exps" in tensor.name else "Q2_0" if tensor.name == "token_embd.weight" else tensor.type
        size = blocks.nbytes(kind, tensor.shape)
        if kind == tensor.type:
            begin = found.data_start + tensor.begin
            raw = model.read_bytes()[begin : begin + size]
        else:
            codes = generator.integers(0, 256, (size // 18, 18), np.uint8)
            codes[:, :2] = np.frombuffer(np.float16(0.02).tobytes(), np.uint8)
            raw = codes.tobytes()
        headers.append(container.TensorHeader(tensor.name, kind, tensor.shape, len(data), size))
        data += raw.ljust(container.padded(size), b"\0")
    metadata = {**found.metadata, "general.file_type": found.metadata["general.file_type"]._replace(value=41)}
    path = tmp_path / "m.gguf"
    path.write_bytes(container.pack_header(metadata, headers) + data)
    ran = cli("inspect", path)
    assert ran.code == 0, ran.err
    assert "file type: Q2_0" in ran.out
    assert {"routed.down_proj", "q1_0"} <= set(ran.out.split())
    assert json.loads(cli("inspect", path, "--json").out)["gguf"]["tensor_types"]["Q1_0"] == 3
    assert cli("verify", path, "-q").code == 0
    ran = cli("eval-ppl", path, "--ctx", 32, "--limit", 1, "--json", "-q")
    assert ran.code == 0, ran.err
    opened = open_checkpoint(path)
    weight = next(w for w in opened.weights if w.spec.name == "model.layers.1.mlp.experts.2.down_proj.weight")
    stored = data[weight.stored.begin :][: weight.nbytes]
    expected = blocks.decode("Q1_0", np.frombuffer(stored, np.uint8).reshape(256, -1))
    assert np.array_equal(opened.decode(weight, torch.float32).numpy(), expected)
    assert set(np.unique(expected)) == {-np.float32(np.float16(0.02)), np.float32(np.float16(0.02))}


def test_verify_measures_float32_errors_against_the_source(model, weights, tmp_path, cli):
    source = tiny.write_checkpoint(tmp_path / "source", CONFIG, weights)
    ran = cli("verify", model, "--source", source, "--json", "-q")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert (result["checked"], result["digest"], result["decoded_dtype"]) == ("blocks", None, "float32")
    assert result["files"] == {"model.gguf": {"size": model.stat().st_size, "sha256": None}}
    kv_b = next(r for r in result["roles"] if r["role"] == "kv_b_proj")
    signal = noise = 0.0
    for name in ("attn_k_b", "attn_v_b"):
        for layer in range(2):
            exact = stacked(CONFIG, weights)[f"blk.{layer}.{name}.weight"].astype(np.float64)
            kind = GGMLQuantizationType[mixed(f"blk.{layer}.{name}.weight")]
            got = quants.dequantize(quants.quantize(exact.astype(np.float32), kind), kind)
            signal, noise = signal + (exact**2).sum(), noise + ((got - exact) ** 2).sum()
    assert kv_b["sqnr_db"] == pytest.approx(10 * np.log10(signal / noise), rel=1e-5)
    assert (kv_b["scheme"], kv_b["tensors"]) == ("q5_0+q8_0", 2)
    assert next(r["scheme"] for r in result["roles"] if r["role"] == "router") == "f32"
    text = cli("verify", model, "-q").out
    assert text.startswith(
        f"model.gguf: {result['tensors']} weights in 1 file are as its metadata says, all scales finite"
    )
    assert "no manifest lies beside it" in text


def test_verify_names_a_scale_that_is_not_finite(model, tmp_path, cli):
    checkpoint = open_checkpoint(model)
    weight = next(w for w in checkpoint.weights if w.spec.name == "model.layers.1.mlp.experts.2.down_proj.weight")
    path, start = checkpoint.data["model.gguf"]
    data = bytearray(path.read_bytes())
    at = start + weight.stored.begin + 5 * 210 + 208  # d of block 5
    data[at : at + 2] = b"\x00\x7c"
    (tmp_path / "bad.gguf").write_bytes(data)
    ran = cli("verify", tmp_path / "bad.gguf", "-q")
    assert ran.code == 3
    assert "bad.gguf: blk.1.ffn_down_exps.weight: block 5 of model.layers.1.mlp.experts.2.down_proj.weight" in ran.err


def test_eval_ppl_of_bf16_is_that_of_the_checkpoint(weights, arrays, tmp_path, cli):
    source = tiny.write_checkpoint(tmp_path / "source", CONFIG, weights)
    write_gguf(tmp_path / "m.gguf", CONFIG, arrays, KINDS["BF16"])
    options = ("--ctx", "32", "--limit", "4", "--json", "-q", "--protocol", "llama.cpp")
    ran = cli("eval-ppl", tmp_path / "m.gguf", "--reference", source, *options)
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert result["kld"]["mean"] < 1e-7  # the metadata holds the configuration in float32
    assert result["weight_only"]
    assert json.loads(cli("eval-ppl", source, *options).out)["tokens"] == result["tokens"] == 4 * 15
    reverse = cli("eval-ppl", source, "--reference", tmp_path / "m.gguf", *options, "--max-kld", "1e-7")
    assert reverse.code == 0, reverse.err


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_tokenizer_is_the_files(add_bos, arrays, tmp_path):
    def change(writer: GGUFWriter) -> None:
        writer.kv_data[0]["tokenizer.ggml.add_bos_token"].value = add_bos
        writer.kv_data[0]["tokenizer.ggml.bos_token_id"].value = 1

    write_gguf(tmp_path / "m.gguf", CONFIG, arrays, MIXED, change=change)
    tokenizer = open_checkpoint(tmp_path / "m.gguf").tokenizer()
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, add_bos)
    text = "def f(x):\n    return x\n"
    assert tokenizer.encode(text).tolist() == Tokenizer.open(tiny.MINI).encode(text).tolist()


def test_without_bos_windows_keep_their_first_token():
    """llama-perplexity replaces it only where add_bos_token says so (tools/perplexity/perplexity.cpp)."""
    windows = cut(np.arange(100, 124), 8, 1, "llama.cpp", "text", add_bos=False)
    assert windows.ids.tolist() == [[*range(100 + 8 * i, 108 + 8 * i)] for i in range(3)]
    assert windows.ids.dtype == np.int64


def test_a_file_without_a_tokenizer(arrays, tmp_path, cli):
    write_gguf(tmp_path / "m.gguf", CONFIG, arrays, MIXED, tokenizer=False)
    ran = cli("eval-ppl", tmp_path / "m.gguf", "--ctx", "32", "-q")
    assert ran.code == 3
    assert ran.err.count("\n") == 1


def test_verify_takes_the_manifest_that_lies_beside_a_gguf_file(model, tmp_path, cli):
    import hashlib

    from dsv2quant.storage.durable import dump_json
    from dsv2quant.storage.manifest import sealed

    copy, manifest = tmp_path / "copy.gguf", tmp_path / "copy.gguf.json"
    data = bytearray(model.read_bytes())
    copy.write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content = {"schema": "dsv2quant.gguf-manifest/1", "plan": "p", "source": {}, "command": "c"}
    manifest.write_bytes(dump_json(sealed(content | {"files": {"copy.gguf": entry}})))
    ran = cli("verify", copy, "--json", "-q")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert (result["checked"], result["digest"], result["files"]) == ("manifest", "p", {"copy.gguf": entry})
    data[-1] ^= 1
    copy.write_bytes(data)
    assert "copy.gguf: its sha256 differs from the manifest" in cli("verify", copy, "-q").err
    manifest.write_bytes(dump_json(sealed(content | {"files": {"other.gguf": entry}})))
    assert "does not list copy.gguf" in cli("verify", copy, "-q").err


def test_the_manifest_of_a_split_gguf_has_the_name_of_the_whole(tmp_path):
    from dsv2quant.storage.manifest import gguf_manifest

    assert gguf_manifest(tmp_path / "m-00001-of-00003.gguf") == tmp_path / "m.gguf.json"
