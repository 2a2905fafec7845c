"""Recipes: first match wins, and nothing unknown passes."""

from __future__ import annotations

import contextlib

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv2quant.arch.spec import ROLES, TensorSpec
from dsv2quant.errors import InputError
from dsv2quant.planning import plain_yaml, recipe


def spec(role: str, layer: int | None = 0) -> TensorSpec:
    return TensorSpec(f"{role}.weight", role, (128, 128), layer)


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
    assert parsed.assign(spec("kv_b_proj")) == ("bf16", "rtn")
    assert parsed.assign(spec("routed.up_proj", 2)) == ("fp8-block", "rtn")
    assert parsed.assign(spec("routed.up_proj", 3)) == ("fp8-channel", "rtn")
    assert parsed.assign(spec("o_proj")) == ("fp8-channel", "rtn")
    assert parsed.assign(spec("embed", None)) == ("bf16", "rtn")


@pytest.mark.parametrize("grid", ["block", "channel", "tensor"])
def test_builtin_recipes_quantize_every_linear_role(grid):
    builtin = recipe.builtin(f"fp8-{grid}")
    kept = {role for role in ROLES if builtin.assign(spec(role))[0] == "bf16"}
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
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such file"):
        recipe.load("nowhere.yaml")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
RULE = "name: x\nrules: [{roles: [q_proj], scheme: bf16}]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 1: an anchor or alias, and recipes are plain YAML"),
        ("name: &n x\nrules: []", "line 1: an anchor or alias"),
        ("name: x\nrules: *gone", "line 2: an anchor or alias"),
        ("name: !!bool x\nrules: []", "line 1: a tag, and recipes are plain YAML"),
        ("name: !!python/object/apply:os.system [ls]", "a tag"),
        ("[" * 60_000, "nested too deeply"),
        ("{a: " * 60_000, "nested too deeply"),
        ("name: x\nrules: [{roles: [q_proj], scheme: [bf16]}]", r"unknown scheme \['bf16'\]"),
        ("name: x\nrules: [{roles: [q_proj], scheme: {a: b}}]", "unknown scheme {'a': 'b'}"),
        ("name: x\nrules: [{roles: [q_proj], scheme: bf16, method: [rtn]}]", r"unknown method \['rtn'\]"),
        ("name: x\nrules: [{roles: [[q_proj]], scheme: bf16}]", "must be a list of roles"),
        ("name: x\nrules: [{roles: [q_proj], scheme: 2024-02-30}]", "unknown scheme '2024-02-30'"),
        ("name: x\nrules: [{roles: [q_proj], scheme: bf16, layers: 2024-02-30}]", "`layers` is '2024-02-30'"),
        ("name: x\nrules: [{roles: [q_proj], scheme: bf16, layers: []}]", "`layers` is an empty list"),
        ("name: x\nrules: [{roles: [q_proj], scheme: bf16, layers: '5-2'}]", "`layers` is '5-2'"),
        ("name: x\nrules: [{roles: [q_proj], scheme: bf16, layers: {1: 2}}]", "`layers` is {'1': '2'}"),
        (f"name: x\nrules: [{{roles: [q_proj], scheme: bf16, layers: {'9' * 5000}}}]", "`layers` is '9999"),
        (f"name: x\nrules: [{{roles: ['{'[' * 50_000}'], scheme: bf16}}]", r"unknown role '\[\["),
        ("name: x\nname: y\nrules: []", "line 2: the key 'name' is there twice"),
        ("name: x\nrules: [{roles: [q_proj], scheme: bf16, scheme: fp8-block}]", "the key 'scheme' is there twice"),
        ("? [a, b]\n: c", "line 1: a key that is no word"),
        ("<<: {name: x}\nrules: []", "unknown key '<<'"),
        (f"{RULE}\n---\n{RULE}", "not valid YAML"),
        ("\tname: x", "not valid YAML"),
        ("name: x\0", "not valid YAML"),
        ("%YAML " + "9" * 5000 + ".1\n---\nname: x", "not valid YAML"),
        ('name: "\\UFFFFFFFF"', "not valid YAML"),
        ('name: "\\uD800"\nrules: [{roles: [q_proj], scheme: bf16}]', "`name` must be a word"),
        ('name: "\\e[31m"\nrules: [{roles: [q_proj], scheme: bf16}]', "`name` must be a word"),
        ("name: ~\nrules: [{roles: [q_proj], scheme: bf16}]", "`name` must be a word"),
        ("", "not a mapping"),
    ],
)
def test_hostile_yaml_is_one_short_line(text, message):
    with pytest.raises(InputError, match=message) as caught:
        recipe.parse(text, "mine.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_every_scalar_is_text_and_null_is_nothing():
    rules = "{roles: [q_proj], scheme: bf16, layers: 2}, {roles: ['*'], scheme: bf16, layers: null}"
    parsed = recipe.parse(f"name: 2024-01-01\nrules: [{rules}]", "mine.yaml")
    assert parsed.name == "2024-01-01"
    assert [rule.layers for rule in parsed.rules] == [frozenset({2}), None]
    listed = recipe.parse("name: x\nrules: [{roles: [q_proj], scheme: bf16, layers: [0, 2-3]}]", "mine.yaml")
    assert listed.rules[0].layers == {0, 2, 3}


WORDS = (
    "&a ", "*a", "!!int ", "[", "]", "{", "}", ": ", ", ", "name", "x", "- ", "roles", "scheme", "bf16", "layers",
    "'*'", "1-2", "? ", "null", "0x", "1e9", '"\\', "|", "\n", "---\n",
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.text(st.sampled_from("name: x\nrules[]{}-,'\"&*!|>?%~#0123456789_ \t\\uUe<"), max_size=80)
    | st.lists(st.sampled_from(WORDS), max_size=30).map("".join)
)
def test_nothing_but_our_error_comes_of_any_text(text):
    rule = f"{{roles: [q_proj], scheme: bf16, layers: {text}}}"
    for whole in (text, f"name: x\nrules: [{text}]", f"name: x\nrules: [{rule}]"):
        with contextlib.suppress(InputError):
            recipe.parse(whole, "mine.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RULE.encode("utf-16"), "not UTF-8 text: invalid start byte at byte 0"),
        (b"name: \xff", "not UTF-8 text"),
        (b"# " + b"x" * plain_yaml.MAX_BYTES, "larger than 65,536 bytes"),
        (None, "can't be read: Is a directory"),
    ],
)
def test_what_is_no_recipe_file_is_one_line(content, message, tmp_path, cli):
    path = tmp_path / "mine.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    ran = cli("plan", tiny.MINI, "--recipe", path)
    assert (ran.code, ran.out) == (3, "")
    assert message in ran.err
    assert ran.err.count("\n") == 1


def test_a_byte_order_mark_is_no_content(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + RULE.encode())
    assert recipe.load(path).text == RULE


def test_the_name_of_a_builtin_recipe_is_answered_with_its_option(cli):
    for name, option in (
        ("fp8-channel", "--fp8=channel"),
        ("int4-mixed", "--int4=mixed"),
        ("fp8-static", "--fp8=static"),
    ):
        ran = cli("plan", tiny.MINI, "--recipe", name)
        assert ran.code == 3
        assert f"{name}: no such file (the recipe of this name that comes with the package is {option})" in ran.err
    assert "fp8: no such file (give a YAML file)" in cli("plan", tiny.MINI, "--recipe", "fp8").err
