"""What each consumer takes: the rules that make a scheme fall back for a tensor, and the modules consumers fuse.

Read from vLLM 0.33.0, SGLang 0.5.23 and transformers 5.23.0; the file of each rule stands beside it. `tp` is the number
of GPUs over which vLLM and SGLang split the tensor at hand; transformers loads whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.deepseek_v2 import LINEAR_ROLES, TensorSpec
from dsv2quant.errors import InputError, UsageError
from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.formats.int4 import PER_WORD, Int4
from dsv2quant.formats.schemes import CODECS

ENGINES = ("vllm", "sglang")
TARGETS = (*ENGINES, "transformers")

_COLUMN_PARALLEL = (
    "q_proj",
    "q_b_proj",
    "kv_b_proj",
    "dense.gate_proj",
    "dense.up_proj",
    "shared.gate_proj",
    "shared.up_proj",
)
_ROW_PARALLEL = ("o_proj", "dense.down_proj", "shared.down_proj")
_FIRST_OF_FUSED = ("q_a_proj", "dense.gate_proj", "shared.gate_proj")

_3D = "keeps DeepSeek-V2's experts in 3-D parameters, and this layout is loaded into Linear modules alone"
# Which target can't serve DeepSeek-V2 in which quant method or scheme, and why.
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
        return self.experts_over if spec.role.startswith("routed.") else self.tp

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
    """The targets asked for, in order; for None, all that load artifacts of these schemes at all.

    Raises UsageError where one asked for can't.
    """
    layouts = {layout for scheme in schemes for layout in (scheme, CODECS[scheme].quant_method)}
    never = {target: (layout, why) for (target, layout), why in _NEVER.items() if layout in layouts}
    if asked is None:
        return tuple(target for target in TARGETS if target not in never)
    for target in asked:
        if target in never:
            layout, why = never[target]
            fix = "compressed-tensors loads in every target"
            raise UsageError(f"no {layout} for --target {target}: it {why}", fix=fix)
    return tuple(target for target in TARGETS if target in asked)


def refusal(
    spec: TensorSpec, scheme: str, config: ModelConfig, targets: Iterable[str], parallel: Parallel
) -> Refusal | None:
    """The first rule of `targets` that forbids `scheme` for this tensor, or None."""
    if scheme == "bf16":
        return None
    if spec.role not in LINEAR_ROLES:
        return Refusal(f"no consumer loads a quantized {spec.role}")
    why = CODECS[scheme].refusal(spec.shape)
    if why is not None:
        return Refusal(why, _finer(scheme))
    for target in targets:
        found = _RULES[target](spec, scheme, config, target, parallel.over(spec))
        if found is not None:
            return found
    return None


def check_unquantized(
    schemes: Mapping[TensorSpec, str], config: ModelConfig, targets: Iterable[str], parallel: Parallel
) -> None:
    """Raise InputError where a target can't load what a GPTQ or AWQ artifact leaves in BF16."""
    used = {CODECS[scheme].quant_method: scheme for scheme in schemes.values()}
    for spec in (spec for spec, scheme in schemes.items() if scheme == "bf16"):
        # auto_gptq.py: experts that Marlin can't take become MoeWNA16Method before `dynamic` is looked at.
        if "gptq" in used and "vllm" in targets and spec.role.startswith("routed."):
            found = _marlin_experts(used["gptq"], config, "vllm", parallel.over(spec))
            if found is not None:
                what = f"{found.reason}, and GPTQ experts of such a width can't stay in BF16"
                raise InputError(what, where=spec.module, fix="take a smaller group size, or compressed-tensors")
        # deepseek_weight_loader.py concatenates q_a and kv_a along AWQ's output dimension, in whatever scheme they are.
        if "awq" in used and "sglang" in targets and spec.role == "q_a_proj":
            what = "sglang: an AWQ artifact has no q_a_proj and kv_a_proj_with_mqa in BF16"
            raise InputError(what, where=spec.module, fix="take --int4=pure, or --target vllm alone")


def fused_module(spec: TensorSpec, config: ModelConfig, targets: Iterable[str]) -> str | None:
    """The module that a consumer fuses this tensor into; its members must share a scheme. None: fused into nothing.

    vLLM `DeepSeekV2FusedQkvAProjLinear`, SGLang `fused_qkv_a_proj_with_mqa` (only with a query latent); gate and up are
    one matrix in both; every consumer stacks a layer's routed experts.
    """
    if spec.role.startswith("routed."):
        return f"model.layers.{spec.layer}.mlp.experts"
    if not set(targets) & set(ENGINES):
        return None
    parent = spec.module.rpartition(".")[0]
    if config.q_lora_rank is not None and spec.role in ("q_a_proj", "kv_a_proj_with_mqa"):
        return f"{parent}.fused_qkv_a_proj"
    if spec.role in ("dense.gate_proj", "dense.up_proj", "shared.gate_proj", "shared.up_proj"):
        return f"{parent}.gate_up_proj"
    return None


def scale_group(spec: TensorSpec, config: ModelConfig, targets: Iterable[str]) -> str | None:
    """The group of tensors that must share one scale where the scheme has one per tensor; None: a scale of its own.

    A fused matrix has one scale in the engines; with several they requantize to the largest. Of routed experts, each
    expert's gate and up are one matrix.
    """
    if spec.role in ("routed.gate_proj", "routed.up_proj") and set(targets) & set(ENGINES):
        return spec.module.rpartition(".")[0]
    return None if spec.role.startswith("routed.") else fused_module(spec, config, targets)


def input_group(spec: TensorSpec, config: ModelConfig, targets: Iterable[str]) -> str:
    """The group of tensors that must share one static input scale; alone, the tensor's own name.

    A fused matrix has one input. Over a layer's routed experts the engines take the largest, of gate and up as of down
    (vLLM fp8_utils.py, process_fp8_input_tensor_strategy_moe; SGLang fp8.py, compressed_tensors_w8a8_fp8_moe.py), and
    refuse an expert whose gate and up differ.
    """
    if not spec.role.startswith("routed."):
        return fused_module(spec, config, targets) or spec.name
    return f"model.layers.{spec.layer}.mlp.experts.{'w2' if spec.role == 'routed.down_proj' else 'w13'}"


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


def refined_block(config: ModelConfig) -> int:
    """What the experts' share must be a multiple of in block FP8 for vLLM 0.30 and newer.

    Where the share holds no whole blocks, it repeats the scales for blocks of 64 or 32 (fused_moe/oracle/fp8.py,
    refine_fp8_moe_block_shape). It counts them by whole blocks of the unsplit matrix, so that none may be ragged
    (routed_experts.py, _load_w13).
    """
    return BLOCK if config.moe_intermediate_size % BLOCK or config.hidden_size % BLOCK else BLOCK // 4


def _group_size(scheme: str) -> int | None:
    """Columns that share a scale in an INT4 scheme; None for whole rows, and for every other scheme."""
    codec = CODECS[scheme]
    return codec.group_size if isinstance(codec, Int4) else None


def _unit(scheme: str) -> int:
    """Columns that can't be split in an INT4 scheme: a group, or the 8 codes of a word in the layouts of others."""
    return _group_size(scheme) or (PER_WORD if CODECS[scheme].quant_method in ("gptq", "awq") else 1)


def _finer(scheme: str) -> str:
    """The scheme to try where an INT4 group is too wide: half the group, down to 32. GPTQ and AWQ have no other."""
    group = _group_size(scheme)
    return f"int4-g{group // 2}" if scheme.startswith("int4") and group and group > 32 else "bf16"


def _engine(spec: TensorSpec, scheme: str, config: ModelConfig, target: str, tp: int) -> Refusal | None:
    if isinstance(CODECS[scheme], Int4):
        return _engine_int4(spec, scheme, config, target, tp)
    routed = spec.role.startswith("routed.")
    if CODECS[scheme].activation == "static" and spec.role == "kv_b_proj" and target == "vllm":
        # quant_utils.py, get_and_maybe_dequant_weights: MLA gets kv_b's values from the layer's output for an identity.
        why = "attention reads kv_b_proj through an identity matrix, which a static input scale would round or clip"
        return Refusal(f"{target}: {why}")
    if scheme in ("fp8-tensor", "fp8-static"):
        # compressed_tensors_moe_w8a8_fp8.py, compressed_tensors_w8a8_fp8_moe.py: experts take tensor weights with
        # tensor activations, or channel weights with token activations, and assert on anything else.
        if routed and scheme == "fp8-tensor":
            why = "routed experts with per-token activations need per-channel scales"
            return Refusal(f"{target}: {why}", "fp8-channel")
        # deepseek_weight_loader.py concatenates two [1] scales to [2] and then asserts the parameter's shape, [1].
        if target == "sglang" and config.q_lora_rank is not None and spec.role in ("q_a_proj", "kv_a_proj_with_mqa"):
            return Refusal(f"{target}: q_a_proj and kv_a_proj_with_mqa are fused without merging scales", "fp8-channel")
        return None
    if scheme != "fp8-block":
        return None
    # validate_fp8_block_shape, validate_fp8_block_shape_moe (vLLM fp8_utils.py; SGLang fp8_utils.py, fp8.py)
    rows, cols = spec.shape
    if routed:
        width = config.moe_intermediate_size
        return _multiple(target, "the experts' width", width, tp, refined_block(config) if target == "vllm" else BLOCK)
    if tp > 1 and spec.role in _COLUMN_PARALLEL:
        return _multiple(target, "rows", rows, tp)
    if tp > 1 and spec.role in _ROW_PARALLEL:
        return _multiple(target, "columns", cols, tp)
    if spec.role in _FIRST_OF_FUSED:
        return _multiple(target, "rows of a fused matrix's first member", rows, 1)
    return None


def _engine_int4(spec: TensorSpec, scheme: str, config: ModelConfig, target: str, tp: int) -> Refusal | None:
    # vLLM marlin.py, compressed_tensors_moe_wna16.py, auto_gptq.py, auto_awq.py, marlin_utils.py (pads ragged tiles,
    # never groups); SGLang marlin_utils.py, verify_marlin_supports_shape, and marlin_moe (pads nothing).
    if spec.role == "kv_b_proj":
        # vLLM issue 43888; SGLang deepseek_weight_loader.py, post_load_weights
        return Refusal(f"{target}: attention reads kv_b_proj as a plain matrix")
    rows, cols = spec.shape
    transposed = CODECS[scheme].quant_method in ("gptq", "awq")
    if spec.role.startswith("routed."):
        found = _marlin_experts(scheme, config, target, tp)
        found = found or _several_groups(target, "the experts' width", config.moe_intermediate_size, tp, scheme)
        return found or _several_groups(target, "the hidden size", config.hidden_size, 1, scheme)
    found = None
    if spec.role in _ROW_PARALLEL:
        found = _multiple(target, "columns", cols, tp, _unit(scheme), _finer(scheme))
    if found is None and transposed and spec.role in _COLUMN_PARALLEL:
        found = _multiple(target, "rows", rows, tp, PER_WORD)  # packed along the output
    # AWQ that Marlin can't take is decoded first, in any shape: SGLang awq.py, awq_dequantize.cuh
    if found is None and target == "sglang" and not transposed:
        found = _multiple(target, "columns", cols, tp if spec.role in _ROW_PARALLEL else 1, 128)
        found = found or _multiple(target, "rows", rows, tp if spec.role in _COLUMN_PARALLEL else 1, 64)
    return found


def _marlin_experts(scheme: str, config: ModelConfig, target: str, tp: int) -> Refusal | None:
    """Refuse INT4 experts that the engine finds not fit for its Marlin kernels."""
    if config.hidden_size % 128:
        return Refusal(f"{target}: the hidden size, {config.hidden_size}, must be a multiple of 128 for experts")
    group = _unit(scheme)
    unit = max(64, group) if target == "sglang" else group
    instead = _finer(scheme) if group == unit else "bf16"
    return _multiple(target, "the experts' width", config.moe_intermediate_size, tp, unit, instead)


def _several_groups(target: str, what: str, size: int, tp: int, scheme: str) -> Refusal | None:
    """Refuse INT4 experts that are no wider, or take no more columns, than one group.

    vLLM int_wna16.py and SGLang awq.py order the scales of gate and up by whether the width of a share, where their
    columns were meant, is beyond a group; the product reads them by the columns. So half of such experts' scales are
    swapped: seen in vLLM 0.26, with a width of 128 in groups of 128, in all three layouts. SGLang's
    compressed-tensors path does so where the hidden size is one group. Linear modules go by their own columns.
    """
    group = _group_size(scheme)
    if group is None or size // tp > group:
        return None
    return Refusal(f"{target}: {what}, {_share(size, tp)}, must exceed the group of {group}", _finer(scheme))


def _multiple(target: str, what: str, size: int, tp: int, unit: int = BLOCK, instead: str = "bf16") -> Refusal | None:
    if size // tp % unit == 0:
        return None
    return Refusal(f"{target}: {what}, {_share(size, tp)}, must be a multiple of {unit}", instead)


def _share(size: int, tp: int) -> str:
    return f"{size} / tp {tp} = {size // tp}" if tp > 1 else str(size)


def _transformers(spec: TensorSpec, scheme: str, config: ModelConfig, target: str, tp: int) -> Refusal | None:
    # finegrained_fp8.py, Fp8Dequantize._dequantize_one takes the block to be rows // scale rows: a ragged dimension
    # fails to load, or loads wrong where the division happens to be exact.
    ragged = [dim for dim in spec.shape if dim > BLOCK and dim % BLOCK]
    if scheme == "fp8-block" and ragged:
        return Refusal(f"{target}: {ragged[0]} is not a multiple of {BLOCK}, and ragged blocks are misread")
    return None


_RULES: dict[str, Callable[[TensorSpec, str, ModelConfig, str, int], Refusal | None]] = {
    "vllm": _engine,
    "sglang": _engine,
    "transformers": _transformers,
}
