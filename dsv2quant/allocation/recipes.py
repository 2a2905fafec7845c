"""A choice for every part of a model as a recipe that a person can read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dsv2quant.planning import gguf_recipe as gguf
from dsv2quant.planning import recipe as folder
from dsv2quant.planning.gguf_recipe import GgufRecipe
from dsv2quant.planning.recipe import Recipe, spelled

KEPT = (
    "{roles: [embed, lm_head, score, router, norm, bias], scheme: bf16}",
    "{roles: [kv_b_proj], scheme: bf16, method: fit}",  # engines decode it
)


class Chosen(NamedTuple):
    """What the tensors that a recipe calls `name` get in a layer, the rest of a rule, 'type: Q4_K'; and their bytes."""

    name: str
    layer: int | None
    gets: str
    size: int


def gguf_recipe(
    name: str, description: Sequence[str], chosen: Iterable[tuple[str, int | None, str, int]]
) -> GgufRecipe:
    """Of (kind of tensor, layer, type, bytes)."""
    rules = _rules((Chosen(kind, layer, f"type: {gets}", size) for kind, layer, gets, size in chosen), "tensors")
    return gguf.parse(_text(name, description, "gguf", rules), name)


def folder_recipe(
    name: str,
    description: Sequence[str],
    chosen: Iterable[tuple[str, int | None, str, int]],
    methods: Mapping[str, str],
) -> Recipe:
    """Of (role, layer, scheme, bytes), with the method of each scheme. kv_b_proj, which engines decode, stays BF16."""
    found = (
        Chosen(r, n, f"scheme: {s}" + f", method: {methods[s]}" * (methods[s] != "rtn"), b) for r, n, s, b in chosen
    )
    return folder.parse(_text(name, description, "rules", [*KEPT, *_rules(found, "roles")]), name)


def _text(name: str, description: Sequence[str], key: str, rules: Iterable[str]) -> str:
    said = "".join(f"# {line}\n" for line in description)
    return f"{said}name: {name}\n{key}:\n" + "".join(f"  - {rule}\n" for rule in rules)


def _rules(chosen: Iterable[Chosen], subject: str) -> list[str]:
    """Rules, a line of YAML each, of which the first that matches wins: those of single layers, then those of names,
    then one for all else. `subject` is the key of names: 'roles' or 'tensors'."""
    by_name: dict[str, dict[int | None, str]] = defaultdict(dict)
    weight: dict[str, Counter[str]] = defaultdict(Counter)
    everywhere: Counter[str] = Counter()
    for each in chosen:
        by_name[each.name][each.layer] = each.gets
        weight[each.name][each.gets] += each.size
        everywhere[each.gets] += each.size
    usual = {name: found.most_common(1)[0][0] for name, found in weight.items()}
    most = everywhere.most_common(1)[0][0]
    single: dict[tuple[str, tuple[int | None, ...]], list[str]] = defaultdict(list)
    for name, layers in by_name.items():
        for gets, where in _by_value(layers):
            if gets != usual[name]:
                single[gets, where].append(name)
    whole: dict[str, list[str]] = defaultdict(list)
    for name, gets in usual.items():
        if gets != most:
            whole[gets].append(name)
    lines = [
        f'{{{subject}: {_listed(names)}, layers: "{spelled(layer for layer in where if layer is not None)}", {gets}}}'
        for (gets, where), names in single.items()
    ]
    lines += [f"{{{subject}: {_listed(names)}, {gets}}}" for gets, names in whole.items()]
    return [*lines, f'{{{subject}: ["*"], {most}}}']


def _by_value(layers: Mapping[int | None, str]) -> Iterator[tuple[str, tuple[int | None, ...]]]:
    for gets in dict.fromkeys(layers.values()):
        yield gets, tuple(layer for layer, found in layers.items() if found == gets)


def _listed(names: Sequence[str]) -> str:
    return f"[{', '.join(names)}]"


def only_type(kind: str, ends: str) -> GgufRecipe:
    """Every tensor in one block type, as far as its rows fit; embedding and head, whose importance nobody measures, in
    another."""
    rules = [f"{{tensors: [token_embd, output], type: {ends}}}", f'{{tensors: ["*"], type: {kind}}}']
    return gguf.parse(_text(kind, (), "gguf", rules), kind)


def only_scheme(name: str, methods: Mapping[str, str], rest: str | None = None) -> Recipe:
    """Every matrix in one scheme, as far as it takes it; given a `rest`, routed experts, and all others in that."""
    wanted = {"*": name} if rest is None else {"routed.*": name, "*": rest}
    rules = [f'{{roles: ["{roles}"], scheme: {s}, method: {methods[s]}}}' for roles, s in wanted.items()]
    return folder.parse(_text(name, (), "rules", [*KEPT, *rules]), name)
