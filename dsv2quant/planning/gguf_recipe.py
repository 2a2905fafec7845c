"""Recipes of GGUF files: ordered rules that give each tensor a type. The first rule that matches wins.

    name: mine
    gguf:
      - {tensors: [attn_kv_a_mqa, "attn_q*"], type: Q8_0}
      - {tensors: ["ffn_*_exps"], layers: "1-3, 26", type: IQ3_S}
      - {tensors: ["*"], type: Q4_K}

`tensors` are names without layer and suffix, as llama.cpp's files have them, or shell patterns over them; `layers`
counts from 0 and leaves out tensors of no layer. What no rule matches stays BF16; norms, biases and routers are F32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dsv2quant.arch.spec import GgufTensor
from dsv2quant.errors import InputError
from dsv2quant.formats.gguf import blocks
from dsv2quant.planning import plain_yaml
from dsv2quant.planning.gguf_types import Choice, Overrides, fall_back, is_tied, quantizable
from dsv2quant.planning.plain_yaml import known_keys, short
from dsv2quant.planning.recipe import MAX_PATTERN, layers_of

_ADVICE = "see docs/gguf.md"


@dataclass(frozen=True)
class TypeRule:
    """Gives tensors whose kind matches a pattern, in some layers or in all, a type."""

    tensors: tuple[str, ...]
    layers: frozenset[int] | None
    type: str

    def matches(self, tensor: GgufTensor) -> bool:
        if self.layers is not None and tensor.layer not in self.layers:
            return False
        return any(fnmatchcase(tensor.kind, pattern) for pattern in self.tensors)


@dataclass(frozen=True)
class GgufRecipe:
    """`text` is the YAML it came from, which the model card shows."""

    name: str
    rules: tuple[TypeRule, ...]
    text: str

    def choose(self, tensors: Sequence[GgufTensor], overrides: Overrides) -> list[Choice]:
        """(type, reason) of every tensor; the reason says why a type is not the one wished for."""
        tied = is_tied(tensors)
        return [overrides.of(t, tied=tied) or self._of(t) if quantizable(t) else ("F32", None) for t in tensors]

    def _of(self, tensor: GgufTensor) -> Choice:
        rule = next((rule for rule in self.rules if rule.matches(tensor)), None)
        return ("BF16", None) if rule is None else fall_back(tensor, rule.type)

    def idle_rules(self, tensors: Sequence[GgufTensor]) -> Iterator[str]:
        """What rules name in vain in a model: one line each."""
        matrices = [tensor for tensor in tensors if quantizable(tensor)]
        deciding = [next((n for n, rule in enumerate(self.rules, 1) if rule.matches(t)), None) for t in matrices]
        for number, rule in enumerate(self.rules, 1):
            if number not in deciding:
                why = "rules before it decide for all that it matches"
                if not any(map(rule.matches, matrices)):
                    why = f"this model has no {', '.join(rule.tensors)} there that is quantized"
                yield f"rule {number} does nothing: {why}"


def load(path: str | Path) -> GgufRecipe:
    """A recipe from a file. Raises InputError naming the rule that is wrong."""
    return parse(plain_yaml.read(path), path)


def parse(text: str, where: object) -> GgufRecipe:
    """A recipe from YAML text; `where` names it in errors."""
    raw = plain_yaml.parse(text, where, _ADVICE)
    known_keys(raw, ("name", "description", "gguf"), where)
    rules, name = raw.get("gguf"), raw.get("name")
    if not isinstance(rules, list) or not rules:
        raise InputError("`gguf` must be a list with at least one rule", where=where, fix=_ADVICE)
    if not isinstance(name, str) or not name.isprintable() or len(name) > 100:
        raise InputError("`name` must be a word", where=where, fix="give the recipe a name")
    return GgufRecipe(name, tuple(_rule(rule, f"{where}, rule {i}") for i, rule in enumerate(rules, 1)), text)


def _rule(raw: Any, where: str) -> TypeRule:
    known_keys(raw, ("tensors", "layers", "type"), where)
    tensors, kind = raw.get("tensors"), raw.get("type")
    is_list = isinstance(tensors, list) and tensors and all(isinstance(t, str) for t in tensors)
    if not is_list or any(len(pattern) > MAX_PATTERN for pattern in tensors):
        fix = "tensors: [attn_output, ffn_down_exps]"
        raise InputError("`tensors` must be a list of kinds of tensors or patterns", where=where, fix=fix)
    if not isinstance(kind, str) or kind.upper() not in blocks.TYPES:
        raise InputError(f"unknown type {short(kind)}", where=where, fix=f"types: {', '.join(blocks.TYPES)}")
    return TypeRule(tuple(tensors), layers_of(raw.get("layers"), where), kind.upper())
