"""Recipes of GGUF files: which type each tensor gets, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from gguf import GGUFReader

import dsv2quant as dq
from dsv2quant.errors import InputError
from dsv2quant.planning.gguf_recipe import parse

MIXED = """
name: mixed
gguf:
  - {tensors: ["attn_q*"], layers: "1-2", type: q5_0}
  - {tensors: [ffn_down_exps, ffn_down], type: Q4_K}
  - {tensors: ["attn_*", output], type: Q8_0}
  - {tensors: [ffn_nothing], type: Q8_0}
"""


def plan_of(text: str, path: Path, **options):
    path.write_text(text)
    return dq.plan(tiny.MINI, gguf=str(path), **options)


def test_the_first_rule_that_matches_decides(tmp_path: Path) -> None:
    plan = plan_of(MIXED, tmp_path / "mix.yaml")
    types = {entry.name: entry.type for entry in plan.entries}
    assert types["blk.0.attn_q_a.weight"] == "Q8_0"
    assert types["blk.1.attn_q_a.weight"] == types["blk.2.attn_q_b.weight"] == "Q5_0"
    assert types["blk.3.attn_q_a.weight"] == types["output.weight"] == types["blk.1.attn_kv_a_mqa.weight"] == "Q8_0"
    assert types["blk.1.ffn_down_exps.weight"] == "Q5_0"  # rows of 128 fall back, as llama-quantize's do
    assert types["token_embd.weight"] == types["blk.1.ffn_up_exps.weight"] == "BF16"
    assert types["blk.1.ffn_gate_inp.weight"] == types["blk.1.attn_norm.weight"] == "F32"
    assert "recipe mixed: rule 4 does nothing: this model has no ffn_nothing there that is quantized" in plan.notes


def test_options_decide_before_the_recipe(tmp_path: Path) -> None:
    plan = plan_of(MIXED, tmp_path / "mix.yaml", output_type="q6_k", tensor_types=["attn_kv_a_mqa=f16"])
    types = {entry.name: entry.type for entry in plan.entries}
    assert types["output.weight"] == "Q6_K"
    assert types["blk.0.attn_kv_a_mqa.weight"] == "F16"


def test_the_file_has_these_types_and_the_number_of_the_commonest(tmp_path: Path) -> None:
    recipe = tmp_path / "mix.yaml"
    recipe.write_text('name: mine\ngguf: [{tensors: ["ffn_*"], type: Q4_0}, {tensors: ["*"], type: Q8_0}]\n')
    read = GGUFReader(dq.convert(tiny.MINI, tmp_path / "mix.gguf", gguf=str(recipe)).out)
    types = {tensor.name: tensor.tensor_type.name for tensor in read.tensors}
    assert types["blk.1.ffn_up_exps.weight"] == "Q4_0"
    assert types["blk.1.attn_output.weight"] == "Q8_0"
    assert read.fields["general.file_type"].contents() == 2  # MOSTLY_Q4_0


WRONG = {
    "no rules": ("name: x\ngguf: []\n", "`gguf` must be a list with at least one rule"),
    "a recipe of a folder": ("name: x\nrules: [{roles: ['*'], scheme: bf16}]\n", "unknown key 'rules'"),
    "no name": ("gguf: [{tensors: ['*'], type: Q8_0}]\n", "`name` must be a word"),
    "a type that is none": ("name: x\ngguf: [{tensors: ['*'], type: Q9}]\n", "rule 1: unknown type 'Q9'"),
    "a key that is none": ("name: x\ngguf: [{tensors: ['*'], kind: Q8_0}]\n", "rule 1: unknown key 'kind'"),
    "a word for tensors": ("name: x\ngguf: [{tensors: output, type: Q8_0}]\n", "`tensors` must be a list"),
    "layers": ("name: x\ngguf: [{tensors: ['*'], layers: 3-1, type: Q8_0}]\n", "rule 1: `layers` is '3-1'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_said_of_a_wrong_one(case) -> None:
    text, message = WRONG[case]
    with pytest.raises(InputError, match=message) as error:
        parse(text, "mix.yaml")
    assert str(error.value).startswith("mix.yaml")


def test_a_rule_behind_one_that_takes_all_is_told(tmp_path: Path) -> None:
    text = 'name: x\ngguf: [{tensors: ["*"], type: Q8_0}, {tensors: [output], type: Q6_K}]\n'
    plan = plan_of(text, tmp_path / "mix.yaml")
    assert "recipe x: rule 2 does nothing: rules before it decide for all that it matches" in plan.notes
