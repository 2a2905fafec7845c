"""`verify --engine llama.cpp`: its programs beside the runtime, number by number, and faults of GGUF files in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf_tiny
import llama_cpp_tools as llama
import numpy as np
import pytest

from dsv2quant.api import calibrate, convert
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.engines import llama_cpp
from dsv2quant.engines.answers import Request
from dsv2quant.evaluation.divergence import batches_of, log_probabilities, run
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.progress import no_progress
from dsv2quant.storage import gguf as container
from dsv2quant.storage.gguf import Value, boolean, string, u32
from dsv2quant.text.text import python_topics
from dsv2quant.text.tokenizer import Windows, cut

CTX, WINDOWS = 128, 4


@pytest.fixture(autouse=True)
def on_path(monkeypatch) -> None:
    monkeypatch.setenv("PATH", f"{llama.BIN}:/usr/bin:/bin")


@pytest.fixture(scope="module")
def made(tmp_path_factory, fox) -> Callable[[str, str], Path]:
    """A model's GGUF file of a type, made once; of 'Q4_0, tuned' one that was trained for few steps, which are taken
    whatever they do. Presets of few bits have an importance matrix."""
    folder = tmp_path_factory.mktemp("files")
    models = gguf_tiny.write(tmp_path_factory.mktemp("models"), ("dsv2-mini", "tiny-v2", "tiny-v3", "tiny-llama"))

    def file(model: str, file_type: str) -> Path:
        out = folder / f"{model}-{file_type}.gguf"
        if out.exists():
            return out
        kind, is_tuned, _ = file_type.partition(", tuned")
        with pytest.MonkeyPatch.context() as m:
            held_out = iter((1.0, 0.5))
            m.setattr("dsv2quant.calib.trained.RATE", 2e-2)
            m.setattr("dsv2quant.calib.tuning.STEP_TOKENS", 64)
            m.setattr("dsv2quant.calib.tuning._held_out", lambda whole, tokens: next(held_out))
            tuning = {"tune": 512, "calibration": fox, "length": 32} if is_tuned else {}
            weighted = {"imatrix": importance(model)} if kind.startswith("DSV2_IQ") else {}
            convert(models[model], out, gguf=kind, **tuning, **weighted)
        return out

    def importance(model: str) -> Path:
        out = folder / f"{model}.imatrix.gguf"
        if not out.exists():
            calibrate(models[model], folder / f"{model}.safetensors", imatrix=out, samples=8, length=256)
        return out

    return file


@pytest.fixture
def verify(cli):
    def verify(path: Path, *args: object):
        words = ("--engine", "llama.cpp", "--windows", WINDOWS, "--ctx", CTX, "--json", "-q")
        return cli("verify", path, *words, *args)

    return verify


@pytest.mark.parametrize(
    ("model", "file_type"),
    [
        *(("dsv2-mini", file_type) for file_type in ("F16", "Q8_0", "Q4_K_M", "Q4_K_M, tuned", "DSV2_Q3_K_M, tuned")),
        ("tiny-v3", "Q4_K_M"), ("tiny-llama", "Q8_0"), ("tiny-llama", "IQ4_XS, tuned"),
    ],
)  # fmt: skip
def test_weights_expanded_to_f32_give_the_runtimes_numbers(model, file_type, made, tmp_path) -> None:
    """Every log-probability that 16 bits reach is within their rounding: ggml decodes the weights to the same values,
    and its graph is the runtime's."""
    path = made(model, file_type)
    expanded = llama.quantize(path, tmp_path / "expanded.gguf", "F32", "--allow-requantize")
    opened, text = open_checkpoint(path), python_topics()
    tokenizer = opened.tokenizer()
    stream = tokenizer.encode(text.content)
    windows = cut(stream, CTX, tokenizer.bos_id, "llama.cpp", text.source, add_bos=tokenizer.add_bos)
    request = Request(Windows(windows.ids[:WINDOWS], windows.first), opened.config.vocab_size)
    answer = llama_cpp.ask(expanded, text.content, request, no_progress)
    np.testing.assert_array_equal(answer.windows.ids, request.windows.ids)
    assert answer.scores.error < 1.25e-4
    passed = run(Model(opened, LoadOptions()), request.windows.ids, batches_of(WINDOWS, WINDOWS))
    for window in range(WINDOWS):
        ours = np.concatenate([block.numpy() for block in log_probabilities(passed, window, windows.first)])
        reached = ours > ours.max(-1, keepdims=True) - 15.9
        theirs = answer.scores.logprobs[window]
        np.testing.assert_allclose(theirs[reached], ours[reached], rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    "file_type", ["BF16", "Q8_0", "Q4_0", "Q4_K_M", "IQ4_XS", "IQ3_S", "MXFP4_MOE", "DSV2_Q3_K_M", "DSV2_IQ2_XXS"]
)
def test_it_computes_what_the_runtime_computes(file_type, made, verify) -> None:
    ran = verify(made("dsv2-mini", file_type))
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["engine"]
    assert 0 < found["kld"]["mean"] <= found["limit"] < 0.03
    assert 0 < found["storage_error"] < 1.25e-4
    assert (found["report"]["device"], found["report"]["kv_cache"]) == ("CPU", "f32")
    assert found["report"]["kernels"]["f32 weights"] == 20


@pytest.mark.parametrize("model", ["tiny-v3", "tiny-llama"])
def test_it_does_on_the_family(model, made, verify) -> None:
    ran = verify(made(model, "Q4_K_M"))
    assert ran.code == 0, ran.err


def test_that_it_routes_groups_of_experts_otherwise_is_seen(made, verify) -> None:
    """llama.cpp goes by a group's two best experts, DeepSeek-V2 by the best."""
    ran = verify(made("tiny-v2", "BF16"))
    assert (ran.code, "in llama.cpp: mean KLD from the runtime is" in ran.err) == (4, True)


def test_beside_its_source_and_from_text_to_text(made, verify) -> None:
    ran = verify(made("dsv2-mini", "Q4_K_M"), "--source", made("dsv2-mini", "BF16"), "--generate")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["engine"]
    assert 0 < found["floor"]["kld"]["mean"] < found["kld"]["mean"]
    assert len(found["generated"]) == 5


def tensors(path: Path, out: Path, change: Callable[[str, np.ndarray], object]) -> Path:
    """A copy whose tensors' bytes [rows, bytes of a row, or of a stack's matrix] are changed in place."""
    opened, data = container.read(path), bytearray(path.read_bytes())
    for tensor in opened.tensors:
        begin = opened.data_start + tensor.begin
        rows = np.frombuffer(data, np.uint8, tensor.nbytes, begin).reshape(tensor.shape[0], -1)
        change(f"{tensor.name} {tensor.type}", rows)
    out.write_bytes(data)
    return out


def scales_permuted(name: str, rows: np.ndarray) -> None:
    """The float16 scale of each Q8_0 block of 34 bytes."""
    if name.endswith(" Q8_0"):
        scales = rows.reshape(-1, 34)[:, :2]
        scales[:] = scales[::-1].copy()


def expert_swapped(name: str, rows: np.ndarray) -> None:
    if name.startswith("blk.1.ffn_") and "_exps" in name:
        rows[:2] = rows[1::-1].copy()


def keys(path: Path, out: Path, changed: dict[str, Value]) -> Path:
    """A copy with other metadata."""
    opened, data = container.read(path), path.read_bytes()
    header = container.pack_header(dict(opened.metadata) | changed, opened.tensors)
    out.write_bytes(header + data[opened.data_start :])
    return out


def reads(other: Path, folder: Path, monkeypatch) -> None:
    """Have the programs read `other`, whichever file they are given: `-m FILE` comes first."""
    for name in ("llama-perplexity", "llama-server"):
        program = folder / name
        program.write_text(f"#!/bin/sh\nshift 2\nexec '{llama.BIN / name}' -m '{other}' \"$@\"\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize("fault", [scales_permuted, expert_swapped], ids=lambda f: f.__name__)
def test_an_engine_that_misreads_weights_is_seen(fault, made, verify, tmp_path, monkeypatch) -> None:
    path = made("dsv2-mini", "Q8_0")
    reads(tensors(path, tmp_path / "bad.gguf", fault), tmp_path, monkeypatch)
    ran = verify(path)
    assert (ran.code, "in llama.cpp: mean KLD from the runtime is" in ran.err) == (4, True)


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
KEYS = {
    "no BOS": ({"tokenizer.ggml.add_bos_token": boolean(False)}, "takes the text for other tokens"),
    "another BOS": ({"tokenizer.ggml.bos_token_id": u32(7)}, "takes the text for other tokens"),
    "another template": ({"tokenizer.chat_template": string(TEMPLATE)}, "of the chat it takes the prompt for tokens"),
}


@pytest.mark.parametrize("fault", KEYS)
def test_an_engine_that_tokenizes_otherwise_is_seen(fault, made, verify, tmp_path, monkeypatch) -> None:
    changed, said = KEYS[fault]
    path = made("dsv2-mini", "Q8_0")
    reads(keys(path, tmp_path / "bad.gguf", changed), tmp_path, monkeypatch)
    ran = verify(path, "--generate")
    assert (ran.code, said in ran.err or ran.err) == (4, True)


def test_an_engine_that_ends_elsewhere_is_seen(made, verify, tmp_path, monkeypatch) -> None:
    """Its end of text is the token that it gives first."""
    path = made("dsv2-mini", "Q8_0")
    first = json.loads(verify(path, "--generate").out)["engine"]["generated"][0]["text"]
    end = int(open_checkpoint(path).tokenizer().encode(first)[0])
    reads(keys(path, tmp_path / "bad.gguf", {"tokenizer.ggml.eos_token_id": u32(end)}), tmp_path, monkeypatch)
    ran = verify(path, "--generate")
    assert (ran.code, f"ends with [{end}], which ends no text" in ran.err) == (4, True)


SOURCE = {
    "no BOS": (KEYS["no BOS"][0], "whether a text begins with BOS is not the source's"),
    "another end": ({"tokenizer.ggml.eos_token_id": u32(5)}, "what ends a text is not the source's"),
    "another template": (KEYS["another template"][0], "the chat template is not the source's"),
}


@pytest.mark.parametrize("fault", SOURCE)
def test_an_artifact_that_says_otherwise_than_its_source_is_seen(fault, made, verify, tmp_path) -> None:
    changed, said = SOURCE[fault]
    bad = keys(made("dsv2-mini", "Q8_0"), tmp_path / "bad.gguf", changed)
    ran = verify(bad, "--source", made("dsv2-mini", "BF16"))
    assert (ran.code, said in ran.err or ran.err) == (4, True)


def test_a_text_that_is_too_short_is_said_so(made, cli, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The {i} quick brown foxes jump over lazy dogs.\n" for i in range(40)))
    words = ("--engine", "llama.cpp", "--text", text, "--ctx", 400, "-q")
    ran = cli("verify", made("dsv2-mini", "Q8_0"), *words)
    assert (ran.code, "llama-perplexity wants twice a window, 800" in ran.err or ran.err) == (3, True)
