"""Small models with DeepSeek's own head widths, for engines whose kernels take no others (benchmarks/engines.py).

    python benchmarks/engine_models.py OUT

writes OUT/lite, OUT/v2, OUT/v3 and OUT/llama. The first three are dsv2-mini, widened: its latents, heads and experts
are turned into wider ones by matrices with orthonormal columns, which changes the function by rounding alone. So they
speak, and every matrix is dense and of a published width (512 + 64 latent, 128 + 64 / 128 heads). What the kinds differ
in does change the function, somewhat: `lite` has no query latent, `v2` chooses experts in 3 of 4 groups and scales them
by 16, `v3` weighs them by normalized sigmoids. `llama` has random weights, and a head that makes its logits as wide as
a model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MINI = Path(__file__).parent.parent / "examples" / "dsv2-mini"
KINDS = ("lite", "v2", "v3", "llama")
LATENT, NOPE, ROPE, VALUE = 512, 128, 64, 128
WIDER = {"kv_lora_rank": LATENT, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE}
V2_SCALE, V3_SCALE = 16.0, 2.5  # routed_scaling_factor, as published
V3_SHARE = 0.6  # of softmax's weights that dsv2-mini's chosen experts have: sigmoids are normalized to 1
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": 4096,
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip

Weights = dict[str, torch.Tensor]


def make(kind: str, out: Path, seed: int = 0) -> Path:
    """One of KINDS, in BF16 beside dsv2-mini's tokenizer."""
    draw = torch.Generator().manual_seed(seed)
    config, weights = llama(draw) if kind == "llama" else widened(kind, draw)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(MINI / name, out)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    save_file({name: weight.bfloat16().contiguous() for name, weight in weights.items()}, out / "model.safetensors")
    return out


def widened(kind: str, draw: torch.Generator) -> tuple[dict[str, Any], Weights]:
    config = json.loads((MINI / "config.json").read_text()) | WIDER
    weights: Weights = {}
    for path in MINI.glob("*.safetensors"):
        weights |= {name: weight.double() for name, weight in load_file(path).items()}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        _widen_attention(weights, prefix, kind, config, draw)
        for name in [n for n in weights if n.startswith(f"{prefix}.mlp.experts.")]:
            columns = name.endswith("down_proj.weight")
            weights[name] = weights[name].repeat_interleave(2, 1 if columns else 0) / (2 if columns else 1)
    config["moe_intermediate_size"] *= 2
    config["n_shared_experts"] //= 2  # they are as wide as before
    config["q_lora_rank"] = None if kind == "lite" else LATENT
    if kind == "v2":
        config |= {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 3}
        _scale_experts(config, weights, V2_SCALE, 1.0)
    if kind == "v3":
        config |= {
            "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "topk_method": "noaux_tc",
            "n_group": 4, "topk_group": 3, "scoring_func": "sigmoid", "norm_topk_prob": True,
            "num_nextn_predict_layers": 0,
        }  # fmt: skip
        _scale_experts(config, weights, V3_SCALE, V3_SHARE)
        for name in [n for n in weights if n.endswith("mlp.gate.weight")]:
            bias = 0.01 * torch.randn(config["n_routed_experts"], generator=draw).double()
            weights[name.replace(".weight", ".e_score_correction_bias")] = bias
    return config, weights


def _widen_attention(weights: Weights, prefix: str, kind: str, config: dict[str, Any], draw: torch.Generator) -> None:
    """Latents x become Q x, and heads' parts R x, with Q'Q = R'R = 1. RMSNorm over four times the width divides by
    half: its weight is 1/2, and dsv2-mini's own goes into the next matrix. Scores are divided by twice as much: queries
    are doubled. RoPE's pair i of 8 becomes pair 4i of 32, which has its frequency (YaRN's correction rounds apart)."""
    attention, heads = f"{prefix}.self_attn", config["num_attention_heads"]

    def take(name: str) -> torch.Tensor:
        return weights.pop(f"{attention}.{name}.weight")

    def put(name: str, weight: torch.Tensor) -> None:
        weights[f"{attention}.{name}.weight"] = weight

    def norm(width: int) -> torch.Tensor:
        return torch.full((width,), 0.5, dtype=torch.float64)

    kv_a, gain, kv_b = take("kv_a_proj_with_mqa"), take("kv_a_layernorm"), take("kv_b_proj")
    latent = len(gain)
    turn, nope, value = _columns(LATENT, latent, draw), _columns(NOPE, 32, draw), _columns(VALUE, 32, draw)
    put("kv_a_proj_with_mqa", torch.cat([turn @ kv_a[:latent], _spread(kv_a[latent:])]))
    put("kv_a_layernorm", norm(LATENT))
    keys, values = (kv_b * gain @ turn.T).unflatten(0, (heads, -1)).split(32, 1)
    put("kv_b_proj", torch.cat([nope @ keys, value @ values], 1).flatten(0, 1))
    put("o_proj", (take("o_proj").unflatten(1, (heads, -1)) @ value.T).flatten(1))
    q_a, gain, q_b = take("q_a_proj"), take("q_a_layernorm"), take("q_b_proj")
    plain, turned = (q_b * gain).unflatten(0, (heads, -1)).split([32, 16], 1)
    q = 2 * torch.cat([nope @ plain, torch.stack([_spread(head) for head in turned])], 1).flatten(0, 1)
    if kind == "lite":
        # Without the norm between them; its divisor is that of inputs as RMSNorm makes them.
        root_mean_square = (q_a * weights[f"{prefix}.input_layernorm.weight"]).norm() / len(gain) ** 0.5
        put("q_proj", q @ q_a / root_mean_square)
        return
    turn = _columns(LATENT, len(gain), draw)
    put("q_a_proj", turn @ q_a)
    put("q_a_layernorm", norm(LATENT))
    put("q_b_proj", q @ turn.T)


def _columns(rows: int, columns: int, draw: torch.Generator) -> torch.Tensor:
    """A random matrix with orthonormal columns."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=draw, dtype=torch.float64)).Q


def _spread(rows: torch.Tensor) -> torch.Tensor:
    """RoPE's rows, in pairs, at every fourth pair."""
    wider = rows.new_zeros(ROPE, rows.shape[1])
    wider.view(-1, 2, rows.shape[1])[:: ROPE // len(rows)] = rows.view(-1, 2, rows.shape[1])
    return wider


def _scale_experts(config: dict[str, Any], weights: Weights, factor: float, share: float) -> None:
    config["routed_scaling_factor"] = factor
    for name in weights:
        if ".experts." in name and name.endswith("down_proj.weight"):
            weights[name] = weights[name] * share / factor


def llama(draw: torch.Generator) -> tuple[dict[str, Any], Weights]:
    config, weights = dict(LLAMA), {}
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    width = hidden // config["num_attention_heads"]
    kv = config["num_key_value_heads"] * width

    def linear(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        weights[f"{name}.weight"] = torch.randn(rows, columns, generator=draw) * scale / columns**0.5

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(hidden, generator=draw)

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.input_layernorm")
        norm(f"{prefix}.post_attention_layernorm")
        for name, rows in {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}.items():
            linear(f"{prefix}.self_attn.{name}", rows, hidden)
        linear(f"{prefix}.mlp.gate_proj", ffn, hidden)
        linear(f"{prefix}.mlp.up_proj", ffn, hidden)
        linear(f"{prefix}.mlp.down_proj", hidden, ffn)
    norm("model.norm")
    linear("model.embed_tokens", config["vocab_size"], hidden, hidden**0.5)
    linear("lm_head", config["vocab_size"], hidden, 1.5)
    return config, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for kind in KINDS:
        print(make(kind, out / kind))


if __name__ == "__main__":
    main()
