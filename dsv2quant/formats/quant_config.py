"""`quantization_config` of config.json: what vLLM, SGLang and transformers read to find each module's scheme.

What a scheme says there is its codec's (`Codec.declared`): of compressed-tensors a group of `config_groups`, of the
other quant methods the whole, which names the unquantized modules in its own way.
Consumers match the names of *fused* modules too, so these are listed beside their members. Neither engine looks for the
router in GPTQ's and AWQ's lists.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dsv2quant.arch.spec import LINEAR_ROLES, TensorSpec
from dsv2quant.formats.codec import Codec, eight_bits
from dsv2quant.formats.compressed_tensors import group_size, is_int4
from dsv2quant.formats.schemes import CODECS
from dsv2quant.storage.safetensors import Part

_FORMATS = ("pack-quantized", "float-quantized", "int-quantized")  # the first that is there names the whole


def one_method(schemes: Iterable[str]) -> set[str]:
    """The quant method of an artifact with these schemes; empty where all are BF16. Raises ValueError where they have
    several: for `fp8`, with one weight layout and one activation scheme for all modules, schemes count."""
    used = {s: CODECS[s].quant_method for s in schemes if s != "bf16"}
    methods = {s if method == "fp8" else str(method) for s, method in used.items()}
    if len(methods) > 1:
        what = f"mixes the quant methods {' and '.join(sorted(methods))}: an artifact has one"
        if methods & {"gptq", "awq"}:
            what += "; take --int4=pure or --int4=experts, or --format compressed-tensors"
        raise ValueError(what)
    return methods


def quantization_config(schemes: Mapping[TensorSpec, str], kv_scales: bool = False) -> dict[str, Any] | None:
    """The configuration of a model whose tensors have these schemes; None where nothing is quantized. `kv_scales`
    declares KV-cache scales where the quant method has a word for them.

    Raises ValueError, with what to do, where the schemes don't go together: an artifact has one quant method, and one
    group size in GPTQ's and AWQ's layouts.
    """
    methods = one_method(schemes.values())
    if not methods:
        return None
    ignored = _ignored_modules(schemes)
    if methods != {"compressed-tensors"}:
        used = sorted({scheme for scheme in schemes.values() if scheme != "bf16"})
        if len(used) > 1:
            raise ValueError(f"mixes {' and '.join(used)}: in these layouts an artifact has one group size")
        codec = CODECS[used[0]]
        words = {"kv_cache_scheme": "static"} if kv_scales and codec.activation == "static" else {}
        return codec.declared(ignored) | words
    groups = _config_groups(schemes)
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
        if scheme == "bf16" and spec.role not in ("embed", "norm", "bias"):
            aliases = () if spec.fused_as is None else spec.fused_as.names
            if spec.expert is not None:
                aliases = (spec.parent.rpartition(".")[0],)
            names |= dict.fromkeys((*aliases, spec.module))
    return list(names)


def _config_groups(schemes: Mapping[TensorSpec, str]) -> dict[str, Any]:
    """One group per scheme. With one scheme the target is every `Linear`; with several, each role is spelled out.

    SGLang looks at class names before it unfuses, so "Linear" beside another group would swallow fused modules.
    transformers takes the first group with "experts" in a pattern for the routed experts, and the first without for
    everything else: the group of the routed experts comes first, and no other pattern spells the word.
    """
    used = {s for spec, s in schemes.items() if s != "bf16"}
    if len(used) == 1:
        return {"group_0": {"targets": ["Linear"], **CODECS[used.pop()].declared()}}
    routed = {s for spec, s in schemes.items() if s != "bf16" and spec.expert is not None}
    return {
        f"group_{i}": {"targets": _targets(schemes, scheme), **CODECS[scheme].declared()}
        for i, scheme in enumerate(sorted(used, key=lambda s: (s not in routed, s)))
    }


def _targets(schemes: Mapping[TensorSpec, str], scheme: str) -> list[str]:
    """Regular expressions for the modules of one scheme: one per role, naming layers only where it must."""
    patterns = []
    for role in LINEAR_ROLES:
        everywhere = {spec.layer: spec for spec in schemes if spec.role == role}
        layers = [layer for layer, spec in everywhere.items() if schemes[spec] == scheme]
        if layers:
            at = r"\d+" if len(layers) == len(everywhere) else f"({'|'.join(map(str, layers))})"
            patterns.append(rf"re:model\.layers\.{at}\.{_module_pattern(everywhere[layers[0]])}$")
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
