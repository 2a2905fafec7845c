"""What llama.cpp's models can't run, or run otherwise than the family's own code does.

Sources: llama.cpp src/models (llama.cpp, deepseek.cpp, deepseek2.cpp, deepseek2ocr.cpp), src/llama-model.cpp
(load_hparams), src/llama-context.cpp (YaRN), src/llama-graph.cpp (build_moe_ffn).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from functools import partial

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.errors import InputError
from dsv2quant.storage.gguf import FLOAT32_MAX, UINT32_MAX

Refuse = Callable[[str, str], InputError]
_LITE_LAYERS = (26, 27)
_LITE_48 = (48, 128256)  # layers and vocabulary of another model without query latents
_MAX_LAYERS = 512
_MAX_EXPERTS = 1024
_ROUTING = "llama.cpp can't route so"
_OTHERS = "use FP8 or INT4 instead of GGUF"


def check_loadable(config: ModelConfig, where: object, *, drop_expert_groups: bool = False) -> None:
    """Raise InputError where llama.cpp would refuse the model, or would compute something else without a word."""
    refuse = partial(_refusal, where)
    layers = config.num_hidden_layers
    if config.is_classifier:
        raise refuse(f"is a {config.architecture}", "llama.cpp runs language models only")
    if layers > _MAX_LAYERS:
        raise refuse(f"has {layers} layers", f"llama.cpp takes {_MAX_LAYERS}")
    yarn = () if config.yarn is None else astuple(config.yarn)
    if max(config.routed_scaling_factor, config.rms_norm_eps, config.rope_theta, *yarn) > FLOAT32_MAX:
        raise refuse("has a number beyond float32's range", "GGUF holds float32: correct config.json")
    if config.yarn is not None and config.yarn.original_max_position_embeddings > UINT32_MAX:
        raise refuse("original_max_position_embeddings is beyond 32 bits", "GGUF holds 32: correct config.json")
    for check in _CHECKS[config.gguf]:
        check(config, refuse)
    if drop_expert_groups and config.group_score == "top2" and config.topk_group < config.n_group:
        raise refuse("--drop-expert-groups", "llama.cpp routes within groups as this model does: leave it out")
    if not drop_expert_groups:
        _check_groups(config, refuse)


def _refusal(where: object, what: str, fix: str) -> InputError:
    return InputError(what, where=where, fix=fix)


def _check_no_bias(config: ModelConfig, refuse: Refuse) -> None:
    if config.attention_bias:
        raise refuse("has attention biases", f"llama.cpp's {config.gguf} model has none: {_OTHERS}")


def _check_experts(config: ModelConfig, refuse: Refuse) -> None:
    if not config.n_routed_experts or not config.n_shared_experts:
        raise refuse("has no routed or no shared experts", f"llama.cpp's {config.gguf} model needs both")
    if not 1 < config.n_routed_experts <= _MAX_EXPERTS:
        raise refuse(f"has {config.n_routed_experts} routed experts", f"llama.cpp takes 2 to {_MAX_EXPERTS}")
    if config.moe_layer_freq != 1:
        fix = "llama.cpp puts experts in every layer after the first dense ones"
        raise refuse(f"moe_layer_freq is {config.moe_layer_freq}", fix)


def _check_weights(config: ModelConfig, refuse: Refuse) -> None:
    """llama.cpp normalises, and scales; DeepSeek-V2's MoEGate does one of them, the former for several experts."""
    router = architecture(config).router
    assert router is not None
    if router.scale != config.routed_scaling_factor or (config.norm_topk_prob and config.num_experts_per_tok == 1):
        raise refuse("norm_topk_prob with a routed_scaling_factor, or with one expert per token", _ROUTING)


def _check_groups(config: ModelConfig, refuse: Refuse) -> None:
    if config.n_group > 1 and config.topk_group == config.n_group:
        raise refuse("topk_group equals n_group", "it limits nothing: use --drop-expert-groups")
    if 1 < config.n_group == config.n_routed_experts:
        fix = "llama.cpp wants two or more; the routing is the same without groups: use --drop-expert-groups"
        raise refuse("has one routed expert per group", fix)


def _check_latent(config: ModelConfig, refuse: Refuse) -> None:
    layers = config.num_hidden_layers
    is_lite = layers in _LITE_LAYERS or (layers, config.vocab_size) == _LITE_48
    if config.q_lora_rank is None and not is_lite:
        fix = "llama.cpp looks for query latents in every model whose number of layers is not 26 or 27"
        raise refuse(f"has {layers} layers and no q_lora_rank", fix)
    if config.q_lora_rank is not None and is_lite:
        fix = "llama.cpp takes a model of that depth for DeepSeek-V2-Lite, which has no query latents"
        raise refuse(f"has {layers} layers and a q_lora_rank", fix)
    if config.rope_halves:
        raise refuse("rope_interleave is false", f"llama.cpp's deepseek2 model rotates neighbours: {_OTHERS}")


def _check_yarn(config: ModelConfig, refuse: Refuse) -> None:
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


def _check_plain_heads(config: ModelConfig, refuse: Refuse) -> None:
    if config.num_attention_heads * config.v_head_dim != config.hidden_size:
        what = f"has {config.num_attention_heads} heads of {config.v_head_dim}"
        raise refuse(what, f"llama.cpp takes them to be hidden_size, {config.hidden_size}, together")
    if config.rope_linear != 1:
        raise refuse("scales RoPE", f"llama.cpp's {config.gguf} model does not: {_OTHERS}")


def _check_deepseek(config: ModelConfig, refuse: Refuse) -> None:
    if config.norm_topk_prob:
        raise refuse("norm_topk_prob", f"llama.cpp's deepseek model does not normalise: {_OTHERS}")


def _check_ocr(config: ModelConfig, refuse: Refuse) -> None:
    if config.num_key_value_heads != config.num_attention_heads:
        what = f"has {config.num_key_value_heads} heads of keys for {config.num_attention_heads} of queries"
        raise refuse(what, f"llama.cpp's {config.gguf} model has as many: {_OTHERS}")
    if config.rope_theta != 10000:
        raise refuse(f"rope_theta is {config.rope_theta}", f"llama.cpp's {config.gguf} model takes 10000: {_OTHERS}")


_CHECKS: dict[str, tuple[Callable[[ModelConfig, Refuse], None], ...]] = {
    "llama": (),
    "deepseek": (_check_no_bias, _check_experts, _check_plain_heads, _check_deepseek),
    "deepseek2": (_check_no_bias, _check_experts, _check_latent, _check_weights, _check_yarn),
    "deepseek2-ocr": (_check_no_bias, _check_experts, _check_plain_heads, _check_weights, _check_ocr),
}
