"""DeepSeek's models of plain attention and experts in float64: deepseek-moe-16b, and DeepSeek-V2's `use_mla: false`.

transformers has no class for them. The arithmetic is that of the code published with the checkpoints
(modeling_deepseek.py: DeepseekForCausalLM, and LlamaAttention of DeepseekV2ForCausalLM), with every expert a loop.
"""

from __future__ import annotations

from typing import Any

import torch

Weights = dict[str, torch.Tensor]


def logits(config: dict[str, Any], weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """The logits [batch, tokens, vocabulary] of token numbers [batch, tokens], in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["model.embed_tokens.weight"][tokens]
    for index in range(config["num_hidden_layers"]):
        at, eps = f"model.layers.{index}", config["rms_norm_eps"]
        x = x + _attention(config, w, f"{at}.self_attn", _norm(x, w[f"{at}.input_layernorm.weight"], eps))
        normed = _norm(x, w[f"{at}.post_attention_layernorm.weight"], eps)
        x = x + (_experts(config, w, at, normed) if f"{at}.mlp.gate.weight" in w else _ffn(w, f"{at}.mlp", normed))
    return _norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _ffn(w: Weights, at: str, x: torch.Tensor) -> torch.Tensor:
    gate, up = x @ w[f"{at}.gate_proj.weight"].T, x @ w[f"{at}.up_proj.weight"].T
    return (torch.nn.functional.silu(gate) * up) @ w[f"{at}.down_proj.weight"].T


def _attention(config: dict[str, Any], w: Weights, at: str, x: torch.Tensor) -> torch.Tensor:
    batch, length, hidden = x.shape
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = hidden // heads
    q, k, v = (
        (x @ w[f"{at}.{name}_proj.weight"].T).view(batch, length, count, width).transpose(1, 2)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    inverse = config["rope_theta"] ** -(torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.arange(length).double(), inverse).repeat(1, 2)
    q, k = (part * angles.cos() + _rotated(part) * angles.sin() for part in (q, k))
    k, v = (part.repeat_interleave(heads // kv_heads, 1) for part in (k, v))
    scores = q @ k.transpose(2, 3) / width**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[f"{at}.o_proj.weight"].T


def _rotated(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _experts(config: dict[str, Any], w: Weights, at: str, x: torch.Tensor) -> torch.Tensor:
    shape, out = x.shape, _ffn(w, f"{at}.mlp.shared_experts", x).flatten(0, 1)
    x = x.flatten(0, 1)
    weights, chosen = (x @ w[f"{at}.mlp.gate.weight"].T).softmax(-1).topk(config["num_experts_per_tok"])
    if config["norm_topk_prob"]:
        weights = weights / weights.sum(-1, keepdim=True)
    for token, (numbers, shares) in enumerate(zip(chosen.tolist(), weights, strict=True)):
        for number, share in zip(numbers, shares, strict=True):
            out[token] += share * _ffn(w, f"{at}.mlp.experts.{number}", x[token : token + 1])[0]
    return out.view(shape)
