"""What llama.cpp's deepseek2 model can't run, or runs otherwise than DeepSeek's own code does.

Sources: llama.cpp src/models/deepseek2.cpp, src/llama-model.cpp (load_hparams), src/llama-context.cpp (YaRN),
src/llama-graph.cpp (build_moe_ffn).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

from dsv2quant.calib.chat import Chat, Templates
from dsv2quant.calib.tokenizer_file import bos_note
from dsv2quant.checkpoint import Checkpoint
from dsv2quant.config import CAUSAL_LM, ModelConfig
from dsv2quant.errors import InputError
from dsv2quant.formats.gguf.values import FLOAT32_MAX, UINT32_MAX

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
    if config.architecture != CAUSAL_LM:
        raise refuse(f"is a {config.architecture}", f"llama.cpp runs {CAUSAL_LM} only")
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


def warnings(checkpoint: Checkpoint) -> list[str]:
    """What the user of the GGUF file should know, in one line each; none for a model that runs as it was trained."""
    found = []
    if checkpoint.config.n_group > 1:
        found.append(
            f"llama.cpp chooses among the {checkpoint.config.n_group} groups of experts by the sum of each group's two "
            "best scores (as DeepSeek-V3 does), not by the best one as DeepSeek-V2 was trained: some tokens go to "
            "other experts. --drop-expert-groups lets it choose from all experts instead; measure which is better."
        )
    if checkpoint.folder is not None:
        found += bos_note(checkpoint.folder)
    if checkpoint.folder is not None and _prompt_ends_in_space(checkpoint):
        found.append(
            "the chat template's generation prompt ends with a space after 'Assistant:', which no token of an answer "
            "follows: DeepSeek-V2-Lite then answers in Chinese or repeats itself. Remove the space from chat_template."
        )
    return found


def _prompt_ends_in_space(checkpoint: Checkpoint) -> bool:
    try:
        chat = Chat([{"role": "user", "content": "?"}], checkpoint.model)
        (prompt,) = Templates.of(checkpoint).render([chat], generation_prompt=True)
    except InputError:  # no template, or a broken one: nothing that a conversion depends on
        return False
    return prompt != prompt.rstrip() and prompt.rstrip().endswith("Assistant:")
