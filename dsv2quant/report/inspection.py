"""What a checkpoint, artifact or GGUF file holds, as text and as JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv2quant.arch.config import ModelConfig
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.report.tables import SAID, RoleSummary, count, gigabytes, roles_table, summarize, values_of


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint or artifact holds. `files` are sizes in bytes, None where only headers were read;
    `configuration` is in the terms of the paper; `kv_scales` counts layers that have one; `gguf` is a GGUF file's
    "file_type" and "tensor_types", counts by block type. Of a multimodal model `others` counts the tensors beside its
    language model, and `other_bytes` theirs; all else is the language model's."""

    model: str
    revision: str | None
    architecture: str
    parameters: int
    nbytes: int
    files: dict[str, int | None]
    roles: list[RoleSummary]
    configuration: dict[str, Any]
    kv_scales: int
    others: int
    other_bytes: int
    quantization_config: Mapping[str, Any] | None
    gguf: dict[str, Any] | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters


def inspection(checkpoint: Checkpoint) -> Inspection:
    """What an opened checkpoint holds."""
    roles = summarize((w.spec, w.stored_scheme, w.nbytes, w.nbytes) for w in checkpoint.weights)
    paths = {file: checkpoint.data[file][0] if file in checkpoint.data else None for file in checkpoint.files}
    return Inspection(
        model=checkpoint.model,
        revision=checkpoint.revision,
        architecture=checkpoint.config.architecture,
        parameters=sum(r.weights for r in roles),
        nbytes=sum(r.bytes_after for r in roles),
        files={file: None if path is None else os.stat(path).st_size for file, path in paths.items()},
        roles=roles,
        configuration=_describe(checkpoint.config),
        kv_scales=len(checkpoint.kv_scales),
        others=len(checkpoint.others),
        other_bytes=sum(tensor.nbytes for tensor in checkpoint.others),
        quantization_config=checkpoint.config.quantization,
        gguf=checkpoint.file_summary(),
    )


def inspection_text(i: Inspection) -> str:
    """What `dsv2quant inspect` prints."""
    revision = f" at {i.revision}" if i.revision else ""
    lines = [
        f"{i.model}{revision}: {i.architecture}, {count(i.parameters)} parameters, {gigabytes(i.nbytes)} in "
        f"{len(i.files)} file{'s' * (len(i.files) > 1)}, {i.bits_per_weight:.2f} bits per weight",
        roles_table(i.roles, before=False),
        *(f"{key}: {value}" for key, value in i.configuration.items()),
    ]
    if i.others:
        lines.append(f"beside the language model: {i.others} tensors, {gigabytes(i.other_bytes)}")
    lines += ["KV-cache scales: one per layer"] * (i.kv_scales > 0)
    if i.gguf is not None:
        types = ", ".join(f"{number} {name}" for name, number in i.gguf["tensor_types"].items())
        lines += [f"file type: {i.gguf['file_type'] or 'not given'}", f"tensors: {types}"]
        lines += [f"files: {', '.join(i.files)}"] * (len(i.files) > 1)
    return "\n".join(lines)


def inspection_json(i: Inspection) -> dict[str, Any]:
    """The object of `dsv2quant inspect --json`."""
    return {
        "schema": "dsv2quant.inspect/2",
        **values_of(i, "model", "revision", "architecture", "parameters"),
        "bytes": i.nbytes,
        "bits_per_weight": i.bits_per_weight,
        "files": {file: {"size": size} for file, size in i.files.items()},
        "roles": [values_of(r, *SAID) | {"bytes": r.bytes_after} for r in i.roles],
        **values_of(i, "configuration", "kv_scales", "others", "other_bytes", "quantization_config", "gguf"),
    }


def _describe(c: ModelConfig) -> dict[str, Any]:
    """The configuration in the terms of the paper."""
    query = f"latent {c.q_lora_rank}" if c.q_lora_rank else "direct"
    experts = "none"
    if c.n_routed_experts:
        groups = f", best {c.topk_group} of {c.n_group} groups" if c.n_group > 1 else ""
        experts = (
            f"{c.num_experts_per_tok} of {c.n_routed_experts} routed{groups}, {c.n_shared_experts} shared, "
            f"width {c.moe_intermediate_size}, from layer {c.first_k_dense_replace}"
        )
    rope = f"theta {c.rope_theta:g}"
    if c.yarn:
        rope += f", YaRN factor {c.yarn.factor:g} over {c.yarn.original_max_position_embeddings}"
        rope += f", mscale {c.yarn.mscale:g} / {c.yarn.mscale_all_dim:g}"
    return {
        "layers": c.num_hidden_layers,
        "hidden": c.hidden_size,
        "vocabulary": c.vocab_size,
        "attention": f"{c.num_attention_heads} heads, query {query}, KV latent {c.kv_lora_rank} + "
        f"{c.qk_rope_head_dim} RoPE, head {c.qk_nope_head_dim} + {c.qk_rope_head_dim} / {c.v_head_dim}",
        "dense FFN": c.intermediate_size,
        "experts": experts,
        "rope": rope,
        "context": c.max_position_embeddings,
    }
