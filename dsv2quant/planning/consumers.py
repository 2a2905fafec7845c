"""What each consumer takes: the rules that make a scheme fall back for a tensor, and the modules consumers fuse.

`ROWS` says which rule a consumer has for which scheme; a scheme without a row is refused.

Read from vLLM 0.33.0, SGLang 0.5.23 and transformers 5.23.0; the file of each rule stands beside it. `tp` is the number
of GPUs over which vLLM and SGLang split the tensor at hand; transformers loads whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.spec import TensorSpec
from dsv2quant.errors import InputError, UsageError
from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.formats.int4 import PER_WORD
from dsv2quant.formats.schemes import CODECS, UNQUANTIZED

ENGINES = ("vllm", "sglang")
TARGETS = (*ENGINES, "transformers")

# Which targets take a scheme in part, other tensors in another: they are targets only where they are asked for.
_IN_PART = {("transformers", "int8-channel")}
_3D = "keeps DeepSeek-V2's experts in 3-D parameters, and this layout is loaded into Linear modules alone"
# Why a target has no row for a quant method or scheme.
_NEVER = {
    # integrations/finegrained_fp8.py
    ("transformers", "fp8-autofp8"): "knows `weight_scale_inv` alone, and takes AutoFP8's codes for weights",
    # quantizer_gptq.py (optimum's convert_model) and integrations/awq.py; modeling_deepseek_v2.py, DeepseekV2Experts
    ("transformers", "gptq"): _3D,
    ("transformers", "awq"): _3D,
    # gptq/schemes/gptq_moe.py makes the experts' scales float16; fused_marlin_moe.py asserts that inputs are alike.
    ("sglang", "gptq"): "computes GPTQ experts in float16, in which DeepSeek-V2 overflows",
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
        return self.experts_over if spec.expert is not None else self.tp

    def __str__(self) -> str:
        """'' for one GPU, else ' at tensor-parallel size 8 and expert-parallel size 8'."""
        sizes = {"tensor": self.tp, "expert": self.ep}
        said = " and ".join(f"{kind}-parallel size {size}" for kind, size in sizes.items() if size > 1)
        return f" at {said}" * bool(said)


@dataclass(frozen=True)
class Refusal:
    """A rule that a scheme breaks for a tensor, and the scheme to try next."""

    reason: str
    instead: str = "bf16"


def choose(asked: Sequence[str] | None, schemes: Iterable[str]) -> tuple[str, ...]:
    """The targets asked for, in order; for None, all that load artifacts of these schemes, and not in part alone.

    Raises UsageError where one asked for can't, and for an unknown scheme.
    """
    used = sorted({*schemes} - UNQUANTIZED)
    if unknown := [scheme for scheme in used if scheme not in CODECS]:
        raise UsageError(f"unknown scheme {unknown[0]}", fix=f"schemes: {', '.join(CODECS)}")
    never = {target: scheme for target in TARGETS for scheme in used if scheme not in ROWS[target]}
    if asked is None:
        partly = {target for target, scheme in _IN_PART if scheme in used}
        return tuple(target for target in TARGETS if target not in never.keys() | partly)
    for target in asked:
        if target in never:
            raise _no_row(target, never[target])
    return tuple(target for target in TARGETS if target in asked)


def _no_row(target: str, scheme: str) -> UsageError:
    fix = "compressed-tensors loads in every target"
    for layout in (scheme, str(CODECS[scheme].quant_method)):
        if (target, layout) in _NEVER:
            return UsageError(f"no {layout} for --target {target}: it {_NEVER[target, layout]}", fix=fix)
    known = ", ".join(other for other in TARGETS if scheme in ROWS[other])
    return UsageError(f"{target}: no rule for scheme {scheme}", fix=f"it is made for {known}")


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
    """Raise InputError where a target can't load what a GPTQ or AWQ artifact leaves in BF16."""
    used = {CODECS[scheme].quant_method: scheme for scheme in schemes.values()}
    for spec in (spec for spec, scheme in schemes.items() if scheme == "bf16"):
        # auto_gptq.py: experts that Marlin can't take become MoeWNA16Method before `dynamic` is looked at.
        if "gptq" in used and "vllm" in targets and spec.expert is not None:
            found = _marlin_experts(spec, used["gptq"], "vllm", parallel.over(spec), PER_WORD)
            if found is not None:
                what = f"{found.reason}, and GPTQ experts of such a width can't stay in BF16"
                raise InputError(what, where=spec.module, fix="take a smaller group size, or compressed-tensors")
        # deepseek_weight_loader.py concatenates q_a and kv_a along AWQ's output dimension, in whatever scheme they are.
        if "awq" in used and "sglang" in targets and spec.role == "q_a_proj":
            what = "sglang: an AWQ artifact has no q_a_proj and kv_a_proj_with_mqa in BF16"
            raise InputError(what, where=spec.module, fix="take --int4=pure, or --target vllm alone")


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
    return spec.parent if _is_joined(spec) and set(targets) & set(ENGINES) else None


def input_group(spec: TensorSpec, targets: Iterable[str]) -> str:
    """The group of tensors that must share one static input scale; alone, the tensor's own name.

    A fused matrix has one input. Over a layer's routed experts the engines take the largest, of gate and up as of down
    (vLLM fp8_utils.py, process_fp8_input_tensor_strategy_moe; SGLang fp8.py, compressed_tensors_w8a8_fp8_moe.py), and
    refuse an expert whose gate and up differ.
    """
    if spec.expert is not None and spec.fused_as is not None:
        return spec.fused_as.names[0]
    return fused_module(spec, targets) or spec.name


def _is_joined(spec: TensorSpec) -> bool:
    """Whether engines make one matrix of it and others."""
    return spec.fused_as is not None and spec.fused_as.rows > spec.shape[0]


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
    if ep < 1 or (ep > 1 and ep % tp):
        raise UsageError(
            f"--ep {ep} is no multiple of --tp {tp}: experts are spread over all GPUs of an engine",
            fix="give the number of GPUs",
        )
    # vLLM expert_map_manager.py, determine_expert_map, gives some GPUs one more; SGLang fused_moe_triton/layer.py
    # asserts that all have as many.
    if ep > 1 and (ep > experts or ("sglang" in targets and experts % ep)):
        raise UsageError(f"--ep {ep} does not divide {experts} routed experts", fix="give fewer GPUs, or --ep 1")


def _refined_block(width: int, hidden: int) -> int:
    """What the experts' share must be a multiple of in block FP8 for vLLM 0.30 and newer.

    Where the share holds no whole blocks, it repeats the scales for blocks of 64 or 32 (fused_moe/oracle/fp8.py,
    refine_fp8_moe_block_shape). It counts them by whole blocks of the unsplit matrix, so that none may be ragged
    (routed_experts.py, _load_w13).
    """
    return BLOCK if width % BLOCK or hidden % BLOCK else BLOCK // 4


Rule = Callable[[TensorSpec, str, str, int], Refusal | None]  # tensor, scheme, target, GPUs


def _group(scheme: str) -> int | None:
    """Columns that share a scale in an INT4 scheme; None for whole rows."""
    return integers.group_size if (integers := CODECS[scheme].integers) else None


def _expert(spec: TensorSpec) -> tuple[int, int]:
    """(width, hidden size) of a routed expert."""
    rows, cols = spec.shape
    return (rows, cols) if spec.parallel == "rows" else (cols, rows)


def _any(spec: TensorSpec, scheme: str, target: str, tp: int) -> Refusal | None:
    """Every tensor of every shape."""
    return None


def _all(*rules: Rule) -> Rule:
    """The first refusal of several rules."""
    return lambda *asked: next((found for rule in rules if (found := rule(*asked)) is not None), None)


def _refuses(role: str, why: str, instead: str = "bf16") -> Rule:
    """The refusal of roles that begin so, whatever their shape."""
    return lambda spec, scheme, target, tp: Refusal(f"{target}: {why}", instead) if spec.role.startswith(role) else None


# vLLM issue 43888; SGLang deepseek_weight_loader.py, post_load_weights
_plain_kv_b = _refuses("kv_b_proj", "attention reads kv_b_proj as a plain matrix")
# quant_utils.py, get_and_maybe_dequant_weights: MLA gets kv_b's values from the layer's output for an identity. A
# dynamic scale takes it exactly: the largest value of its rows, 1, is the largest code.
_static_kv_b = _refuses(
    "kv_b_proj", "attention reads kv_b_proj through an identity matrix, which a static input scale would round or clip"
)
# compressed_tensors_moe_w8a8_fp8.py, compressed_tensors_w8a8_fp8_moe.py: experts take tensor weights with tensor
# activations, or channel weights with token activations, and assert on anything else.
_tensor_experts = _refuses(
    "routed.", "routed experts with per-token activations need per-channel scales", "fp8-channel"
)
# integrations/compressed_tensors.py, CompressedTensorsDequantize: of experts it takes FP8, and what is packed; of INT8
# it finds none, and loading fails.
_no_int8_experts = _refuses("routed.", "its loader finds no routed experts in INT8", "fp8-channel")


def _unmerged(spec: TensorSpec, scheme: str, target: str, tp: int) -> Refusal | None:
    # deepseek_weight_loader.py concatenates two [1] scales to [2] and then asserts the parameter's shape, [1]. Those
    # of gate and up, which are split, are merged.
    if spec.parallel is not None or not _is_joined(spec):
        return None
    return Refusal(f"{target}: q_a_proj and kv_a_proj_with_mqa are fused without merging scales", "fp8-channel")


def _blocks(spec: TensorSpec, scheme: str, target: str, tp: int) -> Refusal | None:
    # validate_fp8_block_shape, validate_fp8_block_shape_moe (vLLM fp8_utils.py; SGLang fp8_utils.py, fp8.py)
    rows, cols = spec.shape
    if spec.expert is not None:
        width, hidden = _expert(spec)
        unit = _refined_block(width, hidden) if target == "vllm" else BLOCK
        return _multiple(target, "the experts' width", width, tp, unit)
    if tp > 1 and spec.parallel == "rows":
        return _multiple(target, "rows", rows, tp)
    if tp > 1 and spec.parallel == "columns":
        return _multiple(target, "columns", cols, tp)
    if spec.fused_as is not None and not spec.fused_as.is_last:
        return _multiple(target, "rows of a fused matrix's member", rows, 1)
    return None


def _whole_blocks(spec: TensorSpec, scheme: str, target: str, tp: int) -> Refusal | None:
    # finegrained_fp8.py, Fp8Dequantize._dequantize_one takes the block to be rows // scale rows: a ragged dimension
    # fails to load, or loads wrong where the division happens to be exact.
    ragged = [dim for dim in spec.shape if dim > BLOCK and dim % BLOCK]
    if not ragged:
        return None
    return Refusal(f"{target}: {ragged[0]} is not a multiple of {BLOCK}, and ragged blocks are misread")


def _int4(spec: TensorSpec, scheme: str, target: str, tp: int, word: int = 1) -> Refusal | None:
    # vLLM marlin.py, compressed_tensors_moe_wna16.py, auto_gptq.py, auto_awq.py, marlin_utils.py (pads ragged tiles,
    # never groups); SGLang marlin_utils.py, verify_marlin_supports_shape, and marlin_moe (pads nothing).
    # `word`: codes that can't be split, of the layouts that are packed along the output.
    rows, cols = spec.shape
    if spec.expert is not None:
        width, hidden = _expert(spec)
        found = _marlin_experts(spec, scheme, target, tp, word)
        found = found or _several_groups(target, "the experts' width", width, tp, scheme)
        return found or _several_groups(target, "the hidden size", hidden, 1, scheme)
    found = None
    if spec.parallel == "columns":
        found = _multiple(target, "columns", cols, tp, _group(scheme) or word, CODECS[scheme].finer)
    if found is None and spec.parallel == "rows":
        found = _multiple(target, "rows", rows, tp, word)
    # AWQ that Marlin can't take is decoded first, in any shape: SGLang awq.py, awq_dequantize.cuh
    if found is None and target == "sglang" and word == 1:
        found = _multiple(target, "columns", cols, tp if spec.parallel == "columns" else 1, 128)
        found = found or _multiple(target, "rows", rows, tp if spec.parallel == "rows" else 1, 64)
    return found


def _marlin_experts(spec: TensorSpec, scheme: str, target: str, tp: int, word: int) -> Refusal | None:
    """Refuse INT4 experts that the engine finds not fit for its Marlin kernels."""
    width, hidden = _expert(spec)
    if hidden % 128:
        return Refusal(f"{target}: the hidden size, {hidden}, must be a multiple of 128 for experts")
    group = _group(scheme) or word
    unit = max(64, group) if target == "sglang" else group
    instead = CODECS[scheme].finer if group == unit else "bf16"
    return _multiple(target, "the experts' width", width, tp, unit, instead)


def _several_groups(target: str, what: str, size: int, tp: int, scheme: str) -> Refusal | None:
    """Refuse INT4 experts that are no wider, or take no more columns, than one group.

    vLLM int_wna16.py and SGLang awq.py order the scales of gate and up by whether the width of a share, where their
    columns were meant, is beyond a group; the product reads them by the columns. So half of such experts' scales are
    swapped: seen in vLLM 0.26, with a width of 128 in groups of 128, in all three layouts. SGLang's
    compressed-tensors path does so where the hidden size is one group. Linear modules go by their own columns.
    """
    group = _group(scheme)
    if group is None or size // tp > group:
        return None
    return Refusal(f"{target}: {what}, {_share(size, tp)}, must exceed the group of {group}", CODECS[scheme].finer)


def _multiple(target: str, what: str, size: int, tp: int, unit: int = BLOCK, instead: str = "bf16") -> Refusal | None:
    refused = Refusal(f"{target}: {what}, {_share(size, tp)}, must be a multiple of {unit}", instead)
    return refused if size // tp % unit else None


def _share(size: int, tp: int) -> str:
    return f"{size} / tp {tp} = {size // tp}" if tp > 1 else str(size)


def _w4a8(spec: TensorSpec, scheme: str, target: str, tp: int) -> Refusal | None:
    # On Hopper alone, in BF16. compressed_tensors_moe_w4a8_fp8.py, create_weights; kernels/linear/mixed_precision/
    # cutlass.py, CutlassW4A8LinearKernel.can_implement, which looks at the fused matrix.
    finer = CODECS[scheme].finer
    if spec.expert is not None:
        width, hidden = _expert(spec)
        found = _multiple(target, "the hidden size", hidden, 1, 256, finer)
        return found or _multiple(target, "the experts' width", width, tp, 256, finer)
    rows, cols = spec.shape
    if spec.fused_as is not None:
        rows = spec.fused_as.rows
    found = _multiple(target, "columns", cols, tp if spec.parallel == "columns" else 1, 128, finer)
    return found or _multiple(target, "rows", rows, tp if spec.parallel == "rows" else 1, 128, finer)


_PACKED = ("int4-g128", "int4-g64", "int4-g32", "int4-channel")
_GPTQ = ("gptq-g128", "gptq-g64", "gptq-g32", "gptq-channel")
_AWQ = ("awq-g128", "awq-g64", "awq-g32")
_marlin, _marlin_words = (_all(_plain_kv_b, rule) for rule in (_int4, partial(_int4, word=PER_WORD)))
NEEDS = {("vllm", "w4a8-g128"): "a Hopper GPU (sm90), and BF16"}  # what serving takes besides
# By consumer, then scheme. INT8 has any shape in vLLM: what CUTLASS does not take, Triton does (_custom_ops.py,
# cutlass_scaled_mm). In SGLang its experts run on Ascend alone (compressed_tensors_w8a8_int8_moe.py).
ROWS: dict[str, dict[str, Rule]] = {
    "vllm": {
        "fp8-block": _blocks,
        **dict.fromkeys(("fp8-channel", "int8-channel"), _any),
        "fp8-tensor": _tensor_experts,
        **dict.fromkeys(("fp8-static", "fp8-autofp8"), _static_kv_b),
        **dict.fromkeys(_PACKED, _marlin),
        **dict.fromkeys(_GPTQ + _AWQ, _marlin_words),
        "w4a8-g128": _all(_plain_kv_b, _w4a8),
    },
    "sglang": {
        "fp8-block": _blocks,
        **dict.fromkeys(("fp8-channel", "fp8-autofp8"), _any),
        "fp8-tensor": _all(_tensor_experts, _unmerged),
        "fp8-static": _unmerged,
        **dict.fromkeys(_PACKED, _marlin),
        **dict.fromkeys(_AWQ, _marlin_words),
    },
    "transformers": {
        "fp8-block": _whole_blocks,
        **dict.fromkeys(("fp8-channel", "fp8-tensor", "fp8-static", *_PACKED, "w4a8-g128"), _any),
        "int8-channel": _no_int8_experts,
    },
}
