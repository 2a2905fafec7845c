"""`quantization_config` of compressed-tensors as others write it: what of it is read, and what it says of a weight.

The keys are those of compressed-tensors 0.20 (quantization/quant_config.py, quant_scheme.py, quant_args.py) and, where
it has dropped them, of its predecessors. Whatever changes what stored numbers mean, and is not known here, is refused
by name: read without it, a checkpoint would be another model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsv2quant.formats.int4 import GROUP_INDEX, ZERO_POINT

GROUP_SIZES = (32, 64, 128)
_FORMATS = (
    "pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense", None,
)  # fmt: skip
# By type and bits: the strategies of weights, and how they may be stored.
_WEIGHTS: dict[str, dict[int, tuple[str, ...]]] = {
    "int": {4: ("group", "channel"), 8: ("channel",)},
    "float": {8: ("channel", "tensor")},
}
_FORMATS_OF = {
    ("int", 4): ("pack-quantized",),
    ("int", 8): ("int-quantized", "naive-quantized"),
    ("float", 8): ("float-quantized", "naive-quantized"),
}
_ARGS = frozenset({
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
    "scale_dtype", "zp_dtype", "observer", "observer_kwargs", "is_mx",
})  # fmt: skip
_SCHEME = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
# Whole features: of each, what says that it is not used.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
    "moe_sparsity_config": (None, {}),
}


def refusal(config: Mapping[str, Any]) -> str | None:
    """What of this configuration is not read; None where all is."""
    return next(_refusals(config), None)


def contradiction(config: Mapping[str, Any], columns: int, groups: int, suffixes: Mapping[str, object]) -> str | None:
    """Where the INT4 weight that has these parts, of so many columns in so many groups, is not what the configuration
    declares; None where it is. The configuration is one that `refusal` lets pass."""
    declared = [
        weights
        for weights in (group["weights"] for group in config["config_groups"].values())
        if is_int4(weights) and columns == groups * (group_size(weights) or columns)
    ]
    if not declared:
        return f"has {groups} groups of {columns // groups} columns, which no group of quantization_config declares"
    for part, said, have in (
        (ZERO_POINT, "symmetric: false", {not weights.get("symmetric", True) for weights in declared}),
        (GROUP_INDEX, "actorder: group", {_actorder(weights) == "group" for weights in declared}),
    ):
        if len(have) > 1:
            return f"may have {part} or not: quantization_config says {said} of one group alike, not of another"
        if part in suffixes and True not in have:
            return f"has {part}, but quantization_config does not say {said}"
        if part not in suffixes and False not in have:
            return f"has no {part}, but quantization_config says {said}"
    return None


def _refusals(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("format") not in _FORMATS:
        yield f"format {config['format']!r}"
    for key, unused in _UNUSED.items():
        # Of weights that are stored dense, sparsity is a remark.
        remark = isinstance(config.get(key), Mapping) and config[key].get("format") == "dense"
        if config.get(key) not in unused and not remark:
            yield key
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping):
        yield "no config_groups" if groups is None else "config_groups that are no object"
        return
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            yield f"{name} of config_groups, which names a preset"
        else:
            yield from (f"{what} in {name}" for what in _of_group(group, config.get("format")))
    cache = config.get("kv_cache_scheme")
    if cache is not None:
        yield from (f"{what} in kv_cache_scheme" for what in _of_args(cache, "float", {8: ("tensor",)}))


def _of_group(group: Mapping[str, Any], default: object) -> Iterator[str]:
    yield from (f"the key {key!r}" for key in sorted(group.keys() - _SCHEME))
    weights, inputs = group.get("weights"), group.get("input_activations")
    if group.get("output_activations"):
        yield "output_activations"
    if not isinstance(weights, Mapping):
        yield "no weights"
        return
    kind = weights.get("type", "int")
    ways = _WEIGHTS.get(str(kind))
    if ways is None:
        yield f"weights of type {kind!r}"
        return
    bits = 4 if is_int4(weights) else 8
    yield from (f"weights with {what}" for what in _of_args(weights, kind, ways))
    if weights.get("dynamic"):
        yield "dynamic weights"
    stored = group.get("format") or default
    if stored not in (*_FORMATS_OF[kind, bits], "mixed-precision", None):
        yield f"format {stored!r} of {kind} weights"
    size = group_size(weights)
    if kind == "int" and size is not None and size not in GROUP_SIZES:
        yield f"weights with group_size {size!r}"
    if _actorder(weights) == "group" and (kind != "int" or size is None):
        yield "actorder 'group' without groups"
    yield from _of_inputs(inputs, weights, kind, bits)


def _of_inputs(inputs: Any, weights: Mapping[str, Any], kind: str, bits: int) -> Iterator[str]:
    if inputs is None:
        if (kind, bits) == ("int", 8):
            yield "no input_activations of INT8 weights"
        return
    plain = weights.get("symmetric", True) and _actorder(weights) != "group"
    if bits == 4 and not (plain and group_size(weights) == 128):  # as W4A8 has it
        yield "input_activations of INT4 weights"
        return
    of = "int" if (kind, bits) == ("int", 8) else "float"
    strategies = ("token", "tensor") if _strategy(weights) == "tensor" else ("token",)
    yield from (f"input_activations with {what}" for what in _of_args(inputs, of, {8: strategies}))
    if isinstance(inputs, Mapping) and (_strategy(inputs) == "token") != bool(inputs.get("dynamic")):
        yield f"input_activations with strategy {_strategy(inputs)!r} and dynamic {inputs.get('dynamic')!r}"


def _of_args(args: object, kind: str, strategies: Mapping[int, tuple[str, ...]]) -> Iterator[str]:
    """What of the arguments of a quantization is not read, where the type is to be `kind` and each width of bits goes
    with some strategies."""
    if not isinstance(args, Mapping):
        yield f"the value {args!r}"
        return
    yield from (f"the key {key!r}" for key in sorted(args.keys() - _ARGS))
    bits = args.get("num_bits", 8)
    if args.get("type", "int") != kind:
        yield f"type {args.get('type', 'int')!r}"
    if type(bits) is not int or bits not in strategies:
        yield f"num_bits {bits!r}"
    elif _strategy(args) not in strategies[bits]:
        yield f"strategy {_strategy(args)!r}"
    if args.get("is_mx"):
        yield "is_mx"
    symmetric = args.get("symmetric", True)
    if not isinstance(symmetric, bool) or not (symmetric or is_int4(args)):
        yield f"symmetric {args['symmetric']!r}"
    if not isinstance(args.get("dynamic", False), bool):
        yield f"dynamic {args['dynamic']!r}"
    if _actorder(args) not in ("none", "weight", "group"):
        yield f"actorder {args['actorder']!r}"


def _strategy(args: Mapping[str, Any]) -> object:
    """The strategy, which compressed-tensors infers from the group size where it is not given."""
    size = args.get("group_size")
    inferred = "tensor" if size is None else "channel" if size == -1 else "group"
    return args.get("strategy") or inferred


def is_int4(args: Mapping[str, Any]) -> bool:
    """Whether these arguments are of integers of 4 bits."""
    return args.get("type", "int") == "int" and args.get("num_bits", 8) == 4


def group_size(weights: Mapping[str, Any]) -> Any:
    """Columns of a group; None: all of a row."""
    return weights.get("group_size") if _strategy(weights) == "group" else None


def _actorder(args: Mapping[str, Any]) -> object:
    """'none', 'weight' (which leaves no trace in the file) or 'group'; anything else as it is."""
    asked = args.get("actorder")
    known: dict[object, str] = {None: "none", False: "none", True: "group", "static": "weight", "dynamic": "group"}
    return known.get(asked, asked) if isinstance(asked, (str, bool, type(None))) else asked
