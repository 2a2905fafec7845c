"""What is asked of a GGUF conversion takes effect or is refused in one line; what an imatrix lacks is said."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf_tiny
import numpy as np
import pytest
import tiny
from gguf_expected import write_imatrix
from test_gguf_convert import one_line

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.errors import InputError
from dsv2quant.formats.gguf import blocks, file_types, imatrix
from dsv2quant.formats.gguf.imatrix import FileEntry, Imatrix, check_model
from dsv2quant.planning.gguf_types import Overrides, choose

Entries = Mapping[str, FileEntry]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    configs = {"odd": gguf_tiny.ODD, "untied": gguf_tiny.ODD | {"tie_word_embeddings": False}}
    return {name: tiny.write_checkpoint(folder / name, raw, gguf_tiny.weights(raw)) for name, raw in configs.items()}


def changed(path: Path, change: Callable[[dict[str, FileEntry]], Entries], model: str = "tiny-odd") -> Path:
    """An imatrix of the model with other entries."""
    found = imatrix.read(write_imatrix(path, model))
    imatrix.write(path, Imatrix(change(dict(found.entries)), found.datasets, found.chunk_count, found.chunk_size))
    return path


def without(*words: str) -> Callable[[dict[str, FileEntry]], Entries]:
    return lambda entries: {name: e for name, e in entries.items() if not any(word in name for word in words)}


def of_an_older_program(entries: dict[str, FileEntry]) -> Entries:
    """attn_kv_b in one piece, as llama-imatrix measured before the halves were stored."""
    rest = without("attn_k_b", "attn_v_b")(entries)
    return {
        **rest,
        **{f"blk.{i}.attn_kv_b.weight": FileEntry(np.ones((1, 32), np.float32), np.ones(1)) for i in (0, 1)},
    }


def notes(cli, model: Path, *options: object) -> list[str]:
    ran = cli("plan", model, "--gguf", *options, "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)["notes"]


def test_tensors_without_importance_are_named(models, tmp_path, cli):
    whole = changed(tmp_path / "whole.gguf", lambda entries: entries)
    (note,) = notes(cli, models["odd"], "Q4_K_M", "--imatrix", whole)  # write_imatrix leaves one out
    assert note == f"{whole} lacks 1 of 19 tensors, quantized without it: blk.1.attn_output.weight"
    old = changed(tmp_path / "old.gguf", of_an_older_program)
    lacks, unused = notes(cli, models["odd"], "Q4_K_M", "--imatrix", old)
    assert lacks == (
        f"{old} lacks 5 of 19 tensors, quantized without it: blk.0.attn_k_b.weight, blk.0.attn_v_b.weight, "
        "blk.1.attn_k_b.weight and 2 more"
    )
    assert unused == (
        f"{old} has 2 tensors that the model has not: blk.0.attn_kv_b.weight, blk.1.attn_kv_b.weight "
        "(an older llama.cpp measured attn_k_b and attn_v_b as one)"
    )
    no_experts = changed(tmp_path / "experts.gguf", without("_exps"))
    (note,) = notes(cli, models["odd"], "Q4_K_M", "--imatrix", no_experts)
    assert note.startswith(f"{no_experts} lacks 3 of 19 tensors, quantized without it: blk.1.attn_output.weight, blk.1")
    # Q8_0 has no use for it, and so lacks nothing; a conversion says what the plan says.
    assert notes(cli, models["odd"], "Q8_0", "--imatrix", no_experts) == []
    ran = cli("convert", models["odd"], "--gguf", "Q4_0", "--imatrix", no_experts, "-o", tmp_path / "m.gguf")
    assert ran.code == 0
    assert "lacks 3 of 19" in ran.err


TENSORS = architecture(model_config(gguf_tiny.ODD, "config.json")).gguf_tensors()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blk.2.attn_output.weight", r"1 of its 22 tensors are not in this one: blk.2.attn_output.weight"),  # a deeper
        ("blk.0.attn_q.weight", r"1 of its 22 tensors are not in this one: blk.0.attn_q.weight"),  # a dense model's
        ("blk.1.ffn_up.weight", r"1 of its 22 tensors are not in this one: blk.1.ffn_up.weight"),
        ("blk.2.attn_kv_b.weight", r"1 of its 22 tensors are not in this one: blk.2.attn_kv_b.weight"),
    ],
)
def test_any_tensor_of_another_model_is_refused(name, message, tmp_path):
    found = imatrix.read(write_imatrix(tmp_path / "imatrix.gguf", "tiny-odd"))
    check_model(TENSORS, found)
    found = Imatrix({**found.entries, name: FileEntry(np.ones((1, 32), np.float32), np.ones(1))}, (), 0, 0)
    with pytest.raises(InputError, match=f"imatrix: of another model: {message}"):
        check_model(TENSORS, found)


def test_negative_counts_are_damage(tmp_path, models, cli):
    def negate(entries: dict[str, FileEntry]) -> Entries:
        name = "blk.1.ffn_up_exps.weight"
        return {**entries, name: FileEntry(entries[name].sums, -entries[name].counts)}

    path = changed(tmp_path / "imatrix.gguf", negate)
    ran = cli("plan", models["odd"], "--gguf", "Q4_K_M", "--imatrix", path)
    one_line(ran, "blk.1.ffn_up_exps.weight is not finite, or negative")


def test_q2_k_s_is_refused_without_importance(tmp_path, cli):
    """As llama-quantize does, for all Q2_K tensors but the embedding and the output."""
    raw = gguf_tiny.V2 | {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    model = tiny.write_checkpoint(tmp_path / "model", raw, gguf_tiny.weights(raw))
    ran = cli("plan", model, "--gguf", "Q2_K_S")
    assert ran.code == 2
    assert "Q2_K_S needs an importance matrix for Q2_K: blk.0.attn_kv_a_mqa.weight, " in ran.err
    config = model_config(raw, "config.json")
    matrices = [t for t in architecture(config).gguf_tensors() if t.layer is not None and len(t.shape) > 1]
    entries = {
        t.name: FileEntry(np.ones((1, t.matrices * t.shape[-1]), np.float32), np.ones(1, np.float32)) for t in matrices
    }
    path = tmp_path / "imatrix.gguf"
    imatrix.write(path, Imatrix(entries, ("text",), 1, 64))
    assert not any("lacks" in note for note in notes(cli, model, "Q2_K_S", "--imatrix", path))
    del entries["blk.1.attn_v_b.weight"], entries["blk.1.attn_k_b.weight"]  # the latter falls back to Q4_0
    imatrix.write(path, Imatrix(entries, ("text",), 1, 64))
    one_line(
        cli("plan", model, "--gguf", "Q2_K_S", "--imatrix", path),
        f"{path}: lacks blk.1.attn_v_b.weight, which Q2_K_S makes Q2_K (",
    )
    cured = ("--tensor-type", "attn_v_b=q4_k")
    assert any("lacks 2 of" in note for note in notes(cli, model, "Q2_K_S", "--imatrix", path, *cured))


def test_types_below_three_bits_are_refused_without_importance(tmp_path, cli):
    """As llama-quantize refuses them, or ends in an assertion: it has none of the embedding."""
    raw = gguf_tiny.V2 | {"num_hidden_layers": 2, "first_k_dense_replace": 1}
    model = tiny.write_checkpoint(tmp_path / "model", raw, gguf_tiny.weights(raw))
    for options, said in (
        (("IQ3_XXS",), "IQ3_XXS needs an importance matrix for IQ3_XXS: blk."),
        (("Q4_K_M", "--tensor-type", "ffn_up=iq2_s"), "Q4_K_M needs an importance matrix for IQ2_S: blk.0.ffn_up"),
        (("Q8_0", "--token-embedding-type", "iq2_xs"), "Q8_0 needs an importance matrix for IQ2_XS: token_embd.weight"),
    ):
        ran = cli("plan", model, "--gguf", *options)
        assert (ran.code, said in ran.err or ran.err) == (2, True)
    assert cli("plan", model, "--gguf", "Q8_0", "--token-embedding-type", "iq2_s").code == 0


NOTHING = [
    (("nosuchtensor=q8_0",), "nosuchtensor=q8_0: no tensor's name matches"),
    (("attn_q.weight=q8_0",), "attn_q.weight=q8_0: no tensor's name matches"),  # one of V2-Lite, not of this model
    (("attn_q=q8_0", "blk.9=q4_0"), "blk.9=q4_0: no tensor's name matches"),
    (("_norm=q8_0",), "_norm=q8_0: it matches norms, biases or routers, which stay F32"),
    (("ffn_gate_inp=q8_0",), "ffn_gate_inp=q8_0: it matches norms, biases or routers, which stay F32"),
    (("ffn=q8_0", "ffn_down=q4_0"), "ffn_down=q4_0: options before it decide for all that it matches"),
    (("attn_q_a=q8_0", "attn_q_a=q8_0"), "attn_q_a=q8_0: options before it decide for all that it matches"),
]


@pytest.mark.parametrize(("patterns", "message"), NOTHING)
@pytest.mark.parametrize("file_type", ["Q4_K_M", "DSV2_Q4_K_M"])
def test_a_tensor_type_that_decides_nothing_is_refused(file_type, patterns, message, models, cli):
    options = [word for pattern in patterns for word in ("--tensor-type", pattern)]
    ran = cli("plan", models["odd"], "--gguf", file_type, *options)
    assert (ran.code, ran.out) == (2, "")
    assert f"--tensor-type {message}" in ran.err


def test_other_types_that_decide_nothing_are_refused(models, cli):
    def refused(model: str, file_type: str, *options: str) -> str:
        ran = cli("plan", models[model], "--gguf", file_type, *options)
        assert (ran.code, ran.out) == (2, ""), ran.err
        return ran.err

    plain = refused("odd", "BF16", "--tensor-type", "q=q8_0")
    assert "--tensor-type goes with a quantized file type, not BF16" in plain
    both = ("--token-embedding-type", "q8_0", "--tensor-type", "token_embd=q4_0")
    assert "options before it decide for all" in refused("odd", "Q4_K_M", *both)
    tied = refused("odd", "Q4_K_M", "--output-type", "q8_0", "--token-embedding-type", "q4_0")
    assert "--output-type: the model's output is its embedding, token_embd.weight, whose type is given" in tied
    assert "--output-type: the model's output is its embedding" in refused("odd", "F16", "--output-type", "q8_0")
    for file_type in ("Q4_K_M", "F16"):
        assert cli("plan", models["untied"], "--gguf", file_type, "--output-type", "q8_0").code == 0


def test_output_type_is_the_embedding_s_where_that_is_the_output(models, cli):
    """llama_tensor_get_type_impl: behind patterns, before the fallback of widths (rows of 96 are not whole blocks)."""

    def chosen(overrides: Overrides) -> str:
        config = model_config(gguf_tiny.ODD, "config.json")
        kinds = choose(TENSORS, "Q4_K_M", config, overrides=overrides)
        return next(kind for tensor, (kind, _) in zip(TENSORS, kinds, strict=True) if tensor.kind == "token_embd")

    assert chosen(Overrides()) == "Q8_0"
    assert chosen(Overrides(output_type="Q4_0")) == "Q4_0"
    assert chosen(Overrides(output_type="Q5_K")) == "Q5_1"
    assert chosen(Overrides([("embd", "Q4_1")], output_type="Q4_0")) == "Q4_1"
    assert chosen(Overrides(output_type="Q4_0", token_embedding_type="Q5_0")) == "Q5_0"
    ran = cli("plan", models["odd"], "--gguf", "DSV2_Q4_K_M", "--output-type", "q4_0", "--json")
    assert next(t["type"] for t in json.loads(ran.out)["entries"] if t["tensor"] == "token_embd.weight") == "Q4_0"


def test_shards_hold_the_largest_tensor(models, tmp_path, cli):
    command = ("convert", models["odd"], "--gguf", "Q8_0", "-o", tmp_path / "out" / "m.gguf", "--split-max-size")
    largest = 4096 * 96 // 32 * 34
    for size in (10, 1000, largest - 1):
        ran = cli(*command, size)
        assert ran.code == 2
        assert f"--split-max-size {size:,}: token_embd.weight alone takes 417,792 bytes" in ran.err
        assert not (tmp_path / "out").exists()
    assert cli(*command, str(largest)).code == 0
    assert len(list((tmp_path / "out").glob("*.gguf"))) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--fp8", "-o", "{tmp}/m.gguf"), "-o m.gguf: a GGUF file is written by --gguf TYPE; --fp8 writes a folder"),
        (("--int4", "-o", "{tmp}/m.GGUF"), "-o m.GGUF: a GGUF file is written by --gguf TYPE; --int4 writes a folder"),
        (("-o", "{tmp}/m.gguf"), "-o m.gguf: a GGUF file is written by --gguf TYPE; --fp8 writes a folder"),
        (("--gguf", "Q4_0", "-o", "{tmp}/m"), "-o m: --gguf writes a file, whose name must end in .gguf"),
        (("--gguf", "Q4_0", "-o", "{tmp}/m.gguf/"), "-o m.gguf/: --gguf writes a file, whose name must end in .gguf"),
        (("--gguf", "-o", "{tmp}/m.gguf"), "--gguf needs a value: -o is an option"),
        (("--gguf", "--json", "-o", "{tmp}/m.gguf"), "--gguf needs a value: --json is an option"),
        (("-o", "{tmp}/m.gguf", "--gguf"), "Option '--gguf' requires an argument"),
        (("--gguf", "Q4_0", "--imatrix", "-o", "{tmp}/m.gguf"), "--imatrix needs a value: -o is an option"),
        (("--gguf", "Q4_0", "-o", "--split-max-size=1GB"), "-o needs a value: --split-max-size is an option"),
        (("--gguf", "Q4_0", "--gguf", "Q8_0", "-o", "{tmp}/m.gguf"), "--gguf is given twice"),
        (("--gguf", "Q4_0", "--imatrix", "a", "--imatrix=b", "-o", "{tmp}/m.gguf"), "--imatrix is given twice"),
        (("--fp8", "-o", "{tmp}/m", "--output", "{tmp}/n"), "-o / --output is given twice"),
        (("--fp8", "--fp8=channel", "-o", "{tmp}/m"), "--fp8 is given twice"),
    ],
)
def test_options_that_would_be_swallowed_or_dropped(words, message, models, tmp_path, cli):
    out = tmp_path / "out"
    ran = cli("convert", models["odd"], *(word.replace("{tmp}", str(out)) for word in words))
    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err.replace(f"{out}/", "")
    assert not out.exists()


def test_what_may_be_repeated(models, cli):
    several = ("--tensor-type", "attn_q_a=q8_0", "--tensor-type", "attn_q_b=q8_0")
    assert cli("plan", models["odd"], "--gguf", "Q4_K_M", *several, "--offline", "--offline", "-v", "-v").code == 0
    assert cli("plan", models["odd"], "--target", "vllm", "--target", "sglang").code == 0
    assert cli("plan", "--fp8", models["odd"]).code == 0


def test_types_that_are_listed_can_be_written(models, cli):
    """Each by its name in --help and in the error of an unknown one. The rest of llama-quantize's is refused by name"""
    names = file_types.NAMES
    untied = models["untied"]
    for name in names:
        ran = cli("plan", untied, "--gguf", name.lower())
        assert ran.code == 0 or "needs an importance matrix" in ran.err, (name, ran.err)
    assert {file_type.default for file_type in file_types.FILE_TYPES.values()} <= blocks.TYPES.keys()
    helped = " ".join(cli("convert", "--help").out.split())
    assert ", ".join(names) in helped.replace("- ", "-")
    unknown = cli("plan", untied, "--gguf", "Q9")
    assert f"unknown file type 'Q9' (one of {', '.join(names)})" in unknown.err
    for name in file_types.NOT_WRITTEN:
        ran = cli("plan", untied, "--gguf", name)
        assert ran.code == 2
        assert f"{name} is a file type of llama-quantize's that is not written here (one of F32" in ran.err
    assert not set(names) & set(file_types.NOT_WRITTEN)
