"""What a search chooses among: the parts of a model that get one type or scheme as a whole, and what each may become.

A part is what a consumer holds in one: a tensor of a GGUF file, which may be a half of kv_b_proj; of a folder a module
that engines fuse, and all routed experts of a layer. Candidates are plans of the whole model, each in one type or
scheme as far as that goes: where a part falls back, it is what another candidate makes of it, too, and left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dsv2quant.arch.spec import K_B, V_B, Heads, TensorSpec
from dsv2quant.planning import consumers
from dsv2quant.planning.gguf_plan import GgufPlan
from dsv2quant.planning.gguf_types import quantizable
from dsv2quant.planning.plan import Plan
from dsv2quant.storage.gguf import padded
from dsv2quant.storage.safetensors import Output

APART = 1.18  # a bit at 5 bits


class Option(NamedTuple):
    """What a candidate makes of a part: the type or scheme of what a recipe calls by each name, and all bytes."""

    kinds: tuple[tuple[str, str], ...]
    nbytes: int


@dataclass(frozen=True)
class Part:
    """`weights` are names of the checkpoint's, `half` says which half of kv_b_proj it is, of these `heads`; `options`
    by candidate, of which those in `measured` are measured, and the others predicted by the errors of their weights."""

    key: str
    layer: int | None
    weights: tuple[str, ...]
    half: Literal["k", "v"] | None
    heads: Heads | None
    options: Mapping[str, Option]
    measured: frozenset[str]

    @property
    def predicted(self) -> list[str]:
        return [candidate for candidate in self.options if candidate not in self.measured]


class _Line(NamedTuple):
    key: str
    layer: int | None
    name: str
    specs: tuple[TensorSpec, ...]
    kind: str
    nbytes: int


def parts_of(plans: Mapping[str, Plan | GgufPlan]) -> list[Part]:
    """The parts of a model that there is a choice for, in its order, and what each of the plans makes of them."""
    found: dict[str, dict[str, list[_Line]]] = {}
    for candidate, plan in plans.items():
        for line in _gguf_lines(plan) if isinstance(plan, GgufPlan) else _folder_lines(plan):
            found.setdefault(line.key, {}).setdefault(candidate, []).append(line)
    # Block types round the same weights alike. Schemes of a folder also differ in methods and in activations.
    spaced = all(isinstance(plan, GgufPlan) for plan in plans.values())
    parts = [_part(key, by_candidate, spaced) for key, by_candidate in found.items()]
    return [part for part in parts if len(part.options) > 1]


def _part(key: str, by_candidate: Mapping[str, list[_Line]], spaced: bool) -> Part:
    options: dict[str, Option] = {}
    for candidate, lines in by_candidate.items():
        option = Option(
            tuple(dict.fromkeys((line.name, line.kind) for line in lines)), sum(line.nbytes for line in lines)
        )
        if option not in options.values():
            options[candidate] = option
    first = next(iter(by_candidate.values()))
    weights = dict.fromkeys(spec.name for line in first for spec in line.specs)
    half: Literal["k", "v"] | None = {K_B: "k", V_B: "v"}.get(first[0].name)  # type: ignore[assignment]
    return Part(
        key,
        first[0].layer,
        tuple(weights),
        half,
        first[0].specs[0].heads,
        options,
        frozenset(_spaced(options) if spaced else options),
    )


def _spaced(options: Mapping[str, Option]) -> Iterator[str]:
    """The smallest, the largest, and so many between that the next in size is APART times as large at least."""
    order = sorted(options, key=lambda candidate: options[candidate].nbytes)
    last = 0.0
    for candidate in order:
        if options[candidate].nbytes >= APART * last or candidate == order[-1]:
            yield candidate
            last = options[candidate].nbytes


def _gguf_lines(plan: GgufPlan) -> Iterator[_Line]:
    for entry in plan.entries:
        tensor = entry.tensor
        if quantizable(tensor):
            yield _Line(
                tensor.name.rpartition(".")[0],
                tensor.layer,
                tensor.kind,
                tensor.specs,
                entry.type,
                padded(entry.nbytes),
            )


def _folder_lines(plan: Plan) -> Iterator[_Line]:
    for entry in plan.entries:
        spec = entry.spec
        if not spec.keep and not spec.is_prediction:
            fused = consumers.fused_module(spec, plan.targets) or spec.module
            key = f"{spec.parent.rpartition('.')[0]}" if spec.expert is not None else fused
            nbytes = sum(output.nbytes + _said(output) for output in entry.outputs)
            yield _Line(key, spec.layer, spec.role, (spec,), entry.scheme, nbytes)


def _said(output: Output) -> int:
    """About how many bytes of a shard's header name an output: offsets have 8 digits or so."""
    said = {"dtype": output.dtype, "shape": output.shape, "data_offsets": [10**8, 10**8]}
    return len(json.dumps({output.name: said}, separators=(",", ":")))
