"""What a checkpoint's `quantization_config` says, be it of others: whether all of it is read, which codecs its weights
may have, and what it contradicts.

The keys are those of compressed-tensors 0.20 (quantization/quant_config.py, quant_scheme.py, quant_args.py) and, where
it has dropped them, of its predecessors. Whatever changes what stored numbers mean, and is not known here, is refused
by name: read without it, a checkpoint would be another model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dsv2quant.formats.codec import Codec
from dsv2quant.formats.int4 import GROUP_INDEX, ZERO_POINT
from dsv2quant.formats.schemes import CODECS


def activations_quantized(config: Mapping[str, Any] | None) -> bool:
    """Whether a consumer quantizes activations: always for `fp8`; in compressed-tensors where a group says so."""
    if config is None:
        return False
    if config.get("quant_method") == "fp8":
        return True
    return any(group.get("input_activations") for group in _groups(config))


def readable_codecs(config: Mapping[str, Any] | None) -> Callable[[str], list[Codec]]:
    """The codecs whose layouts a module may have in a checkpoint of this configuration, static ones before fp8-tensor,
    which has their parts but one. Whether that one must be there is for the configuration to say, and whether INT4 of
    the same parts is served with quantized inputs: of compressed-tensors the group that names the module, or its
    class."""
    inputs = _inputs_of_tensor_scales(config or {})
    groups = [group for group in _groups(config or {}) if isinstance(group.get("weights"), Mapping)]

    def readable(codec: Codec, mine: Sequence[Mapping[str, Any]]) -> bool:
        if codec.integers is None or codec.quant_method != "compressed-tensors":
            return True in inputs if codec.activation == "static" else codec.name != "fp8-tensor" or inputs != {True}
        kind = codec.integers.bits, codec.integers.group_size
        alike = [group for group in mine if (packed_bits(group["weights"]), group_size(group["weights"])) == kind]
        served = {bool(group.get("input_activations")) for group in alike} or {False}
        return (codec.activation is not None) in served

    def of_module(module: str) -> list[Codec]:
        mine = [group for group in groups if _names(group, module)] or groups
        return [codec for codec in every if readable(codec, mine)]

    every = [codec for codec in CODECS.values() if readable(codec, groups)]
    served = any(codec.integers and codec.activation for codec in every)
    return of_module if served and len(groups) > 1 else lambda module: every  # else none needs the module's name


def _names(group: Mapping[str, Any], module: str) -> bool:
    """Whether a group's targets name a module, and not its class alone (compressed-tensors, utils/match.py)."""
    texts = _texts(group, "targets")
    return any(re.match(text[3:], module) if text.startswith("re:") else text == module for text in texts)


def _inputs_of_tensor_scales(config: Mapping[str, Any]) -> set[bool]:
    """Whether the inputs of weights with one scale per tensor are static: True, False, both or neither."""
    if config.get("quant_method") == "fp8":
        return {config.get("activation_scheme") == "static"}
    static = set()
    for group in _groups(config):
        weights, inputs = group.get("weights"), group.get("input_activations")
        if isinstance(weights, Mapping) and weights.get("strategy") == "tensor":
            static.add(isinstance(inputs, Mapping) and not inputs.get("dynamic"))
    return static


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = config.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


GROUP_SIZES = (32, 64, 128)
_READ_FORMATS = (
    "pack-quantized", "float-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense", None,
)  # fmt: skip
# By type and bits: the strategies of weights, and how they may be stored.
_WEIGHTS: dict[str, dict[int, tuple[str, ...]]] = {
    "int": {2: ("group",), 3: ("group",), 4: ("group", "channel"), 8: ("channel",)},
    "float": {8: ("channel", "tensor")},
}
_FORMATS_OF = {
    **dict.fromkeys((("int", 2), ("int", 3), ("int", 4)), ("pack-quantized",)),
    ("int", 8): ("int-quantized", "naive-quantized"),
    ("float", 8): ("float-quantized", "naive-quantized"),
}
_ARGS = frozenset({
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
    "scale_dtype", "zp_dtype", "observer", "observer_kwargs", "is_mx",
})  # fmt: skip
_SCHEME = frozenset({"targets", "weights", "input_activations", "output_activations", "format"})
_UNUSED = ("sparsity_config", "transform_config", "moe_sparsity_config")  # whole features


def unread(config: Mapping[str, Any]) -> str | None:
    """What of this configuration is not read; None where all is."""
    return next(_refusals(config), None)


def contradiction(
    config: Mapping[str, Any], bits: int, columns: int, groups: int, suffixes: Mapping[str, object]
) -> str | None:
    """Where the packed weight that has these parts, codes of so many bits and so many columns in so many groups, is not
    what the configuration declares; None where it is. The configuration is one of which `unread` finds nothing."""
    declared = [
        weights
        for weights in (group["weights"] for group in config["config_groups"].values())
        if packed_bits(weights) == bits and columns == groups * (group_size(weights) or columns)
    ]
    if not declared:
        what = f"{groups} groups of {columns // groups} columns in INT{bits}"
        return f"has {what}, which no group of quantization_config declares"
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


def left_out(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a configuration lists a module among those that are not quantized: by its whole name, which may have
    another root, or in compressed-tensors by a pattern (utils/match.py). It is one of which `unread` finds nothing."""
    listed = [text for key in ("ignore", "ignored_layers", "modules_to_not_convert") for text in _texts(config, key)]
    names = {name[max(name.find("model.layers."), 0) :] for name in listed}
    patterns = [re.compile(text[3:]) for text in _texts(config, "ignore") if text.startswith("re:")]
    return lambda module: module in names or any(pattern.match(module) for pattern in patterns)


def _texts(config: Mapping[str, Any], key: str) -> list[str]:
    found = config.get(key)
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def _refusals(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("format") not in _READ_FORMATS:
        yield f"format {config['format']!r}"
    for key in _UNUSED:
        # Of weights that are stored dense, sparsity is a remark.
        remark = isinstance(config.get(key), Mapping) and config[key].get("format") == "dense"
        if config.get(key) not in (None, {}) and not remark:
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
    for text in _texts(config, "ignore"):
        try:
            re.compile(text.removeprefix("re:") if text.startswith("re:") else "")
        except re.error:
            yield f"{text!r} in ignore, which is no pattern"
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
    bits = packed_bits(weights) or 8
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
    if bits < 8 and not (bits == 4 and plain and group_size(weights) == 128):  # as W4A8 has it
        yield f"input_activations of INT{bits} weights"
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
    if not isinstance(symmetric, bool) or not (symmetric or packed_bits(args)):
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


def packed_bits(args: Mapping[str, Any]) -> int | None:
    """The bits of integers that are packed: 2, 3 or 4; None for anything else."""
    bits = args.get("num_bits", 8)
    return bits if args.get("type", "int") == "int" and bits in (2, 3, 4) else None


def group_size(weights: Mapping[str, Any]) -> Any:
    """Columns of a group; None: all of a row."""
    return weights.get("group_size") if _strategy(weights) == "group" else None


def _actorder(args: Mapping[str, Any]) -> object:
    """'none', 'weight' (which leaves no trace in the file) or 'group'; anything else as it is."""
    asked = args.get("actorder")
    known: dict[object, str] = {None: "none", False: "none", True: "group", "static": "weight", "dynamic": "group"}
    return known.get(asked, asked) if isinstance(asked, (str, bool, type(None))) else asked
