"""Recipes: ordered rules that give each role (and layer) a scheme and a method. The first rule that matches wins.

    name: mine
    rules:
      - {roles: [kv_b_proj], scheme: bf16}
      - {roles: ["routed.*"], layers: "1-3, 26", scheme: fp8-block}
      - {roles: ["*"], scheme: fp8-channel}

`roles` are names or shell patterns over `names.ROLES`; `layers` counts from 0 and leaves out tensors of no layer.
What no rule matches stays bf16. An unknown key, role or scheme is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dsv2quant.errors import InputError
from dsv2quant.formats.codec import CODECS
from dsv2quant.names import ROLES, Slot

CALIBRATED = ("gptq", "fit")  # methods that need what the layers before, quantized, make of calibration text
MEASURED = ("mse", "awq")  # methods that need statistics of the unquantized model
METHODS = ("rtn", *MEASURED, *CALIBRATED)
_RULE_KEYS = {"roles", "layers", "scheme", "method"}
_RECIPE_KEYS = {"name", "description", "rules"}


@dataclass(frozen=True)
class Rule:
    roles: tuple[str, ...]
    layers: frozenset[int] | None
    scheme: str
    method: str

    def matches(self, slot: Slot) -> bool:
        if self.layers is not None and slot.layer not in self.layers:
            return False
        return any(fnmatchcase(slot.role, pattern) for pattern in self.roles)


@dataclass(frozen=True)
class Recipe:
    """Use `assign`; `text` is the YAML it came from, which the model card shows."""

    name: str
    rules: tuple[Rule, ...]
    text: str

    @property
    def schemes(self) -> set[str]:
        """Every scheme that a rule names."""
        return {rule.scheme for rule in self.rules}

    def assign(self, slot: Slot) -> tuple[str, str]:
        """(scheme, method) of a tensor."""
        for rule in self.rules:
            if rule.matches(slot):
                return rule.scheme, rule.method
        return "bf16", "rtn"


def builtin(
    name: str, *, method: str | None = None, group_size: int | None = None, layout: str | None = None
) -> Recipe:
    """A recipe that comes with the package, such as 'fp8-block'; `int4-*` with another method, group size (0: whole
    rows) or layout ('gptq', 'awq'), 'fp8-static' with 'autofp8'."""
    text = resources.files("dsv2quant").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    if method is not None:
        text = text.replace("method: gptq", f"method: {method}")
    if method not in (None, "gptq"):
        text = text.replace(", method: fit", "")  # refits to what GPTQ's layers before left
    if group_size is not None:
        text = text.replace("int4-g128", f"int4-g{group_size}" if group_size else "int4-channel")
    if layout in ("gptq", "awq"):
        text = text.replace("scheme: int4-", f"scheme: {layout}-")
    if layout == "autofp8":
        text = text.replace("scheme: fp8-static", "scheme: fp8-autofp8")
    return parse(text, f"recipe {name}")


def load(path: str | Path) -> Recipe:
    """A recipe from a file. Raises InputError naming the rule that is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"can't be read: {error}", where=path, fix="give a YAML file") from None
    return parse(text, path)


def parse(text: str, where: object) -> Recipe:
    """A recipe from YAML text; `where` names it in errors."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {error}", where=where, fix="see the README's recipe section") from None
    _known_keys(raw, _RECIPE_KEYS, where)
    rules = raw.get("rules")
    if not isinstance(rules, list) or not rules:
        raise InputError("`rules` must be a list with at least one rule", where=where, fix="add a rule")
    if not isinstance(raw.get("name"), str):
        raise InputError("`name` must be a word", where=where, fix="give the recipe a name")
    parsed = tuple(_rule(rule, f"{where}, rule {i}") for i, rule in enumerate(rules, 1))
    return Recipe(raw["name"], parsed, text)


def _rule(raw: Any, where: str) -> Rule:
    _known_keys(raw, _RULE_KEYS, where)
    roles = raw.get("roles")
    if not isinstance(roles, list) or not roles or not all(isinstance(r, str) for r in roles):
        raise InputError("`roles` must be a list of roles or patterns", where=where, fix=f"roles: {', '.join(ROLES)}")
    for pattern in roles:
        if not any(fnmatchcase(role, pattern) for role in ROLES):
            raise InputError(f"unknown role {pattern!r}", where=where, fix=f"roles: {', '.join(ROLES)}")
    scheme, method = raw.get("scheme"), raw.get("method", "rtn")
    if scheme not in CODECS:
        raise InputError(f"unknown scheme {scheme!r}", where=where, fix=f"schemes: {', '.join(CODECS)}")
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}", where=where, fix=f"methods: {', '.join(METHODS)}")
    possible = CODECS[scheme].methods
    if method not in possible:
        raise InputError(f"{scheme} has no method {method!r}", where=where, fix=f"methods: {', '.join(possible)}")
    return Rule(tuple(roles), _layers(raw.get("layers"), where), scheme, method)


def _layers(raw: Any, where: str) -> frozenset[int] | None:
    """'0, 2-4' or a list of integers → {0, 2, 3, 4}."""
    if raw is None:
        return None
    layers: set[int] = set()
    for item in raw if isinstance(raw, list) else str(raw).split(","):
        first, dash, last = str(item).strip().partition("-")
        spelled = first.isdecimal() and (last.isdecimal() or not dash)
        if not spelled or not int(first) <= int(last or first) <= 1024:
            raise InputError(f"`layers` is {raw!r}", where=where, fix='write it as "0, 2-4"')
        layers.update(range(int(first), int(last or first) + 1))
    return frozenset(layers)


def _known_keys(raw: Any, keys: set[str], where: object) -> None:
    if not isinstance(raw, Mapping):
        raise InputError("not a mapping", where=where, fix=f"keys: {', '.join(sorted(keys))}")
    unknown = sorted(str(key) for key in raw if key not in keys)
    if unknown:
        raise InputError(f"unknown key {unknown[0]!r}", where=where, fix=f"keys: {', '.join(sorted(keys))}")
