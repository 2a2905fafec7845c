"""Small checkpoints that vLLM's attention on a CPU takes, and what is made of them.

Latents are 512 + 64 wide as in published models: MLA's kernels take no others. Widths are multiples of 256, so that
halves hold whole blocks and groups, of experts more than one, and W4A8 loads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import tiny

WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 768, "moe_intermediate_size": 512, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
LITE = tiny.LITE | WIDE | {"n_routed_experts": 4, "num_experts_per_tok": 2}
V2 = tiny.V2 | WIDE | {"q_lora_rank": 256, "n_routed_experts": 8}
V3 = tiny.V3 | WIDE | {"q_lora_rank": 256, "n_routed_experts": 8}
LLAMA = tiny.LLAMA | {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512}
PLAIN = tiny.PLAIN_V2 | {
    "hidden_size": 256, "moe_intermediate_size": 256, "max_position_embeddings": 512,
    "kv_lora_rank": 512,  # unused, but transformers' configuration takes no null
}  # fmt: skip
MODELS = {"lite": LITE, "v2": V2, "v3": V3, "llama": LLAMA, "plain": PLAIN}


class Case(NamedTuple):
    """An artifact of a model, by the options of `convert` (none: the model as it is), on so many GPUs' worth of
    processes; and parts of what vLLM must say it computes with. With `decode`, so many tokens are decoded."""

    model: str
    options: str
    path: tuple[str, ...]
    tp: int = 1
    decode: int = 0

    @property
    def name(self) -> str:
        words = [self.model, *(self.options or "bf16").replace("--", "").split()]
        words += [f"tp={self.tp}"] * (self.tp > 1) + ["decoded"] * (self.decode > 0)
        return "-".join(words)


FP8 = ("CompressedTensorsW8A8Fp8 ", "CompressedTensorsW8A8Fp8MoEMethod ")
BLOCK = ("Fp8LinearMethod ", "Fp8MoEMethod ")
INT4_EXPERTS = ("CompressedTensorsWNA16MoEMethod ",)
INT4 = ("CompressedTensorsWNA16 ", *INT4_EXPERTS)
MIXED = ("CompressedTensorsW8A8Fp8 ", *INT4_EXPERTS)
GPTQ = ("AutoGPTQLinearMethod ", "AutoGPTQMoEMethod ")
AWQ = ("AutoAWQMarlinLinearMethod ", "AutoAWQMoEMethod ")
INT8 = ("CompressedTensorsW8A8Int8 ", "CompressedTensorsW8A8Int8MoEMethod ")
W4A8 = ("CompressedTensorsW4A8Fp8 ", "CompressedTensorsW4A8Fp8MoEMethod ")

CASES = [
    Case("lite", "", ("UnquantizedLinearMethod",)),
    Case("lite", "--fp8=block", BLOCK),
    Case("lite", "--fp8=channel", FP8),
    Case("lite", "--fp8=channel", FP8, decode=8),
    Case("lite", "--fp8=tensor", FP8),
    Case("lite", "--fp8=static", FP8),
    Case("lite", "--fp8=static --format autofp8", BLOCK),
    Case("lite", "--int4=mixed", MIXED),
    Case("lite", "--int4=pure", INT4),
    Case("lite", "--int4=pure --group-size 64", INT4),
    Case("lite", "--int4=pure --group-size 32", INT4),
    Case("lite", "--int4=pure --group-size channel", INT4),
    Case("lite", "--int4=experts", INT4_EXPERTS),
    Case("lite", "--int4=pure --format gptq", GPTQ),
    Case("lite", "--int4=experts --format gptq", GPTQ[1:]),
    Case("lite", "--int4=pure --format awq", AWQ),
    Case("lite", "--int4=experts --format awq --group-size 64", AWQ[1:]),
    Case("lite", "--int8", INT8),
    Case("lite", "--w4a8", W4A8),
    Case("v2", "--fp8=block", BLOCK),
    Case("v2", "--int4=mixed", MIXED, decode=8),
    Case("v2", "--fp8=block", BLOCK, tp=2),
    Case("v2", "--int4=mixed", MIXED, tp=2),
    Case("v2", "--int4=pure --format gptq", GPTQ, tp=2),
    Case("v2", "--int4=pure --format awq", AWQ, tp=2),
    Case("v3", "--fp8=block", BLOCK),
    Case("v3", "--int4=mixed", MIXED),
    Case("v3", "--int4=experts --format gptq", GPTQ[1:]),
    Case("llama", "--fp8=channel", FP8[:1]),
    Case("llama", "--int4=pure", INT4[:1], tp=2),
    Case("llama", "--int4=pure --format gptq", GPTQ[:1]),
    Case("llama", "--int4=pure --format awq", AWQ[:1]),
    Case("llama", "--int8", INT8[:1]),
    Case("plain", "--fp8=channel", FP8),
]
