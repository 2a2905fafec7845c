"""`quantization_config` of config.json: what vLLM, SGLang and transformers read to find each module's scheme.

What a scheme says there is its codec's (`Codec.declared`): of compressed-tensors a group of `config_groups`, of the
other quant methods the whole, which names the unquantized modules in its own way.
Consumers match the names of *fused* modules too, so these are listed beside their members. Neither engine looks for the
router in GPTQ's and AWQ's lists.

And compressed-tensors' as others write it: what of it is read, and what it says of a weight. The keys are those of
compressed-tensors 0.20 (quantization/quant_config.py, quant_scheme.py, quant_args.py) and, where it has dropped them,
of its predecessors. Whatever changes what stored numbers mean, and is not known here, is refused by name: read without
it, a checkpoint would be another model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv2quant.arch.multimodal import ROOTS, Names
from dsv2quant.arch.spec import LINEAR_ROLES, TensorSpec
from dsv2quant.formats.codec import Codec, eight_bits
from dsv2quant.formats.int4 import GROUP_INDEX, ZERO_POINT
from dsv2quant.formats.schemes import CODECS, UNQUANTIZED
from dsv2quant.storage.safetensors import Part

_FORMATS = ("pack-quantized", "float-quantized", "int-quantized")  # the first that is there names the whole


@dataclass(frozen=True)
class Within:
    """A language model within a multimodal one: how the checkpoint spells its names, and the modules of all else that
    hold a matrix."""

    names: Names
    others: tuple[str, ...]


def one_method(schemes: Iterable[str]) -> set[str]:
    """The quant method of an artifact with these schemes; empty where all are BF16. Raises ValueError where they have
    several: for `fp8`, with one weight layout and one activation scheme for all modules, schemes count."""
    used = {s: CODECS[s].quant_method for s in schemes if s not in UNQUANTIZED}
    methods = {s if method == "fp8" else str(method) for s, method in used.items()}
    if len(methods) > 1:
        what = f"mixes the quant methods {' and '.join(sorted(methods))}: an artifact has one"
        if methods & {"gptq", "awq"}:
            what += "; take --int4=pure or --int4=experts, or --format compressed-tensors"
        raise ValueError(what)
    return methods


def quantization_config(
    schemes: Mapping[TensorSpec, str], kv_scales: bool = False, within: Within | None = None
) -> dict[str, Any] | None:
    """The configuration of a model whose tensors have these schemes; None where nothing is quantized. `kv_scales`
    declares KV-cache scales where the quant method has a word for them.

    `within` a multimodal model the others are listed as unquantized, under the names that they have, and so are the
    language model's own in the layouts whose lists are of plain names. compressed-tensors has patterns, which find its
    modules under the name that each consumer gives them: vLLM maps plain names alone to its own.

    Raises ValueError, with what to do, where the schemes don't go together: an artifact has one quant method, and one
    group size in GPTQ's and AWQ's layouts.
    """
    methods = one_method(schemes.values())
    if not methods:
        return None
    ignored = _ignored_modules(schemes)
    if methods != {"compressed-tensors"}:
        if within is not None:
            ignored = [*map(within.names.stored, ignored), *within.others]
        used = sorted({*schemes.values()} - UNQUANTIZED)
        if len(used) > 1:
            raise ValueError(f"mixes {' and '.join(used)}: in these layouts an artifact has one group size")
        codec = CODECS[used[0]]
        words = {"kv_cache_scheme": "static"} if kv_scales and codec.activation == "static" else {}
        return codec.declared(ignored) | words
    if within is not None:
        ignored = [*(f"re:{_anywhere(name)}$" for name in ignored), *within.others]
    groups = _config_groups(schemes, is_whole=within is None)
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        # Each group names its own. compressed-tensors would say "mixed-precision" here, but SGLang reads this key for
        # experts in INT4, and takes only "pack-quantized" (compressed_tensors_wNa16_moe.py).
        "format": next(layout for layout in _FORMATS if layout in formats),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
    } | ({"kv_cache_scheme": eight_bits("float", "tensor", dynamic=False)} if kv_scales else {})


def kv_scale_parts(quantization: Mapping[str, Any] | None) -> tuple[Part, ...]:
    """The KV-cache scales of one layer, `model.layers.N.self_attn.<suffix>`, that a configuration declares: none,
    or k_scale and v_scale, shaped as the weights' scales are. Dynamic schemes store none."""
    scheme = (quantization or {}).get("kv_cache_scheme")
    if scheme == "static":
        shape: tuple[int, ...] = ()
    elif isinstance(scheme, Mapping) and scheme.get("strategy") == "tensor" and not scheme.get("dynamic"):
        shape = (1,)
    else:
        return ()
    return Part("k_scale", "F32", shape), Part("v_scale", "F32", shape)


def _ignored_modules(schemes: Mapping[TensorSpec, str]) -> list[str]:
    """Every unquantized module that holds a matrix, with its fused aliases; experts by their stack's name alone."""
    names: dict[str, None] = {}
    for spec, scheme in schemes.items():
        if scheme in UNQUANTIZED and spec.role not in ("embed", "norm", "bias", "router_bias"):
            aliases = () if spec.fused_as is None else spec.fused_as.names
            if spec.expert is not None:
                aliases = (spec.parent.rpartition(".")[0],)
            members = (*aliases, spec.module)
            names |= dict.fromkeys((*members, *(map(_in_nextn, members) if spec.is_prediction else ())))
    return list(names)


def _anywhere(name: str) -> str:
    """A pattern for a module, given its published name, in any model that a program builds around this one."""
    body = name.removeprefix("model.")
    return f"{ROOTS}{'*' if body == name else '+'}{re.escape(body)}"


def _in_nextn(name: str) -> str:
    """SGLang's name of a module of a layer for multi-token prediction, which is a model of its own there
    (deepseek_nextn.py): its decoder layer is `model.decoder`, and what is around that is `model`'s."""
    return re.sub(
        r"^model\.layers\.\d+\.((self_attn|mlp)\.)?", lambda at: f"model.decoder.{at[1]}" if at[1] else "model.", name
    )


def _config_groups(schemes: Mapping[TensorSpec, str], *, is_whole: bool) -> dict[str, Any]:
    """One group per scheme. With one scheme the target is every `Linear`; with several, or where the model is not the
    whole, each role is spelled out.

    SGLang looks at class names before it unfuses, so "Linear" beside another group would swallow fused modules.
    transformers takes the first group with "experts" in a pattern for the routed experts, and the first without for
    everything else: the group of the routed experts comes first, and no other pattern spells the word.
    """
    used = {*schemes.values()} - UNQUANTIZED
    if len(used) == 1 and is_whole:
        return {"group_0": {"targets": ["Linear"], **CODECS[used.pop()].declared()}}
    routed = {s for spec, s in schemes.items() if s not in UNQUANTIZED and spec.expert is not None}
    root = r"model\." if is_whole else f"{ROOTS}+"
    return {
        f"group_{i}": {"targets": _targets(schemes, scheme, root), **CODECS[scheme].declared()}
        for i, scheme in enumerate(sorted(used, key=lambda s: (s not in routed, s)))
    }


def _targets(schemes: Mapping[TensorSpec, str], scheme: str, root: str) -> list[str]:
    """Regular expressions for the modules of one scheme: one per role, naming layers only where it must. `root` is for
    what stands before `layers`."""
    patterns = []
    for role in LINEAR_ROLES:
        everywhere = {spec.layer: spec for spec in schemes if spec.role == role}
        layers = [layer for layer, spec in everywhere.items() if schemes[spec] == scheme]
        if layers:
            at = r"\d+" if len(layers) == len(everywhere) else f"({'|'.join(map(str, layers))})"
            parent = rf"layers\.{at}"
            if any(everywhere[layer].is_prediction for layer in layers):
                parent = rf"({parent}|decoder)"  # as SGLang calls the layer for multi-token prediction
            patterns.append(rf"re:{root}{parent}\.{_module_pattern(everywhere[layers[0]])}$")
    return patterns


def _module_pattern(spec: TensorSpec) -> str:
    """A module in its layer, under its own name and its fused module's."""
    parent, _, leaf = spec.module.removeprefix(f"model.layers.{spec.layer}.").rpartition(".")
    parent = parent.replace(".", r"\.")
    if spec.expert is not None:
        return rf"{parent.removesuffix(str(spec.expert))}\d+\.{leaf}"
    parent = parent.replace("experts", r"\w+")
    names = (leaf, *(name.rpartition(".")[2] for name in (spec.fused_as.names if spec.fused_as else ())))
    return rf"{parent}\.({'|'.join(names)})"


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
        size = codec.integers.group_size
        alike = [group for group in mine if is_int4(group["weights"]) and group_size(group["weights"]) == size]
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
    targets = group.get("targets")
    texts = [target for target in targets if isinstance(target, str)] if isinstance(targets, list) else []
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
_UNUSED = ("sparsity_config", "transform_config", "moe_sparsity_config")  # whole features


def unread(config: Mapping[str, Any]) -> str | None:
    """What of this configuration is not read; None where all is."""
    return next(_refusals(config), None)


def contradiction(config: Mapping[str, Any], columns: int, groups: int, suffixes: Mapping[str, object]) -> str | None:
    """Where the INT4 weight that has these parts, of so many columns in so many groups, is not what the configuration
    declares; None where it is. The configuration is one of which `unread` finds nothing."""
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
