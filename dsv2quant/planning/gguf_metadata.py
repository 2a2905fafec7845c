"""The metadata of a DeepSeek-V2 GGUF file: the keys, values and order that llama.cpp's tools give.

Sources: llama.cpp conversion/base.py (ModelBase.prepare_metadata, TextModel.set_gguf_parameters) and
conversion/deepseek.py (DeepseekV2Model), as they run with a transformers that knows DeepSeek-V2; then llama-quantize
(src/llama-quant.cpp) moves two keys to the end.

What llama.cpp's deepseek2 model can't run, or runs otherwise than DeepSeek's own code does.

Sources: llama.cpp src/models/deepseek2.cpp, src/llama-model.cpp (load_hparams), src/llama-context.cpp (YaRN),
src/llama-graph.cpp (build_moe_ffn).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, size_label
from gguf import Metadata as Card
from yaml import YAMLError

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.spec import GgufTensor
from dsv2quant.checkpoint.checkpoint import HfCheckpoint
from dsv2quant.errors import InputError
from dsv2quant.storage.files import MAX_CARRIED_BYTES, read_bytes
from dsv2quant.storage.gguf import FLOAT32_MAX, UINT32_MAX, Value, boolean, check_numbers, f32, string, u32, written
from dsv2quant.storage.safetensors import read_json
from dsv2quant.text.chat import Chat
from dsv2quant.text.gguf_tokenizer import tokenizer_metadata

_SOFTMAX = 1  # ExpertGatingFuncType
_CARD = "correct its front matter, or remove the file"
# Keys of generation_config.json in the order of the file, by gguf.Metadata's names. The last that is there counts.
_SAMPLING = {
    "sequence": ("sequence",), "top_k": ("top_k",), "top_p": ("top_p",), "min_p": ("min_p",),
    "xtc_probability": ("xtc_probability",), "xtc_threshold": ("xtc_threshold",), "temp": ("temperature",),
    "penalty_last_n": ("penalty_last_n",), "penalty_repeat": ("repetition_penalty", "penalty_repeat"),
    "mirostat": ("mirostat",), "mirostat_tau": ("mirostat_tau",), "mirostat_eta": ("mirostat_eta",),
}  # fmt: skip


def model_metadata(checkpoint: HfCheckpoint, file_type: int, *, drop_expert_groups: bool = False) -> dict[str, Value]:
    """Every key but imatrix's, in the order of the file. `file_type` is llama.cpp's ftype (Q4_K_M is 15).

    `drop_expert_groups` leaves out both group keys: llama.cpp then chooses from all experts.
    Raises InputError for what llama.cpp can't load, and for a damaged tokenizer, model card or generation config.
    """
    folder = checkpoint.downloaded
    check_loadable(checkpoint.config, folder, drop_expert_groups=drop_expert_groups)
    values = {
        **_general(checkpoint, folder),
        **_model(checkpoint.config, checkpoint.raw_config, drop_expert_groups),
        **tokenizer_metadata(folder, checkpoint.config),
        "general.quantization_version": u32(GGML_QUANT_VERSION),
        "general.file_type": u32(file_type),
    }
    check_numbers(values, folder)
    return values


def _general(checkpoint: HfCheckpoint, folder: Path) -> dict[str, Value]:
    """general.*: the model's name, size, licence and so on, by gguf-py's own heuristics.

    They look at the folder's name. That of a hub's snapshot is a commit, so the hub id's takes its place.
    """
    tensors = architecture(checkpoint.config).gguf_tensors()
    total = sum(prod(tensor.shape) for tensor in tensors)
    source = checkpoint.raw_config.get("_name_or_path")
    named = {"_name_or_path": source if isinstance(source, str) else None}
    path = folder / "generation_config.json"
    sampling = read_json(path) if path.exists() else {}
    where = f"{folder}/README.md or {path.name}"
    writer = GGUFWriter(path=None, arch=checkpoint.config.gguf)
    writer.add_type(GGUFType.MODEL)
    try:
        card = Card.apply_metadata_heuristic(Card(), _front_matter(folder), named, Path(checkpoint.model), total)
        for name, keys in _SAMPLING.items():
            for key in keys:
                setattr(card, f"sampling_{name}", sampling.get(key, getattr(card, f"sampling_{name}")))
        card.size_label = card.size_label or _size_label(tensors, total)
        card.set_gguf_meta_model(writer)
    except (TypeError, ValueError, AttributeError, IndexError) as error:  # gguf-py checks no type
        raise InputError(f"can't be read as a model card: {error}", where=where, fix=_CARD) from None
    return written(writer, where)


def _front_matter(folder: Path) -> dict[str, Any]:
    if (folder / "README.md").exists():
        read_bytes(folder / "README.md", MAX_CARRIED_BYTES)  # gguf-py opens it unchecked
    try:
        return Card.load_model_card(folder)
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"not a model card: {error}", where=folder / "README.md", fix=_CARD) from None


def _size_label(tensors: list[GgufTensor], total: int) -> str:
    """'64x1.5B': the experts, and the parameters of the model that has one of them (GGUFWriter, gguf-py)."""
    stacks = [tensor for tensor in tensors if tensor.specs[0].expert is not None]
    shared = total - sum(prod(tensor.shape) for tensor in stacks)
    one_expert = sum(prod(tensor.shape[1:]) for tensor in stacks)
    return str(size_label(total, shared, one_expert, stacks[0].matrices if stacks else 0))


def _model(config: ModelConfig, raw: Mapping[str, Any], drop_expert_groups: bool) -> dict[str, Value]:
    """deepseek2.*. `raw` says which of the optional settings were written down."""
    latent = config.kv_lora_rank
    keys = {
        "block_count": u32(config.num_hidden_layers),
        "context_length": u32(config.max_position_embeddings),
        "embedding_length": u32(config.hidden_size),
        "feed_forward_length": u32(config.intermediate_size),
        "attention.head_count": u32(config.num_attention_heads),
        "attention.head_count_kv": u32(1),  # absorbed MLA: all heads share the latent
        **_rope(config, raw),
        "attention.layer_norm_rms_epsilon": f32(config.rms_norm_eps),
        "expert_count": u32(config.n_routed_experts),
        "expert_used_count": u32(config.num_experts_per_tok),
    }
    if raw.get("n_group") is not None and not drop_expert_groups:
        keys["expert_group_count"] = u32(config.n_group)
    if raw.get("topk_group") is not None and not drop_expert_groups:
        keys["expert_group_used_count"] = u32(config.topk_group)
    if raw.get("scoring_func") is not None:
        keys["expert_gating_func"] = u32(_SOFTMAX)
    keys |= {
        "attention.key_length": u32(latent + config.qk_rope_head_dim),
        "attention.value_length": u32(latent),
        "leading_dense_block_count": u32(config.first_k_dense_replace),
        "vocab_size": u32(config.vocab_size),
    }
    if config.q_lora_rank is not None:
        keys["attention.q_lora_rank"] = u32(config.q_lora_rank)
    keys |= {
        "attention.kv_lora_rank": u32(latent),
        "attention.key_length_mla": u32(config.qk_head_dim),
        "attention.value_length_mla": u32(config.v_head_dim),
        "expert_feed_forward_length": u32(config.moe_intermediate_size),
        "expert_shared_count": u32(config.n_shared_experts),
        "expert_weights_scale": f32(config.routed_scaling_factor),
    }
    if config.norm_topk_prob:
        keys["expert_weights_norm"] = boolean(True)
    keys["rope.dimension_count"] = u32(config.qk_rope_head_dim)
    if config.yarn is not None and _rope_settings(raw).get("mscale_all_dim") is not None:
        # llama.cpp divides by 0.1 again.
        keys["rope.scaling.yarn_log_multiplier"] = f32(0.1 * config.yarn.mscale_all_dim)
    return {f"{config.gguf}.{key}": value for key, value in keys.items()}


def _rope(config: ModelConfig, raw: Mapping[str, Any]) -> dict[str, Value]:
    yarn, keys = config.yarn, {}
    if yarn is not None:
        keys = {
            "rope.scaling.type": string("yarn"),
            "rope.scaling.factor": f32(yarn.factor),
            "rope.scaling.original_context_length": u32(yarn.original_max_position_embeddings),
        }
        for key in ("beta_fast", "beta_slow"):
            if _rope_settings(raw).get(key) is not None:
                keys[f"rope.scaling.yarn_{key}"] = f32(getattr(yarn, key))
    return keys | {"rope.freq_base": f32(config.rope_theta)}


def _rope_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    return dict(raw.get("rope_parameters") or {}) | dict(raw.get("rope_scaling") or {})


_LITE_LAYERS = (26, 27)
_LITE_48 = (48, 128256)  # layers and vocabulary of another model without query latents
_MAX_LAYERS = 512
_MAX_EXPERTS = 1024
_ROUTING = "llama.cpp can't route so"


def check_loadable(config: ModelConfig, where: object, *, drop_expert_groups: bool = False) -> None:
    """Raise InputError where llama.cpp would refuse the model, or would compute something else without a word."""

    def refuse(what: str, fix: str) -> InputError:
        return InputError(what, where=where, fix=fix)

    layers = config.num_hidden_layers
    if config.is_classifier:
        raise refuse(f"is a {config.architecture}", "llama.cpp runs language models only")
    if config.attention_bias:
        raise refuse("has attention biases", "llama.cpp's deepseek2 model has none: use FP8 or INT4 instead of GGUF")
    if layers > _MAX_LAYERS:
        raise refuse(f"has {layers} layers", f"llama.cpp takes {_MAX_LAYERS}")
    if not config.n_routed_experts or not config.n_shared_experts:
        raise refuse("has no routed or no shared experts", "llama.cpp's deepseek2 model needs both")
    if not 1 < config.n_routed_experts <= _MAX_EXPERTS:
        raise refuse(f"has {config.n_routed_experts} routed experts", f"llama.cpp takes 2 to {_MAX_EXPERTS}")
    if config.moe_layer_freq != 1:
        fix = "llama.cpp puts experts in every layer after the first dense ones"
        raise refuse(f"moe_layer_freq is {config.moe_layer_freq}", fix)
    is_lite = layers in _LITE_LAYERS or (layers, config.vocab_size) == _LITE_48
    if config.q_lora_rank is None and not is_lite:
        fix = "llama.cpp looks for query latents in every model whose number of layers is not 26 or 27"
        raise refuse(f"has {layers} layers and no q_lora_rank", fix)
    if config.q_lora_rank is not None and is_lite:
        fix = "llama.cpp takes a model of that depth for DeepSeek-V2-Lite, which has no query latents"
        raise refuse(f"has {layers} layers and a q_lora_rank", fix)
    if config.norm_topk_prob and (config.routed_scaling_factor != 1 or config.num_experts_per_tok == 1):
        # DeepSeek's MoEGate scales or normalises, the latter for more than one expert; llama.cpp does both.
        raise refuse("norm_topk_prob with a routed_scaling_factor, or with one expert per token", _ROUTING)
    if config.n_group > 1 and config.topk_group == config.n_group and not drop_expert_groups:
        raise refuse("topk_group equals n_group", "it limits nothing: use --drop-expert-groups")
    if 1 < config.n_group == config.n_routed_experts and not drop_expert_groups:
        fix = "llama.cpp wants two or more; the routing is the same without groups: use --drop-expert-groups"
        raise refuse("has one routed expert per group", fix)
    yarn = () if config.yarn is None else astuple(config.yarn)
    if max(config.routed_scaling_factor, config.rms_norm_eps, config.rope_theta, *yarn) > FLOAT32_MAX:
        raise refuse("has a number beyond float32's range", "GGUF holds float32: correct config.json")
    if config.yarn is not None and config.yarn.original_max_position_embeddings > UINT32_MAX:
        raise refuse("original_max_position_embeddings is beyond 32 bits", "GGUF holds 32: correct config.json")
    _check_yarn(config, refuse)


def _check_yarn(config: ModelConfig, refuse: Callable[[str, str], InputError]) -> None:
    """llama.cpp knows one number, mscale_all_dim, and takes mscale to be the same.

    With m(s) = 0.1 · s · ln(factor) + 1, DeepSeek scales the rotated halves by m(mscale) / m(mscale_all_dim) and the
    attention by m(mscale_all_dim)², unless that is 0; llama.cpp by 1 and m(mscale_all_dim)². Without mscale_all_dim it
    takes 1 for both and scales twice. At a factor of 1 all these are 1.
    """
    yarn = config.yarn
    if yarn is None or yarn.factor == 1 or (yarn.mscale == yarn.mscale_all_dim != 0):
        return
    what = f"YaRN's mscale is {yarn.mscale} and mscale_all_dim {yarn.mscale_all_dim}"
    raise refuse(what, "llama.cpp can only scale as if both were the same, and not 0")


def warnings(checkpoint: HfCheckpoint) -> list[str]:
    """What the user of the GGUF file should know, in one line each; none for a model that runs as it was trained."""
    found = []
    if checkpoint.config.n_group > 1:
        found.append(
            f"llama.cpp chooses among the {checkpoint.config.n_group} groups of experts by the sum of each group's two "
            "best scores (as DeepSeek-V3 does), not by the best one as DeepSeek-V2 was trained: some tokens go to "
            "other experts. --drop-expert-groups lets it choose from all experts instead; measure which is better."
        )
    found += checkpoint.bos_note()
    if _prompt_ends_in_space(checkpoint):
        found.append(
            "the chat template's generation prompt ends with a space after 'Assistant:', which no token of an answer "
            "follows: DeepSeek-V2-Lite then answers in Chinese or repeats itself. Remove the space from chat_template."
        )
    return found


def _prompt_ends_in_space(checkpoint: HfCheckpoint) -> bool:
    try:
        chat = Chat([{"role": "user", "content": "?"}], checkpoint.model)
        (prompt,) = checkpoint.templates().render([chat], generation_prompt=True)
    except InputError:  # no template, a broken one, or none downloaded: nothing that a conversion depends on
        return False
    return prompt != prompt.rstrip() and prompt.rstrip().endswith("Assistant:")
