"""The rules that make a scheme fall back for a tensor: by consumer, what it takes of which scheme.

Read from vLLM 0.33.0, SGLang 0.5.23 and transformers 5.23.0; the file of each rule stands beside it. `tp` is the number
of GPUs over which vLLM and SGLang split the tensor at hand; transformers loads whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dsv2quant.arch.spec import TensorSpec
from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.formats.int4 import PER_WORD
from dsv2quant.formats.schemes import CODECS


@dataclass(frozen=True)
class Refusal:
    """A rule that a scheme breaks for a tensor, and the scheme to try next."""

    reason: str
    instead: str = "bf16"


def is_joined(spec: TensorSpec) -> bool:
    """Whether engines make one matrix of it and others."""
    return spec.fused_as is not None and spec.fused_as.rows > spec.shape[0]


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
    if spec.parallel is not None or not is_joined(spec):
        return None
    return Refusal(f"{target}: q_a_proj and kv_a_proj_with_mqa are fused without merging scales", "fp8-channel")


def _packed_q_b(spec: TensorSpec, scheme: str, target: str, tp: int) -> Refusal | None:
    # deepseek_v2.py, DeepseekV2AttentionMLA asks q_b_proj.weight for its shape, which packed layers of any layout lack:
    # its start fails (0.5.16, run; 0.5.23 takes them).
    return Refusal(f"{target}: q_b_proj is read as a plain matrix") if spec.role == "q_b_proj" else None


def _packed_a(spec: TensorSpec, scheme: str, target: str, tp: int) -> Refusal | None:
    # deepseek_v2.py, prepare_qkv_latent, asks fused_qkv_a_proj_with_mqa.weight for its dtype, which AWQ is spared, and
    # packed layers of compressed-tensors have none: the first forward pass fails (0.5.16, run on a CPU: its start).
    if spec.parallel is not None or not is_joined(spec):
        return None
    return Refusal(f"{target}: the fused q_a_proj and kv_a_proj_with_mqa are read as a plain matrix")


def _blocks(spec: TensorSpec, scheme: str, target: str, tp: int) -> Refusal | None:
    # validate_fp8_block_shape, validate_fp8_block_shape_moe (vLLM fp8_utils.py; SGLang fp8_utils.py, fp8.py)
    rows, cols = spec.shape
    if spec.expert is not None:
        width, hidden = _expert(spec)
        unit = _refined_block(width, hidden) if target == "vllm" else BLOCK
        return _multiple(target, "the experts' width", width, tp, unit)
    # What comes in is quantized in groups of 128 columns, too, of which none may be ragged: SGLang fp8_kernel.py,
    # sglang_per_token_group_quant_fp8; vLLM fp8_utils.py, per_token_group_quant_fp8, where it runs eagerly (both run).
    found = _multiple(target, "columns", cols, tp if spec.parallel == "columns" else 1)
    if found is not None:
        return found
    if tp > 1 and spec.parallel == "rows":
        return _multiple(target, "rows", rows, tp)
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
        found = marlin_experts(spec, scheme, target, tp, word)
        found = found or _several_groups(target, "the experts' width", width, tp, scheme)
        return found or _several_groups(target, "the hidden size", hidden, 1, scheme)
    found = None
    if spec.parallel == "columns":
        found = _multiple(target, "columns", cols, tp, _group(scheme) or word, CODECS[scheme].finer)
    if found is None and spec.parallel == "rows":
        found = _multiple(target, "rows", rows, tp, word)
    # AWQ that Marlin can't take is decoded first, in any shape: SGLang awq.py, awq_dequantize.cuh
    if found is None and target == "sglang" and CODECS[scheme].quant_method != "awq":
        found = _multiple(target, "columns", cols, tp if spec.parallel == "columns" else 1, 128)
        found = found or _multiple(target, "rows", rows, tp if spec.parallel == "rows" else 1, 64)
    return found


def marlin_experts(spec: TensorSpec, scheme: str, target: str, tp: int, word: int) -> Refusal | None:
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


def _humming(spec: TensorSpec, scheme: str, target: str, tp: int) -> Refusal | None:
    # compressed_tensors_moe_wna16.py, CompressedTensorsWNA16MoEMethod.create_weights. fused_humming_moe.py takes
    # codes of 2 to 8 bits; what is no multiple of its tiles is padded (utils/humming/moe.py and linear.py).
    group, finer = _group(scheme) or 1, CODECS[scheme].finer
    if spec.expert is not None:
        width, hidden = _expert(spec)
        found = _multiple(target, "the hidden size", hidden, 1, group, finer)
        return found or _multiple(target, "the experts' width", width, tp, group, finer)
    return _multiple(target, "columns", spec.shape[1], tp if spec.parallel == "columns" else 1, group, finer)


_PACKED = ("int4-g128", "int4-g64", "int4-g32", "int4-channel")
_FEW = ("int3-g128", "int3-g64", "int3-g32", "int2-g128", "int2-g64", "int2-g32")
_GPTQ = ("gptq-g128", "gptq-g64", "gptq-g32", "gptq-channel")
_AWQ = ("awq-g128", "awq-g64", "awq-g32")
_marlin, _marlin_words = (_all(_plain_kv_b, rule) for rule in (_int4, partial(_int4, word=PER_WORD)))
# What serving takes besides. Humming comes with vLLM 0.33; no other kernel has fewer than 4 bits (oracle/int_wna16.py,
# kernels/linear/__init__.py).
NEEDS = {
    ("vllm", "w4a8-g128"): "a Hopper GPU (sm90), and BF16",
    **{("vllm", scheme): "vLLM's Humming kernels, and a GPU from sm75 on" for scheme in _FEW},
}
# By consumer, then scheme. INT8 has any shape in vLLM: what CUTLASS does not take, Triton does (_custom_ops.py,
# cutlass_scaled_mm). In SGLang its experts run on Ascend alone (compressed_tensors_w8a8_int8_moe.py).
ROWS: dict[str, dict[str, Rule]] = {
    "vllm": {
        "fp8-block": _blocks,
        **dict.fromkeys(("fp8-channel", "int8-channel"), _any),
        "fp8-tensor": _tensor_experts,
        **dict.fromkeys(("fp8-static", "fp8-autofp8"), _static_kv_b),
        **dict.fromkeys(_PACKED, _marlin),
        **dict.fromkeys(_FEW, _all(_plain_kv_b, _humming)),
        **dict.fromkeys(_GPTQ + _AWQ, _marlin_words),
        "w4a8-g128": _all(_plain_kv_b, _w4a8),
    },
    "sglang": {
        "fp8-block": _blocks,
        **dict.fromkeys(("fp8-channel", "fp8-autofp8"), _any),
        "fp8-tensor": _all(_tensor_experts, _unmerged),
        "fp8-static": _unmerged,
        **dict.fromkeys(_PACKED, _all(_marlin, _packed_a, _packed_q_b)),
        **dict.fromkeys(_GPTQ + _AWQ, _all(_marlin_words, _packed_q_b)),
    },
    "transformers": {
        "fp8-block": _whole_blocks,
        **dict.fromkeys(("fp8-channel", "fp8-tensor", "fp8-static", *_PACKED, *_FEW, *_GPTQ, *_AWQ, "w4a8-g128"), _any),
        "int8-channel": _no_int8_experts,
    },
}
READ = {"vllm": "vLLM 0.33.0", "sglang": "SGLang 0.5.23", "transformers": "transformers 5.23.0"}
# Beside ROWS: which consumer ran artifacts of a scheme, and computed what they say (docs/consumers.md, What was run). A
# GPU ran its kernels; a CPU its choice of schemes and its loaders.
_FP8 = ("fp8-block", "fp8-channel", "fp8-tensor", "fp8-static", "fp8-autofp8")
_ON_GPU, _ON_CPU = "run, vLLM 0.26 on a GPU and 0.32 on a CPU", "run, vLLM 0.32 on a CPU"
_SGLANG = "run, SGLang 0.5.16 on a GPU"
RAN: dict[str, dict[str, str]] = {
    "vllm": {
        **dict.fromkeys((*_FP8, *_PACKED, "int8-channel", "w4a8-g128", "gptq-g128", "awq-g128"), _ON_GPU),
        **dict.fromkeys(("gptq-g64", "awq-g64"), _ON_CPU),
        **dict.fromkeys(_FEW, f"read, {READ['vllm']}; its Humming kernels run by themselves on a GPU"),
    },
    "sglang": dict.fromkeys((*_FP8, *_PACKED, "gptq-g128", "awq-g128"), _SGLANG),
    "transformers": dict.fromkeys(
        ("fp8-block", "fp8-channel", "fp8-tensor", "fp8-static", *_PACKED, *_FEW, "int8-channel", "w4a8-g128"),
        "run, transformers 5.23.0 on a CPU",
    ),
}


def evidence(target: str, scheme: str) -> str:
    """What a row of ROWS stands on: "run, …" and where, or "read, …", the version whose sources it was read from."""
    return RAN[target].get(scheme, f"read, {READ[target]}")
