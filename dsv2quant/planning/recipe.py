"""Recipes: ordered rules that give each role (and layer) a scheme and a method. The first rule that matches wins.

    name: mine
    rules:
      - {roles: [kv_b_proj], scheme: bf16}
      - {roles: ["routed.*"], layers: "1-3, 26", scheme: fp8-block}
      - {roles: ["*"], scheme: fp8-channel}

`roles` are names or shell patterns over `names.ROLES`; `layers` counts from 0 and leaves out tensors of no layer.
What no rule matches stays bf16. An unknown key, role or scheme is an error. The YAML is plain: every scalar is text,
and anchors, aliases and tags are refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from dsv2quant.arch.spec import ROLES, TensorSpec
from dsv2quant.errors import InputError
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning import plain_yaml
from dsv2quant.planning.plain_yaml import known_keys, short

CALIBRATED = ("gptq", "fit")  # methods that need what the layers before, quantized, make of calibration text
MEASURED = ("mse", "awq")  # methods that need statistics of the unquantized model
METHODS = ("rtn", *MEASURED, *CALIBRATED)
_RULE_KEYS = {"roles", "layers", "scheme", "method"}
_RECIPE_KEYS = {"name", "description", "rules"}
MAX_LAYERS = 1024
MAX_PATTERN = 64  # fnmatch takes time that grows with the square


@dataclass(frozen=True)
class Rule:
    roles: tuple[str, ...]
    layers: frozenset[int] | None
    scheme: str
    method: str

    def matches(self, spec: TensorSpec) -> bool:
        """Layers for multi-token prediction, which calibration never sees, are meant only where they are named."""
        if spec.is_prediction if self.layers is None else spec.layer not in self.layers:
            return False
        return any(fnmatchcase(spec.role, pattern) for pattern in self.roles)


@dataclass(frozen=True)
class Recipe:
    """Use `assign`; `text` is the YAML it came from, which the model card shows. A `builtin` one comes with the
    package, is for every model of the family, and so has rules that a single model needs not."""

    name: str
    rules: tuple[Rule, ...]
    text: str
    builtin: bool = False

    @property
    def schemes(self) -> set[str]:
        """Every scheme that a rule names."""
        return {rule.scheme for rule in self.rules}

    def assign(self, spec: TensorSpec) -> tuple[str, str]:
        """(scheme, method) of a tensor, by its role and layer alone."""
        if spec.plain_scheme == "bf16":
            for rule in self.rules:
                if rule.matches(spec):
                    return rule.scheme, rule.method
        return spec.plain_scheme, "rtn"

    def idle_rules(self, specs: Iterable[TensorSpec], layers: int) -> list[str]:
        """What rules name in vain in a model of so many layers: one line each."""
        kinds = list({(spec.role, spec.layer): spec for spec in specs}.values())
        found = []
        taken: dict[TensorSpec, int] = {}  # the rule that decides
        for i, rule in enumerate(self.rules, 1):
            matched = [spec for spec in kinds if rule.matches(spec)]
            before = {taken[spec] for spec in matched if spec in taken}
            roles, named = ", ".join(rule.roles), rule.layers or frozenset()
            if not matched:
                where = f" in layers {spelled(named)} (its layers are 0-{layers - 1})" if named else ""
                found.append(f"rule {i} does nothing, because this model has no {roles}{where}")
            elif all(spec in taken for spec in matched):
                who = f"rule{'s' * (len(before) > 1)} {spelled(before)}"
                found.append(f"rule {i} does nothing, because {who} before it decided all that it matches")
            elif max(named, default=0) >= layers:
                beyond = spelled(layer for layer in named if layer >= layers)
                found.append(f"rule {i} names layers {beyond}, and this model's are 0-{layers - 1}")
            taken = dict.fromkeys(matched, i) | taken
        return found


def builtin(
    name: str, *, method: str | None = None, group_size: int | None = None, layout: str | None = None
) -> Recipe:
    """A recipe that comes with the package, such as 'fp8-block'; `int4-*` with another method, group size (0: whole
    rows) or layout ('gptq', 'awq'), `int3-*` and `int2-*` with the first two, 'fp8-static' with 'autofp8'."""
    text = resources.files("dsv2quant").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    recipe = parse(text, f"recipe {name}")
    rules = tuple(_adapted(rule, method, group_size, layout) for rule in recipe.rules)
    if rules != recipe.rules:
        # A rule whose method is another one than the file's says so, be it the one that need not be named.
        named = [rule.method != "rtn" or was.method == "gptq" for rule, was in zip(rules, recipe.rules, strict=True)]
        lines = [_spelled_rule(rule, named=shown) for rule, shown in zip(rules, named, strict=True)]
        text = f"{text.partition('rules:')[0]}rules:\n" + "".join(f"  - {line}\n" for line in lines)
    return replace(recipe, rules=rules, text=text, builtin=True)


def _adapted(rule: Rule, method: str | None, group_size: int | None, layout: str | None) -> Rule:
    """A rule with what is asked for, as far as its scheme has such groups, layout and methods."""
    chosen = method if method is not None and rule.method == "gptq" else rule.method
    if rule.method == "fit" and method not in (None, "gptq"):
        chosen = "rtn"  # it refits to what GPTQ's layers before left
    return replace(rule, scheme=CODECS[rule.scheme].variant(group_size, layout), method=chosen)


def _spelled_rule(rule: Rule, *, named: bool) -> str:
    """A rule of all layers in YAML, as the package's recipes have them."""
    roles = ", ".join(f'"{role}"' if "*" in role else role for role in rule.roles)
    return f"{{roles: [{roles}], scheme: {rule.scheme}{f', method: {rule.method}' * named}}}"


def load(path: str | Path) -> Recipe:
    """A recipe from a file. Raises InputError naming the rule that is wrong."""
    if not os.path.exists(path):
        files = resources.files("dsv2quant").joinpath("recipes").iterdir()
        known = {file.name.removesuffix(".yaml") for file in files}
        fix = "give a YAML file"
        if str(path) in known:  # int4-pure: --int4=pure
            fix = f"the recipe of this name that comes with the package is --{str(path).replace('-', '=', 1)}"
        raise InputError("no such file", where=path, fix=fix)
    return parse(plain_yaml.read(path), path)


def parse(text: str, where: object) -> Recipe:
    """A recipe from YAML text; `where` names it in errors."""
    raw = plain_yaml.parse(text, where, "see the README's recipe section")
    known_keys(raw, _RECIPE_KEYS, where)
    rules = raw.get("rules")
    if not isinstance(rules, list) or not rules:
        raise InputError("`rules` must be a list with at least one rule", where=where, fix="add a rule")
    name = raw.get("name")
    if not isinstance(name, str) or not name.isprintable() or len(name) > 100:
        raise InputError("`name` must be a word", where=where, fix="give the recipe a name")
    parsed = tuple(_rule(rule, f"{where}, rule {i}") for i, rule in enumerate(rules, 1))
    return Recipe(name, parsed, text)


def _rule(raw: Any, where: str) -> Rule:
    known_keys(raw, _RULE_KEYS, where)
    roles = raw.get("roles")
    if not isinstance(roles, list) or not roles or not all(isinstance(r, str) for r in roles):
        raise InputError("`roles` must be a list of roles or patterns", where=where, fix=f"roles: {', '.join(ROLES)}")
    for pattern in roles:
        if len(pattern) > MAX_PATTERN or not any(fnmatchcase(role, pattern) for role in ROLES):
            raise InputError(f"unknown role {short(pattern)}", where=where, fix=f"roles: {', '.join(ROLES)}")
    scheme, method = raw.get("scheme"), raw.get("method", "rtn")
    if not isinstance(scheme, str) or scheme not in CODECS:
        raise InputError(f"unknown scheme {short(scheme)}", where=where, fix=f"schemes: {', '.join(CODECS)}")
    if method not in METHODS:
        raise InputError(f"unknown method {short(method)}", where=where, fix=f"methods: {', '.join(METHODS)}")
    possible = CODECS[scheme].methods
    if method not in possible:
        raise InputError(f"{scheme} has no method {short(method)}", where=where, fix=f"methods: {', '.join(possible)}")
    return Rule(tuple(roles), layers_of(raw.get("layers"), where), scheme, method)


def layers_of(raw: Any, where: str) -> frozenset[int] | None:
    """'0, 2-4' or a list of such → {0, 2, 3, 4}."""
    if raw is None:
        return None
    layers: set[int] = set()
    for item in raw if isinstance(raw, list) else str(raw).split(","):
        found = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", item) if isinstance(item, str) else None
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last <= MAX_LAYERS:
            raise InputError(f"`layers` is {short(raw)}", where=where, fix='write it as "0, 2-4"')
        layers.update(range(first, last + 1))
    if not layers:
        raise InputError("`layers` is an empty list", where=where, fix='write it as "0, 2-4", or leave it out for all')
    return frozenset(layers)


def spelled(numbers: Iterable[int]) -> str:
    """{0, 2, 3, 4} → '0, 2-4'."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
