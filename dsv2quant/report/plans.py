"""A plan as text and as JSON, and what is said of it before it is run."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from dsv2quant.calib.calibration import needs_calibration, work_memory
from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning import consumers as targets
from dsv2quant.planning.consumers import ENGINES
from dsv2quant.planning.kept import kept_notes
from dsv2quant.planning.plan import Plan
from dsv2quant.planning.recipe import spelled
from dsv2quant.planning.rules import NEEDS
from dsv2quant.report.fallbacks import fallbacks
from dsv2quant.report.tables import SAID, count, gigabytes, roles_table, summarize, table, values_of
from dsv2quant.report.warnings import warnings

if TYPE_CHECKING:
    from dsv2quant.planning.gguf_plan import Entry as GgufEntry
    from dsv2quant.planning.gguf_plan import GgufPlan  # imports numba

logger = logging.getLogger(__name__)
# vLLM pull 13232
_FLOAT16 = "float16 scales: serve in BF16, DeepSeek-V2 overflows in float16"


def tell(plan: Plan | GgufPlan) -> None:
    """Log what a plan warns of; where more is wanted, the plan, which says that too."""
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", plan_text(plan, every_tensor=logger.isEnabledFor(logging.DEBUG)))
        return
    if isinstance(plan, Plan):
        lines = [f"warning: {warning}" for warning in warnings(plan)]
    else:
        lines = [f"note: {note}" for note in plan.notes]
    for line in lines:
        logger.warning("%s", line)


def plan_text(plan: Plan | GgufPlan, *, every_tensor: bool = False) -> str:
    """The plan as `dsv2quant plan` prints it; with `every_tensor`, fallbacks, or tensors of GGUF, one by one."""
    if not isinstance(plan, Plan):
        return _gguf_text(plan, every_tensor)
    roles = summarize((x.spec, x.scheme, x.weight.nbytes, x.nbytes) for x in plan.entries)
    parts = [
        *(f"warning: {warning}" for warning in warnings(plan)),
        f"{plan.checkpoint.model}: {count(plan.parameters)} parameters, recipe {plan.recipe.name}, "
        f"for {', '.join(plan.targets)}{plan.parallel}",
        roles_table(roles, before=True),
        f"{gigabytes(plan.bytes_in)} → {gigabytes(plan.bytes_out)} in {len(plan.shards)} "
        f"file{'s' * (len(plan.shards) > 1)}, {plan.bits_per_weight:.2f} bits per weight",
        *beside(plan),
    ]
    parts += _fallen(plan, every_tensor)
    parts += [f"note: {note}" for note in notes(plan)]
    parts.append(f"plan {plan.digest[:16]}")
    return "\n".join(parts)


def _fallen(plan: Plan | GgufPlan, every_tensor: bool) -> list[str]:
    found = fallbacks(plan)
    shapes = {e.spec.name: list(e.spec.shape) for e in plan.entries} if every_tensor and isinstance(plan, Plan) else {}
    lines = ["Fallbacks:"] if found else []
    for each in found:
        lines.append(f"  {each.what} → {each.scheme}: {each.reason}")
        lines += [f"      {name} {shapes[name]}" for name in each.tensors if name in shapes]
    return lines


def beside(plan: Plan) -> list[str]:
    """A line for what a multimodal model has beside its language model."""
    if not plan.copies:
        return []
    tensors = f"{len(plan.copies)} tensor{'s' * (len(plan.copies) > 1)}"
    return [f"of it {gigabytes(plan.bytes_copied)} in {tensors} beside the language model, copied as they are"]


def _gguf_text(plan: GgufPlan, every_tensor: bool) -> str:
    parts = [
        f"{plan.checkpoint.model}: {count(plan.parameters)} parameters, {plan.options.file_type} for llama.cpp",
        types_table(plan),
        f"{gigabytes(plan.bytes_in)} → {gigabytes(plan.bytes_out)}, "
        f"{8 * plan.bytes_out / plan.parameters:.2f} bits per weight",
    ]
    parts += _fallen(plan, every_tensor)
    if every_tensor:
        parts += [f"  {entry.name} {list(entry.tensor.shape)} {entry.type}" for entry in plan.entries]
    return "\n".join([*parts, *(f"note: {note}" for note in plan.notes)])


def types_table(plan: GgufPlan, *, markdown: bool = False) -> str:
    """Which type each kind of tensor has, and in which layers."""
    groups: dict[tuple[str, str], list[GgufEntry]] = defaultdict(list)
    for entry in plan.entries:
        groups[entry.tensor.kind, entry.type].append(entry)
    layers = {
        key: spelled(e.tensor.layer for e in group if e.tensor.layer is not None) for key, group in groups.items()
    }
    rows = []
    for (kind, type_), entries in groups.items():
        nbytes, weights = sum(entry.nbytes for entry in entries), sum(entry.tensor.size for entry in entries)
        bits = f"{8 * nbytes / weights:.2f}"
        rows.append([kind, type_, len(entries), layers[kind, type_], gigabytes(nbytes), bits])
    return table(["tensor", "type", "tensors", "layers", "size", "bits/weight"], rows, markdown=markdown)


def notes(plan: Plan) -> list[str]:
    """What a user should know about serving this plan's artifact, beyond its schemes."""
    config = plan.checkpoint.config
    found = []
    if needs_calibration(plan):
        beside = gigabytes(work_memory(plan))
        found.append(f"calibration takes at most about {beside} of the device beside hidden states")
    found += serving_notes(plan)
    for (target, scheme), needed in NEEDS.items():
        if target in plan.targets and scheme in plan.schemes:
            found.append(f"{target}: {scheme} needs {needed}")
    found += kept_notes((entry.weight, entry.scheme, entry.is_kept) for entry in plan.entries)
    found += _finer_groups(plan)
    share = config.moe_intermediate_size // plan.parallel.experts_over
    blocks = any(entry.scheme == "fp8-block" and entry.spec.role.startswith("routed.") for entry in plan.entries)
    if blocks and "vllm" in plan.targets and share % BLOCK:
        found.append(f"vllm: FP8 blocks of experts' shares of {share} need vLLM 0.30 or newer")
    channels = any(entry.scheme == "int4-channel" and entry.spec.expert is not None for entry in plan.entries)
    if channels and "vllm" in plan.targets:
        # int_wna16.py, _process_weights_marlin: a TypeError, while it loads
        found.append("vllm: vLLM 0.26 loads no experts in int4-channel; 0.32 does")
    if any(entry.kv_scales for entry in plan.entries):
        found += _dropped_scales(plan)
    if whole := plan.checkpoint.whole:
        unable = [target for target in plan.targets if target not in whole.loaded_by]
        if unable:
            what = f"{' and '.join(unable)} can't load this multimodal model quantized"
            found.append(f"{what}: --language-only makes an artifact of its language model, which they load")
    if config.attention_bias and (config.is_mla or config.n_routed_experts) and set(plan.targets) & set(ENGINES):
        found.append("vLLM and SGLang build DeepSeek's attention without biases and can't load this model")
    found += _prediction_notes(plan)
    if config.scale_normalised:
        return found
    if config.norm_topk_prob and config.routed_scaling_factor != 1 and plan.targets:
        found.append(
            "norm_topk_prob with a routed_scaling_factor: DeepSeek-V2's own code does not scale normalised weights; "
            "vLLM and SGLang do, and transformers ignores norm_topk_prob"
        )
    elif config.norm_topk_prob and "transformers" in plan.targets:
        found.append("transformers ignores norm_topk_prob: its logits differ")
    return found


def _dropped_scales(plan: Plan) -> list[str]:
    """Where an FP8 cache has scale 1, whatever the artifact says: as serving.py's `takes_cache_scales`."""
    if plan.checkpoint.config.is_mla and set(plan.targets) & set(ENGINES):
        # vLLM weight_utils.py, maybe_remap_kv_scale_name; SGLang deepseek_weight_loader.py
        return ["vLLM and SGLang load no KV-cache scales for MLA: they warn, and an FP8 cache then has scale 1"]
    layouts = {CODECS[scheme].quant_method for scheme in plan.schemes if scheme in CODECS}
    if "sglang" in plan.targets and "compressed-tensors" in layouts:
        return ["sglang: loads no KV-cache scales of compressed-tensors (of --format autofp8 it does)"]
    return []


def serving_notes(plan: Plan) -> list[str]:
    """What whoever serves the artifact must know."""
    has_float16 = any(output.dtype == "F16" for entry in plan.entries for output in entry.outputs)
    return [_FLOAT16] if has_float16 and plan.checkpoint.config.overflows_float16 else []


def _prediction_notes(plan: Plan) -> list[str]:
    """What becomes of the layers for multi-token prediction."""
    mine = [entry for entry in plan.entries if entry.spec.is_prediction and not entry.spec.keep]
    left = [entry for entry in mine if entry.scheme == "bf16"]
    if not left or not plan.schemes:
        return []
    layers = ", ".join(sorted({str(entry.spec.layer) for entry in left}, key=int))
    size = gigabytes(sum(entry.nbytes for entry in left))
    found = [
        f"the layer for multi-token prediction, {layers}, stays in BF16, {size}: a rule that names it quantizes it"
    ]
    if "sglang" in plan.targets and any(CODECS[scheme].quant_method == "awq" for scheme in plan.schemes):
        # deepseek_weight_loader.py concatenates q_a and kv_a along AWQ's output dimension, in whatever scheme they are.
        found.append("sglang: it does not load such a layer beside AWQ: serve without speculative decoding")
    return found


def _finer_groups(plan: Plan) -> list[str]:
    """What a smaller group would quantize too, in a layout that has one group size for all."""
    fallen = [entry.spec for entry in plan.entries if entry.reason and entry.scheme == "bf16"]
    for codec in (CODECS[scheme] for scheme in plan.schemes):
        group = codec.integers.group_size if codec.integers else None
        if codec.quant_method == "compressed-tensors":
            continue
        for size in (size for size in (64, 32) if size < (group or 0)):
            rules = (codec.variant(size), plan.targets, plan.parallel)
            roles = list(dict.fromkeys(spec.role for spec in fallen if targets.refusal(spec, *rules) is None))
            if roles:
                what = f"--group-size {size} would quantize {', '.join(roles)} too"
                return [f"{codec.quant_method} has one group size in an artifact: {what}"]
    return []


def plan_json(plan: Plan | GgufPlan) -> dict[str, Any]:
    """The object of `dsv2quant plan --json`."""
    if not isinstance(plan, Plan):
        return _gguf_json(plan)
    roles = summarize((x.spec, x.scheme, x.weight.nbytes, x.nbytes) for x in plan.entries)
    return {
        "schema": "dsv2quant.plan/2",
        **values_of(plan.checkpoint, "model", "revision"),
        "recipe": plan.recipe.name,
        "targets": list(plan.targets),
        **values_of(plan.parallel, "tp", "ep"),
        **values_of(plan, "parameters", "bytes_in", "bytes_out", "bytes_copied", "bits_per_weight", "digest"),
        "roles": [values_of(r, *SAID) | {"bytes_in": r.bytes_before, "bytes_out": r.bytes_after} for r in roles],
        "fallbacks": [
            {"tensor": x.spec.name, "shape": list(x.spec.shape), "scheme": x.scheme, "reason": x.reason}
            for x in plan.entries
            if x.reason
        ],
        "warnings": warnings(plan),
        "notes": notes(plan),
        "shards": [{"file": s.file, "bytes": s.nbytes, "tensors": len(s.outputs)} for s in plan.shards],
        "quantization_config": plan.config.get("quantization_config"),
    }


def _gguf_json(plan: GgufPlan) -> dict[str, Any]:
    return {
        "schema": "dsv2quant.plan-gguf/2",
        **values_of(plan.checkpoint, "model", "revision"),
        "file_type": plan.options.file_type,
        **values_of(plan, "parameters", "bytes_in", "bytes_out"),
        "bits_per_weight": 8 * plan.bytes_out / plan.parameters,
        "entries": [
            {"tensor": x.name, "shape": list(x.tensor.shape), "type": x.type, "bytes": x.nbytes, "reason": x.reason}
            for x in plan.entries
        ],
        "notes": list(plan.notes),
    }
