"""Bad input to a GGUF conversion: one line that says what, where and what to do; the exit code; nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf_tiny
import numpy as np
import pytest
import tiny
import torch
from gguf import GGUFWriter
from gguf_expected import write_imatrix
from test_bad_input import config, edit_json, snapshot
from test_gguf_convert import one_line

from dsv2quant.arch.deepseek_v2 import SEQUENCE_CLASSIFICATION
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError
from dsv2quant.formats.gguf import blocks
from dsv2quant.planning.gguf_plan import Options, make_gguf_plan

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
KV_B = "model.layers.1.self_attn.kv_b_proj.weight"
NORM = "model.layers.0.self_attn.q_a_layernorm.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
EMBED = "model.embed_tokens.weight"
NAN, INF = float("nan"), float("inf")
Change = Callable[[Path], object]
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # numpy's would be a second line


def set_weight(name: str, index: tuple[int, ...], value: float, dtype: torch.dtype = torch.bfloat16) -> Change:
    """A checkpoint of `dtype` with one value changed."""

    def change(folder: Path) -> None:
        tensors = {key: value.to(dtype) for key, value in gguf_tiny.weights(gguf_tiny.ODD).items()}
        tensors[name][index] = value
        tiny.write_checkpoint(folder, gguf_tiny.ODD | {"torch_dtype": str(dtype)[6:]}, tensors)

    return change


def quantized(folder: Path) -> None:
    """FP8 with a scale per tensor, which is not decoded for another conversion."""
    tensors = gguf_tiny.weights(gguf_tiny.ODD)
    for name in [name for name in tensors if "self_attn" in name and name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.ones(1)
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights}
    quantization = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": group}}
    tiny.write_checkpoint(folder, gguf_tiny.ODD | {"quantization_config": quantization}, tensors)


def architecture(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny.write_checkpoint(folder, gguf_tiny.ODD | {"architectures": [SEQUENCE_CLASSIFICATION]})


def biased(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny.write_checkpoint(folder, gguf_tiny.ODD | {"attention_bias": True})


def imatrix(change: Callable[[Path], object], model: str = "tiny-odd") -> Change:
    """An imatrix beside the model, then a change to it."""
    return lambda folder: change(write_imatrix(folder.parent / "imatrix.gguf", model))


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def last_value(value: float) -> Callable[[Path], None]:
    """The file ends with the sums of a tensor's first channels."""

    def change(path: Path) -> None:
        data = path.read_bytes().rstrip(b"\0")
        data = data[: len(data) // 32 * 32]
        size = path.stat().st_size
        path.write_bytes((data[:-4] + np.float32(value).tobytes()).ljust(size, b"\0"))

    return change


def other_gguf(path: Path) -> None:
    writer = GGUFWriter(path, "deepseek2")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CONVERT = ("convert", "{model}", "-o", "{out}", "-q", "--gguf")
Q4_K_M = (*CONVERT, "Q4_K_M")
WEIGHTED = (*Q4_K_M, "--imatrix", "{imatrix}")
BEYOND = "is NaN, infinite or beyond BF16's range at"
WIDER = "(give it a wider type by --tensor-type)"
CASES: list[tuple[str, Change | None, tuple[str, ...], int, str]] = [
    # name, what is done to a good checkpoint, command, exit code, message
    # Types
    ("unknown file type", None, (*CONVERT, "Q9_K"), 2, "unknown file type 'Q9_K' (one of F32, F16, BF16, Q8_0,"),
    ("Q1_0", None, ("plan", "{mini}", "--gguf", "Q1_0"), 2, "Q1_0 is a file type of llama-quantize's that is"),
    ("Q2_0", None, (*CONVERT, "q2_0"), 2, "Q2_0 is a file type of llama-quantize's that"),
    ("no =", None, (*Q4_K_M, "--tensor-type", "ffn_down"), 2, "--tensor-type 'ffn_down' (write it as PATTERN=TYPE"),
    ("no pattern", None, (*Q4_K_M, "--tensor-type", "=q8_0"), 2, "--tensor-type '=q8_0' (write it as PATTERN=TYPE"),
    ("bad pattern", None, (*Q4_K_M, "--tensor-type", "ffn_(=q8_0"), 2, "ffn_(=q8_0: missing ), unterminated"),
    ("bad tensor type", None, (*Q4_K_M, "--tensor-type", "ffn=q9"), 2, "unknown type 'q9' (one of F32, F16, BF16,"),
    ("no tensor type", None, (*Q4_K_M, "--tensor-type", "ffn="), 2, "unknown type '' (one of"),
    ("bad output type", None, (*Q4_K_M, "--output-type", "Q4_K_M"), 2, "unknown type 'Q4_K_M' (one of"),
    (
        "a type that rows don't fit",
        None,
        (*Q4_K_M, "--token-embedding-type", "q6_k"),
        2,
        "token_embd.weight can't be Q6_K: its rows have 96 columns (give another type)",
    ),
    # Options
    ("imatrix alone", None, (*CONVERT[:-1], "--imatrix", "x"), 2, "--imatrix goes with --gguf"),
    ("shrink alone", None, (*Q4_K_M, "--imatrix-shrink"), 2, "--imatrix-shrink goes with --imatrix"),
    ("split without", None, (*CONVERT[:-1], "--split-max-size", "1GB"), 2, "--split-max-size goes with --gguf"),
    ("pattern without", None, (*CONVERT[:-1], "--tensor-type", "a=q8_0"), 2, "--tensor-type goes with --gguf"),
    ("groups without", None, ("plan", "{model}", "--drop-expert-groups"), 2, "--drop-expert-groups goes with --gguf"),
    ("fp8 too", None, (*Q4_K_M, "--fp8"), 2, "--fp8 does not go with --gguf"),
    ("recipe too", None, (*Q4_K_M, "--recipe", "x.yaml"), 2, "--recipe does not go with --gguf"),
    ("shards of another kind", None, (*Q4_K_M, "--max-shard-size", "1GB"), 2, "--max-shard-size does not go with"),
    ("calibration", None, (*Q4_K_M, "--calibration", "x.txt"), 2, "--calibration does not go with --gguf"),
    ("samples", None, ("convert", "{model}", "--seed", "1", *Q4_K_M[2:]), 2, "--seed does not go with --gguf"),
    ("statistics", None, (*Q4_K_M, "--statistics", "x"), 2, "--statistics does not go with --gguf"),
    ("plan with a target", None, ("plan", "{model}", "--gguf", "q8_0", "--tp", "2"), 2, "--tp does not go with --gguf"),
    ("size that is none", None, (*Q4_K_M, "--split-max-size", "big"), 2, "'big' is not a size"),
    ("another ending", None, ("convert", "{model}", "-o", "{out}.bin", "--gguf", "q8_0"), 2, "must end in .gguf"),
    ("no output", None, ("convert", "{model}", "--gguf", "q8_0"), 2, "give -o OUT"),
    # Importance matrices
    ("no imatrix", None, WEIGHTED, 3, "imatrix.gguf: no such file (give a *.gguf imatrix)"),
    ("imatrix a folder", None, (*Q4_K_M, "--imatrix", "{model}"), 3, "is a folder (give a *.gguf imatrix)"),
    ("imatrix cut", imatrix(truncate), WEIGHTED, 3, "imatrix.gguf: truncated: "),
    ("imatrix of text", imatrix(lambda p: p.write_text("a text" * 99)), WEIGHTED, 3, ": truncated or not a GGUF"),
    ("imatrix empty", imatrix(lambda p: p.write_bytes(b"")), WEIGHTED, 3, "imatrix.gguf: "),
    ("a model as imatrix", imatrix(other_gguf), WEIGHTED, 3, "imatrix.gguf: not an imatrix: it holds no *.in_sum2"),
    ("another model's", imatrix(lambda p: None, "tiny-v2"), WEIGHTED, 3, "imatrix.gguf: of another model: "),
    ("a deeper model's", imatrix(lambda p: None, "tiny-lite"), WEIGHTED, 3, "imatrix.gguf: of another model: "),
    ("NaN in it", imatrix(last_value(NAN)), WEIGHTED, 3, ".weight is not finite, or negative (make it again"),
    ("infinity in it", imatrix(last_value(INF)), WEIGHTED, 3, ".weight is not finite, or negative (make it again"),
    ("negative squares", imatrix(last_value(-1.0)), WEIGHTED, 3, ".weight is not finite, or negative (make it again"),
    # Weights
    ("NaN in an expert", set_weight(EXPERT, (7, 33), NAN), Q4_K_M, 3, f"{EXPERT} {BEYOND} [7, 33]"),
    ("infinite expert", set_weight(EXPERT, (39, 95), -INF), Q4_K_M, 3, f"{EXPERT} {BEYOND} [39, 95]"),
    ("NaN in kv_b_proj's keys", set_weight(KV_B, (70, 3), NAN), Q4_K_M, 3, f"{KV_B} {BEYOND} [70, 3]"),
    ("infinity in its values", set_weight(KV_B, (191, 31), INF), Q4_K_M, 3, f"{KV_B} {BEYOND} [191, 31]"),
    ("NaN in a norm", set_weight(NORM, (9,), NAN), Q4_K_M, 3, f"{NORM} {BEYOND} [9]"),
    ("NaN in a router", set_weight(ROUTER, (4, 5), NAN), Q4_K_M, 3, f"{ROUTER} {BEYOND} [4, 5]"),
    ("NaN far down", set_weight(EMBED, (4095, 1), NAN), Q4_K_M, 3, f"{EMBED} {BEYOND} [4095, 1]"),
    ("NaN in FP16", set_weight(EXPERT, (0, 1), NAN, torch.float16), Q4_K_M, 3, f"{EXPERT} {BEYOND} [0, 1]"),
    ("infinity in FP16", set_weight(KV_B, (2, 3), INF, torch.float16), Q4_K_M, 3, f"{KV_B} {BEYOND} [2, 3]"),
    ("NaN in FP32", set_weight(NORM, (63,), NAN, torch.float32), Q4_K_M, 3, f"{NORM} {BEYOND} [63]"),
    ("infinity in FP32", set_weight(EMBED, (4000, 0), INF, torch.float32), Q4_K_M, 3, f"{EMBED} {BEYOND} [4000, 0]"),
    ("NaN copied as F32", set_weight(EXPERT, (1, 2), NAN, torch.float32), (*CONVERT, "F32"), 3, f"{EXPERT} {BEYOND}"),
    ("too large for F16", set_weight(EXPERT, (1, 2), 1e6), (*CONVERT, "F16"), 3, f"too large for F16 {WIDER}"),
    ("too large for Q8_0", set_weight(EMBED, (5, 6), 1e9), Q4_K_M, 3, f"{EMBED} has values too large for Q8_0 {WIDER}"),
    (
        "too large for BF16",
        set_weight(EXPERT, (1, 2), 3.4e38, torch.float32),
        (*CONVERT, "BF16"),
        3,
        "too large for BF16",
    ),
    # The checkpoint
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), Q4_K_M, 3, "tokenizer.json: missing"),
    ("shape against config", config(kv_lora_rank=64), Q4_K_M, 3, "config.json implies"),
    ("quantized already", quantized, Q4_K_M, 3, "already quantized: model.layers.0.self_attn"),
    ("attention biases", biased, Q4_K_M, 3, "has attention biases (llama.cpp's deepseek2 model has none"),
    ("a classifier", architecture, Q4_K_M, 3, f"is a {SEQUENCE_CLASSIFICATION} (llama.cpp runs"),
    (
        "a GGUF file",
        lambda f: None,
        ("convert", "{gguf}", *Q4_K_M[2:]),
        3,
        "m.gguf: is a GGUF file, which is not converted (give the Hugging Face checkpoint it was made from)",
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "odd"
    return tiny.write_checkpoint(folder, gguf_tiny.ODD, gguf_tiny.weights(gguf_tiny.ODD))


@pytest.fixture(scope="module")
def converted(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "m.gguf"
    convert(make_gguf_plan(open_checkpoint(model), Options("Q8_0")), out)
    return out


@pytest.mark.parametrize(("change", "command", "code", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_bad_input_is_one_line_and_nothing_is_left(change, command, code, message, tmp_path, model, converted, cli):
    folder, out = tmp_path / "model", tmp_path / "out" / "m.gguf"
    shutil.copytree(model, folder)
    if change is not None:
        change(folder)
    before = snapshot(folder)
    places = {"model": folder, "out": out, "imatrix": tmp_path / "imatrix.gguf", "gguf": converted, "mini": tiny.MINI}
    ran = cli(*(word.format(**places) for word in command))
    assert ran.code == code, ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err
    if code == 3:
        assert ran.err.count("\n") == 1, ran.err
        assert ran.err.startswith("error: ")
    assert ran.out == ""
    assert snapshot(folder) == before
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_every_change_is_to_a_good_checkpoint(model, tmp_path, cli):
    for number, options in enumerate(([], ["--imatrix", write_imatrix(tmp_path / "imatrix.gguf", "tiny-odd")])):
        ran = cli("convert", model, "--gguf", "Q4_K_M", "-o", tmp_path / f"{number}.gguf", "-q", *options)
        assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize("value", [1e9, -1e9, 1e30, 3e38, -3e38])
@pytest.mark.parametrize(
    "kind", ["Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q5_1", "IQ3_S", "IQ1_M", "TQ2_0"]
)
def test_no_block_takes_values_beyond_its_scale(kind, value):
    """Squares of the largest overflow in the search for a scale, which then can be 0."""
    x = np.random.default_rng(0).standard_normal((3, 512), np.float32)
    for importance in (None, np.random.default_rng(1).random(512, np.float32)):
        assert blocks.holds(kind, x, blocks.encode(kind, x, importance))
        for index in (slice(None), 300):
            large = x.copy()
            large[1, index] = value
            assert not blocks.holds(kind, large, blocks.encode(kind, large, importance))


def test_a_weight_too_large_is_found_in_kv_b_proj(tmp_path, model):
    set_weight(KV_B, (191, 31), 1e9)(tmp_path / "model")
    plan = make_gguf_plan(open_checkpoint(tmp_path / "model"), Options("Q4_K_M"))
    with pytest.raises(InputError, match=rf"{KV_B} has values too large for Q5_0"):
        convert(plan, tmp_path / "out" / "m.gguf")


def test_a_folder_and_the_imatrix_are_never_overwritten(model, cli, tmp_path):
    out = tmp_path / "out" / "m.gguf"
    out.mkdir(parents=True)
    one_line(
        cli("convert", model, "--gguf", "Q4_K_M", "-o", out, "-q", "--force"),
        "m.gguf: is a folder (give the name of a file)",
    )
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", "tiny-odd")
    before = imatrix.read_bytes()
    command = ("convert", model, "--gguf", "Q4_K_M", "--imatrix", imatrix, "-o", imatrix, "-q")
    one_line(cli(*command, "--force"), "imatrix.gguf: is an input of this command")
    assert imatrix.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "imatrix.gguf"}


@pytest.mark.parametrize("place", ["/proc/m.gguf", "{model}/config.json/m.gguf"])
def test_a_place_that_takes_no_file_is_named(place, model, cli):
    out = place.format(model=model)
    one_line(cli("convert", model, "--gguf", "Q8_0", "-o", out, "-q"), f"{out}: can't be written: ")


def test_what_a_conversion_can_do_without(tmp_path, model, cli):
    """No model card, no generation config, and no chat template."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "generation_config.json").unlink()
    edit_json(folder, "tokenizer_config.json", chat_template="absent")
    ran = cli("convert", folder, "--gguf", "Q8_0", "-o", tmp_path / "m.gguf", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["files"]["m.gguf"]["size"] == (tmp_path / "m.gguf").stat().st_size
