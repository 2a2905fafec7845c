"""Importance matrices: llama-imatrix's own file, and what is made of it.

tests/golden/fox.imatrix.gguf is what llama.cpp 0c1e57098 makes of `conftest.fox` and the model of `fox_model`:

    convert_hf_to_gguf.py MODEL --outtype f32 --outfile f32.gguf
    llama-imatrix -m f32.gguf -f fox.txt -o fox.imatrix.gguf -c 64 -b 64 --chunks 4 -fa off -ctk f32 -ctv f32
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from gguf import GGUFReader, GGUFWriter

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.arch.spec import GgufTensor
from dsv2quant.calib.calibrate import statistics_bytes
from dsv2quant.calib.statistics import Statistics
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError
from dsv2quant.formats.gguf.imatrix import FileEntry, Imatrix, check_model, metadata, read, write
from dsv2quant.text.calibration import load, windows_in_order
from dsv2quant.text.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden" / "fox.imatrix.gguf"
# llama.cpp takes no checkpoint without latent queries but V2-Lite's depths, and scores groups otherwise.
RAW = tiny.V2 | {"n_group": 1, "topk_group": 1, "topk_method": "greedy", "vocab_size": 4096, "num_hidden_layers": 2}
CONFIG = model_config(RAW, "config.json")
TENSORS = {tensor.name: tensor for tensor in architecture(CONFIG).gguf_tensors()}
WINDOWS = ("--protocol", "llama.cpp", "--max-seq-length", 64, "--num-calibration-samples", 4, "-q", "--calibration")
TOKENS = 4 * 64
GATE, DOWN = "blk.1.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def fox_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RAW with weights from a generator whose numbers never change."""
    generator = np.random.RandomState(0)
    weights = {}
    for spec in architecture(CONFIG).specs():
        noise = generator.standard_normal(spec.shape)
        if spec.role == "norm":
            noise = 1 + 0.1 * noise
        elif spec.role != "embed":
            noise *= spec.shape[-1] ** -0.5
        weights[spec.name] = torch.from_numpy(noise).to(torch.bfloat16)
    return tiny.write_checkpoint(tmp_path_factory.mktemp("fox") / "fox", RAW, weights)


def golden_arrays() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, sums, counts) by gguf-py."""
    arrays = {tensor.name: np.array(tensor.data) for tensor in GGUFReader(GOLDEN).tensors}
    for name in sorted({name.removesuffix(".counts").removesuffix(".in_sum2") for name in arrays}):
        yield name, arrays[f"{name}.in_sum2"], arrays[f"{name}.counts"]


def written(path: Path, arrays: dict[str, np.ndarray], without: str = "", datasets: object = ("text",)) -> Path:
    """A file by gguf-py's writer, with the keys of an imatrix but one."""
    writer = GGUFWriter(path, "")
    if without != "imatrix.datasets":
        writer.add_array("imatrix.datasets", list(datasets))
    for key in {"imatrix.chunk_count", "imatrix.chunk_size"} - {without}:
        writer.add_uint32(key, 4)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def one(name: str, sums: np.ndarray, counts: list[float]) -> Imatrix:
    return Imatrix({name: FileEntry(sums.astype(np.float32), np.array(counts, np.float32))}, ("text",), 4, 64)


def test_llama_imatrix_s_file_is_read_and_written_to_the_byte(tmp_path):
    found = read(GOLDEN)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("fox.txt",), 4, 64)
    expected = list(golden_arrays())
    assert list(found.entries) == [name for name, *_ in expected]
    for name, sums, counts in expected:
        np.testing.assert_array_equal(found.entries[name].sums.ravel(), sums.ravel())
        np.testing.assert_array_equal(found.entries[name].counts, counts.ravel())
    backwards = dict(reversed(found.entries.items()))
    write(tmp_path / "same", Imatrix(backwards, found.datasets, found.chunk_count, found.chunk_size))
    assert (tmp_path / "same").read_bytes() == GOLDEN.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["same"]


def test_calibrate_measures_what_llama_imatrix_does(fox_model, fox, tmp_path, cli):
    """llama-imatrix adds up at most 256 squares in float32, a relative error of 256 · 2⁻²⁴; twice that leaves the same
    for the rounding of the squares and of the pass before them."""
    stats, out = tmp_path / "stats", tmp_path / "new" / "fox.imatrix.gguf"
    ran = cli("calibrate", fox_model, "-o", stats, "--imatrix", out, *WINDOWS, fox)
    assert ran.code == 0, ran.err
    found, expected = read(out), read(GOLDEN)
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("fox.txt",), 4, 64)
    assert list(found.entries) == list(expected.entries)
    for name, entry in expected.entries.items():
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)
        assert entry.counts.sum() == TOKENS * (CONFIG.num_experts_per_tok if "exps" in name else 1)
        np.testing.assert_allclose(found.entries[name].sums, entry.sums, rtol=2 * TOKENS * 2.0**-24)
    # The header and the lengths of tensors aside, files are of one size.
    assert len(out.read_bytes()) == len(GOLDEN.read_bytes())
    sizes = [spec.get_shape()[0] * 4 for spec in map(Statistics(stats)._file.get_slice, Statistics(stats)._names)]
    assert sum(sizes) <= statistics_bytes(CONFIG)


def test_importance_is_llama_quantize_s():
    """tools/quantize/quantize.cpp, load_imatrix, value by value."""
    found = read(GOLDEN)
    for name, sums, counts in golden_arrays():
        tensor = TENSORS[name]
        values, tokens = sums.ravel(), counts.ravel()
        each = len(values) // len(tokens)
        expected = np.empty_like(values)
        for i in range(len(values)):
            expected[i] = values[i] / np.float32(round(float(tokens[i // each])))
        np.testing.assert_array_equal(
            found.importance(tensor, shrink=False), expected.reshape(-1, tensor.shape[-1]), strict=True
        )
        assert len(expected) == math.prod(tensor.shape[:-2]) * tensor.shape[-1]


@pytest.mark.parametrize(
    ("count", "divisor"), [(3, 3), (2.5, 3), (3.5, 4), (0.5, 1), (0.49, None), (0, None), (-2, None), (2**25, 2**25)]
)
def test_a_count_is_rounded_as_c_does_and_ones_stand_for_no_token(count, divisor):
    sums = np.random.default_rng(0).random((16, 64)).astype(np.float32)
    tensor, counts = TENSORS[GATE], [7.0] * 15 + [count]
    found = one(GATE, sums, counts).importance(tensor, shrink=False)
    np.testing.assert_array_equal(found[:15], sums[:15] / np.float32(7))
    np.testing.assert_array_equal(
        found[15], np.ones(64, np.float32) if divisor is None else sums[15] / np.float32(divisor)
    )
    assert found.dtype == np.float32


def test_one_count_serves_all_matrices():
    """Heads always, and experts in files of older programs."""
    for name in (GATE, "blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"):
        tensor = TENSORS[name]
        sums = np.random.default_rng(0).random((1, tensor.matrices * tensor.shape[-1])).astype(np.float32)
        for shrink in (False, True):
            found = one(name, sums, [5]).importance(tensor, shrink=shrink)
            np.testing.assert_array_equal(found, (sums / np.float32(5)).reshape(tensor.matrices, -1))


@pytest.mark.parametrize("name", [GATE, DOWN])
def test_experts_are_drawn_toward_their_layer(name):
    generator, tensor = np.random.default_rng(0), TENSORS[name]
    counts = np.array([0, 1, 3, 10_000_000, *generator.integers(1, 500, 12)])
    level = np.logspace(-3, 3, 16)[:, None]  # experts' inputs differ in size
    sums = (counts[:, None] * level * generator.random((16, tensor.shape[-1]))).astype(np.float32)
    found = one(name, sums, list(counts)).importance(tensor, shrink=True)
    wide = sums.astype(np.float64)
    layer = (
        wide.sum(0) / counts.sum()
        if name == GATE
        else np.full(tensor.shape[-1], wide.sum() / sums[0].size / counts.sum())
    )
    np.testing.assert_allclose(found[0], layer, rtol=1e-6)
    for expert in range(1, 16):
        # 64 more tokens, as the layer's mean has them, as large as the expert's own.
        mean = wide[expert] / counts[expert]
        more = layer * mean.mean() / layer.mean()
        want = (wide[expert] + 64 * more) / (counts[expert] + 64)
        np.testing.assert_allclose(found[expert], want, rtol=1e-6)
    assert np.abs(found[3] - wide[3] / counts[3]).max() < 2 * 64 / counts[3] * wide[3].max() / counts[3]
    assert found.dtype == np.float32


def test_without_any_token_every_channel_counts_the_same():
    for name in (GATE, DOWN):
        empty = one(name, np.zeros((16, TENSORS[name].shape[-1])), [0] * 16)
        for shrink in (False, True):
            assert (empty.importance(TENSORS[name], shrink=shrink) == 1).all()


def test_dense_tensors_are_not_shrunk():
    found = read(GOLDEN)
    for name, entry in found.entries.items():
        plain, shrunk = (found.importance(TENSORS[name], shrink=shrink) for shrink in (False, True))
        assert np.array_equal(plain, shrunk) == (len(entry.counts) == 1)


def test_a_missing_entry_is_none_and_a_wrong_size_is_an_error():
    found = read(GOLDEN)
    assert found.importance(TENSORS["output.weight"], shrink=False) is None
    other = GgufTensor(GATE, (16, 48, 65), TENSORS[GATE].specs, 1)
    with pytest.raises(
        InputError, match=r"fox.imatrix.gguf: of another model: blk.1.ffn_gate_exps.weight has 1,024 .*1,040"
    ):
        found.importance(other, shrink=False)
    embedding = one("token_embd.weight", np.ones((1, 7)), [1])
    assert embedding.importance(TENSORS["token_embd.weight"], shrink=False) is None


def test_another_model_s_imatrix_is_told():
    found = read(GOLDEN)
    check_model(list(TENSORS.values()), found)
    some = dict(list(found.entries.items())[:3])
    check_model(list(TENSORS.values()), Imatrix(some, (), 0, 0))  # llama-quantize takes what there is
    wider = architecture(model_config(RAW | {"hidden_size": 128}, "config.json")).gguf_tensors()
    with pytest.raises(
        InputError, match=r"fox.imatrix.gguf: of another model: blk.0.attn_kv_a_mqa.weight has 64 values"
    ):
        check_model(wider, found)
    fewer = architecture(model_config(RAW | {"n_routed_experts": 8}, "config.json")).gguf_tensors()
    with pytest.raises(InputError, match=r"of another model: blk.1.ffn_down_exps.weight has 768 values there, 384 in"):
        check_model(fewer, found)
    renamed = {f"model.{name}": entry for name, entry in found.entries.items()} | some
    with pytest.raises(
        InputError, match=r"imatrix: of another model: 22 of its 25 tensors are not in this one: model.blk.0"
    ):
        check_model(list(TENSORS.values()), Imatrix(renamed, (), 0, 0))


def test_metadata_is_llama_quantize_s():
    found = metadata("some/fox.imatrix.gguf", read(GOLDEN))
    assert [(key, value.type.name, value.value, value.is_array) for key, value in found.items()] == [
        ("quantize.imatrix.file", "STRING", "some/fox.imatrix.gguf", False),
        ("quantize.imatrix.dataset", "STRING", "fox.txt", False),
        ("quantize.imatrix.entries_count", "UINT32", 22, False),
        ("quantize.imatrix.chunks_count", "UINT32", 4, False),
    ]
    bare = metadata("x" * 126 + "é", Imatrix({}, (), 0, 0))
    assert [(key, value.value) for key, value in bare.items()] == [
        ("quantize.imatrix.file", "x" * 126),
        ("quantize.imatrix.entries_count", 0),
    ]
    long = metadata("f", Imatrix({}, ("y" * 200, "z"), 1, 1))
    assert long["quantize.imatrix.dataset"].value == "y" * 127


PAIR = {"a.weight.in_sum2": np.ones((2, 3), np.float32), "a.weight.counts": np.ones((2, 1), np.float32)}
LEGACY = b"\x02\0\0\0\x15\0\0\0blk.0.attn_q_a.weight\x04\0\0\0"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: None, r"imatrix.gguf: no such file"),
        (lambda p: p.mkdir(), r"imatrix.gguf: is a folder"),
        (lambda p: p.write_bytes(b""), "truncated or not a GGUF file"),
        (lambda p: p.write_bytes(GOLDEN.read_bytes()[:-100]), "truncated: "),
        (lambda p: p.write_bytes(GOLDEN.read_bytes()[:500]), "truncated, or a count"),
        (lambda p: p.write_bytes(LEGACY), r"a legacy imatrix.*llama-imatrix -m MODEL.gguf --in-file imatrix.gguf"),
        (lambda p: written(p, {"blk.0.attn_q.weight": np.ones(3, np.float32)}), r"not an imatrix: it holds no"),
        (lambda p: written(p, PAIR | {"b.in_sum2": np.ones(3, np.float32)}), "b has sums or counts alone"),
        (lambda p: written(p, PAIR | {"b.counts": np.ones(3, np.float32)}), "b has sums or counts alone"),
        (lambda p: written(p, PAIR | {"a.weight.counts": np.ones(2, np.float16)}), "a.weight.counts is F16, not F32"),
        (lambda p: written(p, PAIR | {"a.weight.counts": np.ones(4, np.float32)}), "a.weight has 6 sums of 4 matrices"),
        (lambda p: written(p, PAIR | {"a.weight.in_sum2": np.float32([[1, 2, np.nan]] * 2)}), "a.weight is not finite"),
        (lambda p: written(p, PAIR | {"a.weight.counts": np.float32([1, np.inf])}), "a.weight is not finite"),
        (lambda p: written(p, PAIR, datasets=(1,)), "its imatrix.datasets is missing or not a list of strings"),
        *(
            (lambda p, key=key: written(p, PAIR, without=key), f"its {key} is missing")
            for key in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
        ),
    ],
)
def test_what_is_no_imatrix_is_one_line(damage: Callable[[Path], object], message, tmp_path):
    path = tmp_path / "imatrix.gguf"
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_an_imatrix_is_not_written_over_something_else(fox_model, fox, tmp_path, cli, monkeypatch):
    stats, out = tmp_path / "stats", tmp_path / "out.gguf"
    command = ("calibrate", fox_model, "-o", stats, *WINDOWS, fox)
    out.write_bytes(b"mine")
    ran = cli(*command, "--imatrix", out)
    assert (ran.code, ran.err) == (3, f"error: {out}: exists (give another file, or --force to replace it)\n")
    assert not stats.exists()
    assert cli(*command).code == 0
    for force in ((), ("--force",)):
        ran = cli(*command, "--imatrix", out, *force)
        assert (ran.code, out.read_bytes()) == (3, b"mine")
        assert (
            ran.err == f"error: {out}: is there and no importance matrix (give another file, or remove it yourself)\n"
        )
    out.write_bytes(GOLDEN.read_bytes())
    ran = cli(*command, "--imatrix", out)
    assert ran.code == 3
    assert f"{stats}: was measured without what an importance matrix needs (" in ran.err
    assert (
        cli(*command, "--imatrix", stats).err
        == f"error: {stats}: is the statistics file (give the imatrix a name of its own)\n"
    )
    plain = Statistics(stats)
    assert cli(*command, "--imatrix", out, "--force").code == 0
    assert read(out).entries.keys() == read(GOLDEN).entries.keys()
    specs = [weight.spec for weight in open_checkpoint(fox_model).weights if weight.spec.role == "o_proj"]
    for spec in specs:  # two ways to attend, one result
        np.testing.assert_allclose(Statistics(stats).squares(spec), plain.squares(spec), rtol=1e-5)
    before = out.read_bytes()
    monkeypatch.setattr("dsv2quant.calib.collect.collect", None)  # all is there
    assert cli(*command, "--imatrix", out).code == 0
    out.unlink()
    assert cli(*command, "--imatrix", out).code == 0
    assert out.read_bytes() == before
    out.write_bytes(GOLDEN.read_bytes())
    ran = cli(*command, "--imatrix", out)
    assert (ran.code, ran.err) == (3, f"error: {out}: holds something else (give another file, or delete it)\n")


def test_llama_cpp_s_windows_are_the_text_in_order(tmp_path):
    path, tokenizer = tmp_path / "text.txt", Tokenizer.open(tiny.MINI)
    text = "".join(f"Line {i} of a text that is longer than a section.\n" for i in range(400))
    path.write_text(text)
    ids = [tokenizer.bos_id, *tokenizer.encode(text[:-1])]  # llama.cpp leaves the last line's end out
    found = windows_in_order(load(str(path), tiny.MINI), tokenizer, 10_000, 50)
    assert len(found) == len(ids) // 50
    assert (found[:, 0] == tokenizer.bos_id).all()
    np.testing.assert_array_equal(found[:, 1:], np.reshape(ids[: found.size], found.shape)[:, 1:])
    assert windows_in_order(load(str(path), tiny.MINI), tokenizer, 1, len(ids)).tolist() == [ids]
    with pytest.raises(InputError, match=r"text.txt: .* don't fill one window"):
        windows_in_order(load(str(path), tiny.MINI), tokenizer, 1, len(ids) + 1)
    np.testing.assert_array_equal(windows_in_order(load(str(path), tiny.MINI), tokenizer, 3, 50), found[:3])


@pytest.mark.parametrize("text", [(), ("--calibration", "chats.jsonl")])
def test_llama_cpp_s_windows_need_a_plain_text(text, fox_model, tmp_path, cli):
    ran = cli("calibrate", fox_model, "-o", tmp_path / "stats", "--protocol", "llama.cpp", *text)
    assert ran.code == 2
    assert "--protocol llama.cpp needs --calibration FILE, a plain text file" in ran.err
