"""What each consumer takes: which schemes of which models, split over how many GPUs, and the modules that it fuses.

`ROWS` (rules.py) says which rule a consumer has for which scheme; a scheme without a row is refused. Read from vLLM
0.33.0, SGLang 0.5.23 and transformers 5.23.0, as the rules are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.spec import TensorSpec
from dsv2quant.errors import InputError, UsageError
from dsv2quant.formats.int4 import PER_WORD
from dsv2quant.formats.schemes import CODECS, UNQUANTIZED
from dsv2quant.planning.rules import ROWS, Refusal, is_joined, marlin_experts

ENGINES = ("vllm", "sglang")
TARGETS = (*ENGINES, "transformers")

# Which targets take a scheme in part, other tensors in another: they are targets only where they are asked for.
_IN_PART = {("transformers", "int8-channel")}
_3D = "keeps routed experts in 3-D parameters, and this layout is loaded into Linear modules alone"
# Why a target has no row for a quant method, a scheme or a kind of scheme.
_NEVER = {
    # integrations/finegrained_fp8.py
    ("transformers", "fp8-autofp8"): "knows `weight_scale_inv` alone, and takes AutoFP8's codes for weights",
    # schemes/compressed_tensors_wNa16_moe.py and compressed_tensors_wNa16.py, WNA16_SUPPORTED_BITS
    **{("sglang", family): "loads packed integers of 4 and 8 bits alone" for family in ("int3", "int2")},
}
# Why a target loads nothing of a quant method where a model has routed experts.
_NOT_EXPERTS = {
    # quantizer_gptq.py (optimum's convert_model) and integrations/awq.py; modeling_deepseek_v2.py, DeepseekV2Experts
    ("transformers", "gptq"): _3D,
    ("transformers", "awq"): _3D,
    # gptq/schemes/gptq_moe.py makes the experts' scales float16; fused_marlin_moe.py asserts that inputs are alike.
    ("sglang", "gptq"): "computes GPTQ experts in float16, in which DeepSeek-V2 overflows",
}
# Why a target loads no model of plain attention and a dense FFN in a scheme.
_NOT_DENSE = {
    # models/llama.py, load_weights: no layer of block FP8 has its names (0.5.16, run: it computes zeros; 0.5.23, read)
    ("sglang", "fp8-block"): "loads no block scales of a Llama: it looks for them as `weight_scale`",
}
# Why a target loads no quantized model of plain attention and routed experts: deepseek-moe-16b, and the language models
# of DeepSeek-VL2-tiny and DeepSeek-OCR.
_NOT_PLAIN_EXPERTS = {
    # models/deepseek.py, DeepseekMoE.pack_params and its call of fused_moe
    "sglang": "computes the experts of models without latent attention from plain weights alone",
    "transformers": "has no class for experts beside plain attention",
}


@dataclass(frozen=True)
class Parallel:
    """How vLLM and SGLang split a model: each matrix over `tp` GPUs, or, where `ep` is above 1, all but routed experts,
    which are dealt out whole to `ep` GPUs (vLLM fused_moe/config.py, FusedMoEParallelConfig.make: ep is tp times the
    data-parallel size)."""

    tp: int = 1
    ep: int = 1

    @property
    def experts_over(self) -> int:
        """The number of GPUs over which a routed expert is split."""
        return 1 if self.ep > 1 else self.tp

    def over(self, spec: TensorSpec) -> int:
        """The number of GPUs over which a tensor is split, if its role is split at all."""
        gpus = self.experts_over if spec.expert is not None else self.tp
        return min(gpus, spec.parts or gpus)

    def __str__(self) -> str:
        """'' for one GPU, else ' at tensor-parallel size 8 and expert-parallel size 8'."""
        sizes = {"tensor": self.tp, "expert": self.ep}
        said = " and ".join(f"{kind}-parallel size {size}" for kind, size in sizes.items() if size > 1)
        return f" at {said}" * bool(said)


def choose(
    asked: Sequence[str] | None, schemes: Iterable[str], config: ModelConfig, routed: Iterable[str] = ()
) -> tuple[str, ...]:
    """The targets asked for, in order; for None, all that load artifacts of these schemes of such a model, and not in
    part alone. `routed` are the schemes of routed experts.

    Raises UsageError where one asked for can't, where none does, and for an unknown scheme.
    """
    used = sorted({*schemes} - UNQUANTIZED)
    if unknown := [scheme for scheme in used if scheme not in CODECS]:
        raise UsageError(f"unknown scheme {unknown[0]}", fix=f"schemes: {', '.join(CODECS)}")
    experts = sorted({*routed} - UNQUANTIZED)
    errors = {target: _refused(target, used, experts, config) for target in TARGETS}
    if asked is not None:
        for error in (errors[target] for target in asked):
            if error is not None:
                raise error
        return tuple(target for target in TARGETS if target in asked)
    partly = {target for target, scheme in _IN_PART if scheme in used}
    loading = tuple(target for target in TARGETS if errors[target] is None and target not in partly)
    if not loading and (error := errors["vllm"]) is not None:
        raise error
    return loading


def _refused(target: str, schemes: Sequence[str], routed: Sequence[str], config: ModelConfig) -> UsageError | None:
    """Why a target loads no artifact of these schemes of such a model; None where it does."""
    for scheme in schemes:
        layout, family = str(CODECS[scheme].quant_method), scheme.partition("-")[0]
        reasons = {name: _NEVER.get((target, name)) for name in (scheme, family, layout)}
        fix = "take --int4, or --target vllm" if reasons[family] else "compressed-tensors loads in every target"
        if config.n_routed_experts:
            reasons[layout] = reasons[layout] or _NOT_EXPERTS.get((target, layout))
        for name, reason in reasons.items():
            if reason is not None:
                return UsageError(f"no {name} for --target {target}: it {reason}", fix=fix)
        if not config.is_mla and not config.n_routed_experts and (target, scheme) in _NOT_DENSE:
            reason = _NOT_DENSE[target, scheme]
            return UsageError(f"no {scheme} for --target {target}: it {reason}", fix="take --fp8=channel")
        if scheme not in ROWS[target]:
            known = ", ".join(other for other in TARGETS if scheme in ROWS[other])
            return UsageError(f"{target}: no rule for scheme {scheme}", fix=f"it is made for {known or 'no consumer'}")
    if target == "transformers" and len(routed) > 1:
        # integrations/compressed_tensors.py, get_experts_scheme, takes the first that it finds for those of all layers.
        what = f"--target transformers: it reads all routed experts in one scheme, not in {' and '.join(routed)}"
        return UsageError(what, fix="take --target vllm, or one scheme for all")
    if schemes and config.n_routed_experts and not config.is_mla and target in _NOT_PLAIN_EXPERTS:
        return UsageError(f"--target {target}: it {_NOT_PLAIN_EXPERTS[target]}", fix="take --target vllm")
    return None


def refusal(spec: TensorSpec, scheme: str, targets: Iterable[str], parallel: Parallel) -> Refusal | None:
    """The first rule of `targets` that forbids `scheme` for this tensor, or None."""
    if scheme in UNQUANTIZED:
        return None
    if spec.keep:
        return Refusal(f"no consumer loads a quantized {spec.role}")
    why = CODECS[scheme].refusal(spec.shape)
    if why is not None:
        return Refusal(why, CODECS[scheme].finer)
    for target in targets:
        rule = ROWS[target].get(scheme)
        if rule is None:
            return Refusal(f"{target}: no rule for scheme {scheme}")
        found = rule(spec, scheme, target, parallel.over(spec))
        if found is not None:
            return found
    return None


def check_unquantized(schemes: Mapping[TensorSpec, str], targets: Iterable[str], parallel: Parallel) -> None:
    """Raise InputError where a target can't load what an artifact of these schemes leaves in BF16."""
    used = {CODECS[scheme].quant_method: scheme for scheme in schemes.values() if scheme not in UNQUANTIZED}
    for spec in (spec for spec, scheme in schemes.items() if scheme == "bf16" and not spec.keep):
        # auto_gptq.py: experts that Marlin can't take become MoeWNA16Method before `dynamic` is looked at.
        if "gptq" in used and "vllm" in targets and spec.expert is not None:
            found = marlin_experts(spec, used["gptq"], "vllm", parallel.over(spec), PER_WORD)
            if found is not None:
                what = f"{found.reason}, and GPTQ experts of such a width can't stay in BF16"
                raise InputError(what, where=spec.module, fix="take a smaller group size, or compressed-tensors")
        # deepseek_weight_loader.py concatenates q_a and kv_a along AWQ's output dimension, in whatever scheme they are.
        if "awq" in used and "sglang" in targets and spec.role == "q_a_proj" and not spec.is_prediction:
            what = "sglang: an AWQ artifact has no q_a_proj and kv_a_proj_with_mqa in BF16"
            raise InputError(what, where=spec.module, fix="take --int4=pure, or --target vllm alone")
        # optimum's gptq/quantizer.py, convert_model, replaces every linear of a layer, whatever `dynamic` says.
        if "gptq" in used and "transformers" in targets:
            what = "transformers: a GPTQ artifact has no linear of a layer in BF16"
            raise InputError(what, where=spec.module, fix="take --int4=pure, compressed-tensors, or --target vllm")


def check_nameless(schemes: Mapping[TensorSpec, str], targets: Iterable[str], config: ModelConfig) -> None:
    """Raise InputError where vLLM can't tell what scheme attention has: beside experts it makes plain attention's
    modules without a prefix (deepseek_v2.py, DeepseekAttention), and so in one scheme, never in BF16."""
    if "vllm" not in targets or config.is_mla or not config.n_routed_experts:
        return
    found = {s for spec, s in schemes.items() if spec.parent.endswith(".self_attn") and not spec.keep}
    if {*schemes.values()} - UNQUANTIZED and (len(found) > 1 or found & UNQUANTIZED):
        what = f"vllm: attention is in {' and '.join(sorted(found))}, and it has no names there to find that by"
        fix = "give q_proj, k_proj, v_proj and o_proj of all layers one scheme, as --fp8 and --int4=pure do"
        raise InputError(what, fix=fix)


def fused_module(spec: TensorSpec, targets: Iterable[str]) -> str | None:
    """The module that a consumer fuses this tensor into; its members must share a scheme. None: fused into nothing.

    The engines make one matrix of linears with one input; every consumer stacks a layer's routed experts.
    """
    if spec.fused_as is None:
        return None
    if spec.expert is not None:
        return spec.fused_as.names[0].rpartition(".")[0]
    return spec.fused_as.names[0] if set(targets) & set(ENGINES) else None


def scale_group(spec: TensorSpec, targets: Iterable[str]) -> str | None:
    """The group of tensors that must share one scale where the scheme has one per tensor; None: a scale of its own.

    A fused matrix has one scale in the engines; with several they requantize to the largest. Of routed experts, each
    expert's gate and up are one matrix.
    """
    if spec.expert is None:
        return fused_module(spec, targets)
    return spec.parent if is_joined(spec) and set(targets) & set(ENGINES) else None


def input_group(spec: TensorSpec, targets: Iterable[str]) -> str:
    """The group of tensors that must share one static input scale; alone, the tensor's own name.

    A fused matrix has one input. Over a layer's routed experts the engines take the largest, of gate and up as of down
    (vLLM fp8_utils.py, process_fp8_input_tensor_strategy_moe; SGLang fp8.py, compressed_tensors_w8a8_fp8_moe.py), and
    refuse an expert whose gate and up differ.
    """
    if spec.expert is not None and spec.fused_as is not None:
        return spec.fused_as.names[0]
    return fused_module(spec, targets) or spec.name


def check_parallel(config: ModelConfig, parallel: Parallel, targets: Iterable[str]) -> None:
    """Raise UsageError where the engines can't split the model so at all."""
    tp, ep, experts = parallel.tp, parallel.ep, config.n_routed_experts
    widths = {"num_attention_heads": config.num_attention_heads}
    if experts and ep == 1:
        widths["moe_intermediate_size"] = config.moe_intermediate_size
    elif config.n_shared_experts:
        widths["the shared experts' width"] = config.n_shared_experts * config.moe_intermediate_size
    if any(not config.is_moe(layer) for layer in range(config.num_hidden_layers)):
        widths["intermediate_size"] = config.intermediate_size
    for key, value in widths.items():
        if tp < 1 or value % tp:
            raise UsageError(f"--tp {tp} does not divide {key}, {value}", fix="give a tensor-parallel size that does")
    # QKVParallelLinear: GPUs beyond the heads of keys and values have the same ones.
    if config.num_key_value_heads % tp and tp % config.num_key_value_heads:
        what = f"--tp {tp} neither divides num_key_value_heads, {config.num_key_value_heads}, nor is a multiple of it"
        raise UsageError(what, fix="give a tensor-parallel size that is")
    if ep < 1 or (ep > 1 and ep % tp):
        raise UsageError(
            f"--ep {ep} is no multiple of --tp {tp}: experts are spread over all GPUs of an engine",
            fix="give the number of GPUs",
        )
    # vLLM expert_map_manager.py, determine_expert_map, gives some GPUs one more; SGLang fused_moe_triton/layer.py
    # asserts that all have as many.
    if ep > 1 and (ep > experts or ("sglang" in targets and experts % ep)):
        raise UsageError(f"--ep {ep} does not divide {experts} routed experts", fix="give fewer GPUs, or --ep 1")
