"""Recipes: first match wins, and nothing unknown passes."""

from __future__ import annotations

import pytest

from dsv2quant import recipe
from dsv2quant.errors import InputError
from dsv2quant.names import ROLES, Slot


def slot(role: str, layer: int | None = 0) -> Slot:
    return Slot(f"{role}.weight", role, (128, 128), layer)


def test_first_match_wins_and_the_rest_stays_bf16():
    parsed = recipe.parse(
        """
        name: mine
        rules:
          - {roles: [kv_b_proj], scheme: bf16}
          - {roles: ["routed.*"], layers: "1-2, 5", scheme: fp8-block}
          - {roles: ["*_proj", "routed.*"], scheme: fp8-channel}
        """,
        "mine.yaml",
    )
    assert parsed.assign(slot("kv_b_proj")) == ("bf16", "rtn")
    assert parsed.assign(slot("routed.up_proj", 2)) == ("fp8-block", "rtn")
    assert parsed.assign(slot("routed.up_proj", 3)) == ("fp8-channel", "rtn")
    assert parsed.assign(slot("o_proj")) == ("fp8-channel", "rtn")
    assert parsed.assign(slot("embed", None)) == ("bf16", "rtn")


@pytest.mark.parametrize("grid", ["block", "channel", "tensor"])
def test_builtin_recipes_quantize_every_linear_role(grid):
    builtin = recipe.builtin(f"fp8-{grid}")
    kept = {role for role in ROLES if builtin.assign(slot(role))[0] == "bf16"}
    assert kept == {"embed", "lm_head", "score", "router", "norm", "bias"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [", "not valid YAML"),
        ("- a list", "not a mapping"),
        ("name: x\nrules: []", "at least one rule"),
        ("rules: [{roles: ['*'], scheme: bf16}]", "`name` must be"),
        ("name: x\nrule: []", "unknown key 'rule'"),
        ("name: x\nrules: [{role: q_proj, scheme: bf16}]", "rule 1: unknown key 'role'"),
        ("name: x\nrules: [{roles: [q_projj], scheme: bf16}]", "unknown role 'q_projj'"),
        ("name: x\nrules: [{roles: q_proj, scheme: bf16}]", "must be a list of roles"),
        ("name: x\nrules: [{roles: [q_proj], scheme: fp9}]", "unknown scheme 'fp9'.*fp8-block"),
        ("name: x\nrules: [{roles: [q_proj], scheme: bf16, method: magic}]", "unknown method 'magic'"),
        ("name: x\nrules: [{roles: [q_proj], scheme: bf16, layers: 3-1}]", "`layers` is '3-1'"),
        ("name: x\nrules: [{roles: [q_proj], scheme: bf16, layers: all}]", "`layers` is 'all'"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(InputError, match=message):
        recipe.parse(text, "mine.yaml")


def test_a_missing_file_is_one_line():
    with pytest.raises(InputError, match=r"nowhere\.yaml: can't be read"):
        recipe.load("nowhere.yaml")
