"""GGUF files beside those that llama.cpp's own tools make of the same models, and in its hands.

`make test-clients` builds the tools and runs this; `make test` does not come here.
"""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path
from pydoc_data.topics import topics

import gguf_tiny
import llama_cpp_tools as llama
import numpy as np
import pytest
from gguf import GGUFReader
from gguf_expected import (
    FAMILY_TYPES,
    FILE_TYPES,
    LOW_TYPES,
    OPTIONS,
    SPLIT_MODELS,
    SPLIT_SIZE,
    keys_and_values,
    types_and_digests,
)

from dsv2quant.formats.gguf import blocks
from dsv2quant.formats.gguf.file_types import NOT_WRITTEN
from dsv2quant.storage import gguf as container
from dsv2quant.text.text import python_topics

CHUNKS, LENGTH = 8, 128  # of the text that importance matrices are measured on


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{model: checkpoint}."""
    return gguf_tiny.write(tmp_path_factory.mktemp("models"))


class Sources(dict[str, Path]):
    """{model: its GGUF file in BF16, in a folder with text.txt and llama-imatrix's imatrix.gguf of it}, each made when
    it is asked for."""

    def __init__(self, models: dict[str, Path], factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self._models, self._factory = models, factory

    def __missing__(self, model: str) -> Path:
        folder = self._factory.mktemp(model)
        text = folder / "text.txt"
        text.write_text("\n\n".join(topics[key] for key in sorted(topics))[:40_000])
        self[model] = llama.convert(self._models[model], folder / "bf16.gguf")
        llama.imatrix(self[model], text, folder / "imatrix.gguf", CHUNKS, LENGTH)
        return self[model]


@pytest.fixture(scope="session")
def sources(models, tmp_path_factory) -> Sources:
    return Sources(models, tmp_path_factory)


@pytest.fixture
def convert(cli, models, sources, tmp_path, monkeypatch):
    """Convert with the command, in the folder of the model's imatrix.gguf."""

    def run(model: str, file_type: str, *options: object) -> Path:
        monkeypatch.chdir(sources[model].parent)
        out = tmp_path / f"{model}.gguf"
        ran = cli("convert", models[model], "--gguf", file_type, *options, "-q", "-o", out)
        assert ran.code == 0, ran.err
        return out

    return run


def assert_same(ours: Path, theirs: Path) -> None:
    """Every byte; what differs is told by tensors and keys first."""
    mine, other = container.read(ours), container.read(theirs)
    assert keys_and_values(mine) == keys_and_values(other)
    wrong = [pair for pair in zip(types_and_digests(mine), types_and_digests(other), strict=True) if pair[0] != pair[1]]
    assert not wrong, f"{len(wrong)} tensors, the first: {wrong[0]}"
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize(
    ("model", "file_type"),
    [(m, t) for m in gguf_tiny.MODELS for t in (FAMILY_TYPES if m in gguf_tiny.FAMILY else FILE_TYPES)],
)
def test_a_file_is_llama_quantizes(model: str, file_type: str, weighted: bool, convert, sources) -> None:
    options = ["--imatrix", "imatrix.gguf"] * weighted
    theirs = llama.quantize(sources[model], sources[model].parent / "theirs.gguf", file_type, *options)
    assert_same(convert(model, file_type, *options), theirs)


@pytest.mark.parametrize("file_type", ["Q2_K_S", *LOW_TYPES])
@pytest.mark.parametrize("model", gguf_tiny.MODELS)
def test_a_file_of_few_bits_is_llama_quantizes(model: str, file_type: str, convert, sources) -> None:
    """Most of them need an importance matrix."""
    options = ["--imatrix", "imatrix.gguf"]
    theirs = llama.quantize(sources[model], sources[model].parent / "theirs.gguf", file_type, *options)
    assert_same(convert(model, file_type, *options), theirs)


TIED = {"output": ("--output-type", "Q5_K"), "patterns": OPTIONS["patterns"]}  # tiny-odd's options that take effect


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("tiny-llama", "counted"),
        *((m, o) for m in ("dsv2-mini", *gguf_tiny.DEEPSEEK_V2) for o in (TIED if m == "tiny-odd" else OPTIONS)),
    ],
)
def test_overrides_are_those_of_llama_quantize(model: str, options: str, convert, sources) -> None:
    words = (TIED if model == "tiny-odd" else OPTIONS)[options]
    theirs = llama.quantize(sources[model], sources[model].parent / "theirs.gguf", "Q5_K_M", *words)
    assert_same(convert(model, "Q5_K_M", *words), theirs)


@pytest.mark.parametrize("file_type", [*FILE_TYPES, *LOW_TYPES, *(name for name in NOT_WRITTEN if name != "COPY")])
def test_every_type_that_llama_quantize_writes_is_decoded_as_it_does(file_type: str, sources, tmp_path) -> None:
    """Against what llama-quantize itself expands to F32, bit for bit. It has nothing to fall back to from Q1_0."""
    source = sources["tiny-v2"]
    options = ["--imatrix", "imatrix.gguf", "--tensor-type", "attn_k_b=q8_0"]
    theirs = llama.quantize(source, source.parent / "theirs.gguf", file_type, *options)
    expanded = container.read(llama.quantize(theirs, tmp_path / "expanded.gguf", "F32", "--allow-requantize"))
    floats = {tensor.name: values(expanded, tensor) for tensor in expanded.tensors}
    found = container.read(theirs)
    for tensor in found.tensors:
        ours = blocks.decode(tensor.type, values(found, tensor).reshape(prod(tensor.shape[:-1]), -1))
        np.testing.assert_array_equal(ours.reshape(-1).view(np.uint32), floats[tensor.name].view(np.uint32))


def values(file: container.Container, tensor: container.TensorHeader) -> np.ndarray:
    """A tensor's bytes, uint8."""
    return np.fromfile(file.path, np.uint8, tensor.nbytes, offset=file.data_start + tensor.begin)


@pytest.mark.parametrize("model", SPLIT_MODELS)
def test_split_files_are_those_of_llama_gguf_split(model: str, convert, tmp_path) -> None:
    whole = convert(model, "Q4_K_M").rename(tmp_path / "whole.gguf")
    (tmp_path / "theirs").mkdir()
    theirs = llama.split(whole, tmp_path / "theirs" / model, SPLIT_SIZE)
    convert(model, "Q4_K_M", "--split-max-size", SPLIT_SIZE)
    ours = sorted(tmp_path.glob(f"{model}-*.gguf"))
    assert [path.name for path in ours] == [path.name for path in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert_same(mine, other)


def test_llama_gguf_split_merges_our_files_to_the_whole(convert, tmp_path) -> None:
    """Its keys of the split stay behind in the merged file: split.count is 0 there."""
    whole = convert("tiny-v2", "Q4_K_M").rename(tmp_path / "whole.gguf")
    convert("tiny-v2", "Q4_K_M", "--split-max-size", SPLIT_SIZE)
    first = min(tmp_path.glob("tiny-v2-00001-of-*.gguf"))
    merged = tmp_path / "merged.gguf"
    llama.tool("gguf-split", "--merge", first, merged)
    mine, theirs = container.read(whole), container.read(merged)
    assert types_and_digests(theirs) == types_and_digests(mine)
    assert [item for item in keys_and_values(theirs) if not item[0].startswith("split.")] == keys_and_values(mine)


@pytest.mark.parametrize("model", gguf_tiny.MODELS)
def test_llama_completion_writes_text(model: str, convert) -> None:
    path = convert(model, "Q4_K_M", "--imatrix", "imatrix.gguf")
    prompt = "The module defines"
    words = ["-m", path, "-p", prompt, "-n", 100, "--temp", 0, "-no-cnv", "-t", 1, "--no-warmup"]
    texts = sorted((llama.tool("completion", *words).stdout.strip() for _ in range(3)), key=len)
    assert all(texts[-1].startswith(text) for text in texts)  # at its end it may drop what its log didn't get to
    assert texts[-1].startswith(prompt)
    assert len(texts[-1]) > len(prompt) + 20


# How far llama-perplexity may be from ours, relative, on the file itself: ggml multiplies in BF16, or rounds
# activations to 8 bits. Expanded to F32 it must be within 0.02%.
OFF = {"BF16": 5e-4, "Q8_0": 2e-3, "Q4_K_M": 5e-3}


def their_perplexity(path: Path, text: Path, ctx: int, chunks: int, *options: str) -> float:
    """Of the first chunks. Four more are read: at its end llama-perplexity may drop what its log didn't get to."""
    words = ["-m", path, "-f", text, "-c", ctx, "--chunks", chunks + 4, "-t", 2, *options]
    done = llama.tool("perplexity", *words)
    return float(re.findall(rf"\[{chunks}\]([\d.]+)", done.stdout)[0])


@pytest.fixture
def our_perplexity(cli):
    def run(path: Path, text: Path, ctx: int, chunks: int) -> float:
        words = ["--text", text, "--protocol", "llama.cpp", "--ctx", ctx, "--limit", chunks]
        ran = cli("eval-ppl", path, *words, "--json", "-q")
        assert ran.code == 0, ran.err
        return float(json.loads(ran.out)["perplexity"]["value"])

    return run


@pytest.mark.parametrize("file_type", OFF)
def test_llama_perplexity_and_ours_agree(file_type: str, our_perplexity, convert, tmp_path) -> None:
    text = tmp_path / "topics.txt"
    text.write_text(python_topics().content)
    path = convert("dsv2-mini", file_type)
    expanded = llama.quantize(path, tmp_path / "expanded.gguf", "F32", "--allow-requantize")
    ours = our_perplexity(path, text, 512, 24)
    assert their_perplexity(expanded, text, 512, 24) == pytest.approx(ours, rel=2e-4)
    assert their_perplexity(path, text, 512, 24) == pytest.approx(ours, rel=OFF[file_type])


@pytest.mark.parametrize("file_type", LOW_TYPES)
def test_llama_perplexity_runs_files_of_few_bits(file_type: str, our_perplexity, convert, tmp_path) -> None:
    text = tmp_path / "topics.txt"
    text.write_text(python_topics().content)
    path = convert("dsv2-mini", file_type, "--imatrix", "imatrix.gguf")
    assert their_perplexity(path, text, 512, 8) == pytest.approx(our_perplexity(path, text, 512, 8), rel=1e-2)


@pytest.mark.parametrize("model", gguf_tiny.FAMILY)
def test_llama_perplexity_and_ours_agree_on_the_family(model: str, our_perplexity, convert, sources, tmp_path) -> None:
    """Expanded to F32, with a cache of F32: random experts are close to each other, so that what is rounded to F16 goes
    to another one here and there, and moves the perplexity by up to 0.1%."""
    text, path = sources[model].parent / "text.txt", convert(model, "Q4_K_M")
    expanded = llama.quantize(path, tmp_path / "expanded.gguf", "F32", "--allow-requantize")
    theirs = their_perplexity(expanded, text, 128, 8, "-fa", "off", "-ctk", "f32", "-ctv", "f32")
    assert theirs == pytest.approx(our_perplexity(path, text, 128, 8), rel=1e-5)


@pytest.fixture
def imatrix(cli, models, sources, tmp_path):
    """Measure a model's importance matrix with the command."""

    def run(model: str) -> Path:
        out, text = tmp_path / "imatrix.gguf", sources[model].parent / "text.txt"
        protocol = ["--protocol", "llama.cpp", "--calibration", text]
        windows = ["--num-calibration-samples", CHUNKS, "--max-seq-length", LENGTH]
        statistics = ["-o", tmp_path / "statistics.safetensors"]
        ran = cli("calibrate", models[model], "--imatrix", out, *protocol, *windows, *statistics, "-q")
        assert ran.code == 0, ran.err
        return out

    return run


@pytest.mark.parametrize("model", gguf_tiny.MODELS)
def test_our_importance_matrix_is_as_llama_imatrix_lays_it_out(model: str, imatrix, convert, sources, tmp_path) -> None:
    """The same entries and shapes; the counts of what every token passes; and llama-quantize takes it."""
    ours = imatrix(model)
    mine, theirs = entries(ours), entries(sources[model].parent / "imatrix.gguf")
    assert {name: array.shape for name, array in mine.items()} == {name: array.shape for name, array in theirs.items()}
    for name, array in theirs.items():
        if name.endswith(".counts"):
            assert mine[name].sum() == array.sum(), name
            if "_exps" not in name:
                np.testing.assert_array_equal(mine[name], array, err_msg=name)
    quantized = llama.quantize(sources[model], tmp_path / "theirs.gguf", "Q4_K_M", "--imatrix", str(ours))
    assert_same(convert(model, "Q4_K_M", "--imatrix", ours), quantized)


def test_our_importance_is_llama_imatrixs(imatrix, sources) -> None:
    """dsv2-mini's first layer. llama.cpp rounds what goes into a product to BF16: by 2^-9, its square by 2^-8; what
    attention mixes was rounded twice, as the product's input and, to F16, in the cache."""
    mine, theirs = entries(imatrix("dsv2-mini")), entries(sources["dsv2-mini"].parent / "imatrix.gguf")
    for name in theirs:
        if name.startswith("blk.0.") and name.endswith(".in_sum2"):
            np.testing.assert_allclose(mine[name], theirs[name], rtol=2**-7, err_msg=name)


def entries(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}
