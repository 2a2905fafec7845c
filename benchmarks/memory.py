"""`dsv2quant memory` beside what torch's allocator counts on a GPU.

    python benchmarks/memory.py --scratch DIR --results benchmarks/results/memory.csv

Random BF16 checkpoints of DeepSeek-LLM 7B's widths (8 layers) and V2-Lite's (4 layers) are written to DIR, 9 GB, and
opened by the torch runtime. `flash` rows are a prefill of that into a cache. `eager` rows are the same weights in a
forward pass as transformers 4.35 wrote it, with the next token's longer cache. Each row begins with an empty allocator.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")  # the planner's; on Hopper torch takes 32 MiB

import torch
from safetensors.torch import save_file

import dsv2quant as dq
from dsv2quant import __version__
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.bench.device import append
from dsv2quant.model.attention import GroupedAttention
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model

GIB = 1 << 30
LLM_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 102400, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
FLASH = ((1, 2048), (1, 16384), (4, 4096), (16, 1024))
EAGER = ((1, 2048), (1, 4096), (4, 1024), (8, 512), (4, 2048), (16, 256))


def write(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    specs = architecture(model_config(config, folder)).specs()
    tensors = {s.name: (torch.randn(s.shape, device="cuda") / math.sqrt(s.shape[-1])).bfloat16().cpu() for s in specs}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def flash(model: Model, tokens: torch.Tensor) -> None:
    caches = model.caches(*tokens.shape)
    model.next_logits(tokens, caches)


@torch.inference_mode()
def eager(model: Model, tokens: torch.Tensor) -> None:
    """`LlamaForCausalLM.forward` of transformers 4.35, and the caches of the next token's."""
    batch, length = tokens.shape
    x = embedded = model.ends.embed(tokens)
    mask = padded_mask(batch, length)
    angles = torch.outer(torch.arange(length, device="cuda").float(), model._rope._frequencies).repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    cache: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in model.layers():
        x = decoder_layer(layer, x, mask, cos, sin, cache)
    x = model.ends.norm(x)
    del embedded, mask
    logits = model.ends.head(x).float()
    del x
    grown = [tuple(torch.cat([part, part[:, :, -1:]], 2) for part in parts) for parts in cache]
    del grown, logits


def padded_mask(batch: int, length: int) -> torch.Tensor:
    """`AttentionMaskConverter.to_4d`."""
    lowest = torch.finfo(torch.bfloat16).min
    causal = torch.full((length, length), lowest, device="cuda")
    causal.masked_fill_(torch.ones(length, length, dtype=torch.bool, device="cuda").tril(), 0)
    causal = causal.bfloat16()
    ones = torch.ones(batch, 1, 1, length, dtype=torch.long, device="cuda").expand(batch, 1, length, length)
    expanded = ones.bfloat16()
    inverted = 1.0 - expanded
    del expanded
    padding = inverted.masked_fill(inverted.bool(), lowest)
    del inverted
    return padding + causal


def decoder_layer(
    layer: Any, x: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    cache: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:  # fmt: skip
    hidden = layer.input_layernorm(x)
    hidden = attention(layer.attention, hidden, mask, cos, sin, cache)
    hidden = x + hidden
    residual = hidden
    hidden = layer.post_attention_layernorm(hidden)
    ffn = layer.ffn
    hidden = ffn.down_proj(torch.nn.functional.silu(ffn.gate_proj(hidden)) * ffn.up_proj(hidden))
    return residual + hidden


def attention(
    a: GroupedAttention, hidden: torch.Tensor, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    cache: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:  # fmt: skip
    width = a.config.qk_head_dim
    q, k, v = (p(hidden).unflatten(-1, (-1, width)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
    q, k = rotated(q, k, cos, sin)
    cache.append((k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(width)
    scores = scores + mask
    scores = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    out = torch.matmul(scores, v)
    out = out.transpose(1, 2).contiguous().flatten(2)
    return a.o_proj(out)


def rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(q.shape[2], device="cuda").expand(q.shape[0], -1)
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)

    def halves(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    return (q * cos) + (halves(q) * sin), (k * cos) + (halves(k) * sin)


def measured(run: Callable[[Model, torch.Tensor], None], model: Model, batch: int, context: int) -> tuple[int, int]:
    """Bytes allocated and reserved at most."""
    tokens = torch.randint(model.config.vocab_size, (batch, context), device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run(model, tokens)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def row(name: str, folder: Path, model: Model, prefill: str, batch: int, context: int) -> dict[str, Any]:
    cell = dq.memory(folder, batch=(batch,), context=(context,), prefill=prefill).cells[0]
    allocated, reserved = measured(eager if prefill == "eager" else flash, model, batch, context)
    result = {"model": name, "prefill": prefill, "batch": batch, "context": context}
    for kind, planned, found in (("allocated", cell.allocated, allocated), ("reserved", cell.total, reserved)):
        result[f"planned {kind} GiB"] = f"{planned / GIB:.3f}"
        result[f"{kind} GiB"] = f"{found / GIB:.3f}"
        result[f"{kind} error %"] = f"{100 * (planned / found - 1):+.2f}"
    result["GPU"] = torch.cuda.get_device_name()
    result["versions"] = f"dsv2quant {__version__}, torch {torch.__version__}"
    print(*result.values(), file=sys.stderr)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    lite = json.loads(resources.files("dsv2quant").joinpath("bench", "configs", "v2-lite.json").read_text("utf-8"))
    for name, config in (("7B, 8 layers", LLM_7B), ("V2-Lite, 4 layers", lite | {"num_hidden_layers": 4})):
        folder = write(arguments.scratch / name.split(",")[0], config)
        model = Model(dq.open(folder), LoadOptions(torch.bfloat16, "cuda"))
        cells = [("flash", *cell) for cell in FLASH] + [("eager", *cell) for cell in EAGER] * (config is LLM_7B)
        append(arguments.results, [row(name, folder, model, *cell) for cell in cells])
        del model
    free, total = torch.cuda.mem_get_info()
    other = total - free - torch.cuda.memory_reserved()
    print(f"torch reports {total / GIB:.2f} GiB, of which {other / GIB:.2f} are in use beside its own", file=sys.stderr)


if __name__ == "__main__":
    main()
