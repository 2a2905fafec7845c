"""`quantization_config` of config.json: what vLLM, SGLang and transformers read to find each module's scheme.

fp8-block is written as DeepSeek-V3 writes it, with the unquantized modules under both keys in use: `ignored_layers`
(vLLM, SGLang) and `modules_to_not_convert` (transformers). fp8-autofp8 is written as AutoFP8 writes it
(auto_fp8/modeling.py). The compressed-tensors schemes become `config_groups`.
Consumers match the names of *fused* modules too, so these are listed beside their members.

GPTQ and AWQ have one group size. What GPTQ leaves out are patterns of `dynamic`, matched from the start of a name as
GPTQModel has them (vLLM gptq_utils.py, SGLang quantization/utils.py); vLLM also looks which modules hold integers.
AWQ's `modules_to_not_convert` matches anywhere in a name, so that whole names are given: "mlp.gate" alone would also
be found in `mlp.gate_proj`. Both lists are of modules; neither engine looks for the router in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dsv2quant.arch.deepseek_v2 import LINEAR_ROLES, TensorSpec
from dsv2quant.formats.codec import Codec
from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.formats.fp8 import Fp8
from dsv2quant.formats.int4 import Int4
from dsv2quant.formats.schemes import CODECS
from dsv2quant.storage.safetensors import Part

# Names under which vLLM and SGLang know a fused module, by the roles of its members.
_FUSED_ALIASES = {
    "q_a_proj": ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
    "gate_proj": ("gate_up_proj",),
    "up_proj": ("gate_up_proj",),
}


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
    if methods <= {"gptq", "awq"}:
        return _transposed(schemes, ignored)
    if methods == {"fp8-autofp8"}:
        declared = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ignored}
        return declared | ({"kv_cache_scheme": "static"} if kv_scales else {})
    if methods == {"fp8-block"}:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "ignored_layers": ignored,
            "modules_to_not_convert": ignored,
        }
    groups = _config_groups(schemes)
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        # Each group names its own. compressed-tensors would say "mixed-precision" here, but SGLang reads this key for
        # experts in INT4, and takes only "pack-quantized" (compressed_tensors_wNa16_moe.py).
        "format": "pack-quantized" if "pack-quantized" in formats else "float-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
    } | ({"kv_cache_scheme": _float8("tensor", dynamic=False)} if kv_scales else {})


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


def _transposed(schemes: Mapping[TensorSpec, str], ignored: list[str]) -> dict[str, Any]:
    """The configuration of GPTQ's and AWQ's layouts, as AutoGPTQ, GPTQModel and AutoAWQ write it."""
    used = sorted({scheme for scheme in schemes.values() if scheme != "bf16"})
    if len(used) > 1:
        raise ValueError(f"mixes {' and '.join(used)}: in these layouts an artifact has one group size")
    codec = CODECS[used[0]]
    assert isinstance(codec, Int4)
    if codec.quant_method == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": codec.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ignored,
        }
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": codec.group_size or -1,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": {f"-:{re.escape(name)}$": {} for name in ignored},
    }


def _ignored_modules(schemes: Mapping[TensorSpec, str]) -> list[str]:
    """Every unquantized module that holds a matrix, with its fused aliases; experts by their stack's name alone."""
    names: dict[str, None] = {}
    for spec, scheme in schemes.items():
        if scheme != "bf16" or spec.role not in (*LINEAR_ROLES, "router", "lm_head", "score"):
            continue
        parent, _, leaf = spec.module.rpartition(".")
        if spec.role.startswith("routed."):
            names[f"model.layers.{spec.layer}.mlp.experts"] = None
        for alias in () if spec.role.startswith("routed.") else _FUSED_ALIASES.get(leaf, ()):
            names[f"{parent}.{alias}"] = None
        names[spec.module] = None
    return list(names)


def _config_groups(schemes: Mapping[TensorSpec, str]) -> dict[str, Any]:
    """One group per scheme. With one scheme the target is every `Linear`; with several, each role is spelled out.

    SGLang looks at class names before it unfuses, so "Linear" beside another group would swallow fused modules.
    transformers takes the first group with "experts" in a pattern for the routed experts, and the first without for
    everything else: the group of the routed experts comes first, and no other pattern spells the word.
    """
    used = {s for spec, s in schemes.items() if s != "bf16"}
    if len(used) == 1:
        return {"group_0": {"targets": ["Linear"], **_group(used.pop())}}
    routed = {s for spec, s in schemes.items() if s != "bf16" and spec.role.startswith("routed.")}
    return {
        f"group_{i}": {"targets": _targets(schemes, scheme), **_group(scheme)}
        for i, scheme in enumerate(sorted(used, key=lambda s: (s not in routed, s)))
    }


def _group(scheme: str) -> dict[str, Any]:
    codec = CODECS[scheme]
    if isinstance(codec, Int4):
        group = {"strategy": "group", "group_size": codec.group_size} if codec.group_size else {"strategy": "channel"}
        weights = {"num_bits": 4, "type": "int", **group, "symmetric": True, "dynamic": False}
        return {"weights": weights, "input_activations": None, "output_activations": None, "format": "pack-quantized"}
    assert isinstance(codec, Fp8)
    weights = _float8(codec.grid, dynamic=False)
    activations = _float8("tensor", dynamic=False) if codec.static else _float8("token", dynamic=True)
    return {
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": "float-quantized",
    }


def _float8(strategy: str, *, dynamic: bool) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": dynamic}


def _targets(schemes: Mapping[TensorSpec, str], scheme: str) -> list[str]:
    """Regular expressions for the modules of one scheme: one per role, naming layers only where it must."""
    patterns = []
    for role in LINEAR_ROLES:
        everywhere = {spec.layer: s for spec, s in schemes.items() if spec.role == role}
        layers = [layer for layer, s in everywhere.items() if s == scheme]
        if layers:
            at = r"\d+" if len(layers) == len(everywhere) else f"({'|'.join(map(str, layers))})"
            patterns.append(rf"re:model\.layers\.{at}\.{_module_pattern(role)}$")
    return patterns


def _module_pattern(role: str) -> str:
    ffn, _, leaf = role.rpartition(".")
    names = "|".join((leaf, *_FUSED_ALIASES.get(leaf, ())))
    if ffn == "routed":
        return rf"mlp\.experts\.\d+\.{leaf}"
    parent = {"": "self_attn", "dense": "mlp", "shared": r"mlp\.shared_\w+"}[ffn]
    return rf"{parent}\.({names})"


def activations_quantized(config: Mapping[str, Any] | None) -> bool:
    """Whether a consumer quantizes activations: always for `fp8`; in compressed-tensors where a group says so."""
    if config is None:
        return False
    if config.get("quant_method") == "fp8":
        return True
    return any(group.get("input_activations") for group in _groups(config))


def readable_codecs(config: Mapping[str, Any] | None) -> list[Codec]:
    """The codecs whose layouts a checkpoint of this configuration may hold, static ones before fp8-tensor, which has
    their parts but one. Whether that one must be there is for the configuration to say."""
    inputs = _inputs_of_tensor_scales(config or {})
    return [
        codec
        for codec in CODECS.values()
        if (True in inputs if codec.activation == "static" else codec.name != "fp8-tensor" or inputs != {True})
    ]


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
