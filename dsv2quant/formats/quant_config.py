"""`quantization_config` of config.json: what vLLM, SGLang and transformers read to find each module's scheme.

What a scheme says there is its codec's (`Codec.declared`): of compressed-tensors a group of `config_groups`, of the
other quant methods the whole, which names the unquantized modules in its own way.
Consumers match the names of *fused* modules too, so these are listed beside their members. Neither engine looks for the
router in GPTQ's and AWQ's lists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv2quant.arch.multimodal import ROOTS, Names
from dsv2quant.arch.spec import LINEAR_ROLES, TensorSpec
from dsv2quant.formats.codec import eight_bits
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
    # vLLM deepseek_v2.py, DeepseekAttention: plain attention's modules have no name where there are experts.
    nameless = {s for spec, s in schemes.items() if spec.role == "k_proj"} if routed else set()
    return {
        f"group_{i}": {
            "targets": [*_targets(schemes, scheme, root), *(["re:$"] if scheme in nameless else [])],
            **CODECS[scheme].declared(),
        }
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
