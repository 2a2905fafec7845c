"""INT2, INT3 and INT4 in the Humming kernels that vLLM 0.33 serves them by: of what we store, what do they make?

    pip install 'humming-kernels[cu13]==0.1.20'
    python benchmarks/humming.py --results benchmarks/results/humming.csv

Tensors as artifacts hold them, half of their scales negative, go through Humming's own reader of compressed-tensors and
its kernels in vLLM's order of calls (vLLM 0.33, utils/humming/moe.py and fused_humming_moe.py): a linear, and experts
that rows of ids choose. `error` is of the outputs, in BF16, relative to x · decodeᵀ in float32, both in the root of
squares: some 2e-3 is what rounding to BF16 makes, a misread code or scale makes it 1. Shapes are DeepSeek-V2's and
dsv2-mini's.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from humming.config import GemmType
from humming.forward import humming_forward
from humming.schema import HummingInputSchema
from humming.schema.compressed_tensors import CompressedTensorsWeightSchema
from humming.transform import prepare_and_transform_humming_tensors
from humming.tune import get_heuristics_config

from dsv2quant import __version__
from dsv2quant.bench.device import append
from dsv2quant.formats.schemes import CODECS

DEVICE, BF16 = torch.device("cuda", 0), torch.bfloat16
CHOSEN = 6  # experts of a token
# rows, columns, tokens, experts; none is a linear
SHAPES = ((1536, 5120, 16, 0), (3072, 5120, 4, 16), (5120, 1536, 4, 16), (128, 256, 8, 16))


def stored(scheme: str, rows: int, columns: int, count: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts of `count` random matrices [rows, columns], stacked, and what they decode to."""
    codec, parts, weights = CODECS[scheme], [], []
    for _ in range(count):
        made = codec.encode_tensor(torch.randn(rows, columns, device=DEVICE) * columns**-0.5)
        signs = torch.randint(0, 2, made["weight_scale"].shape, device=DEVICE) * 2 - 1
        made["weight_scale"] = made["weight_scale"] * signs
        parts.append({name: part.to(DEVICE) for name, part in made.items()})
        weights.append(codec.decode(made, torch.float32))
    stacked = {name: torch.stack([part[name] for part in parts]) for name in ("weight_packed", "weight_scale")}
    return stacked, torch.stack(weights)


def error(bits: int, group: int, rows: int, columns: int, tokens: int, experts: int) -> float:
    """Of one product of random tokens [tokens, columns]."""
    parts, weights = stored(f"int{bits}-g{group}", rows, columns, max(experts, 1))
    if not experts:
        parts = {name: part[0] for name, part in parts.items()}
    schema = CompressedTensorsWeightSchema(
        format="pack-quantized", type="int", num_bits=bits, strategy="group", group_size=group, symmetric=True
    )
    schema, tensors = schema.convert_humming(
        tensors=parts, shape_n_stacks=[rows], shape_k_stacks=[columns], param_dtype=BF16, num_experts=experts or None
    )
    config, tensors = prepare_and_transform_humming_tensors(
        tensors=tensors, shape_n=rows, shape_k=columns, pad_n_to_multiple=256, pad_k_to_multiple=128,
        input_schema=HummingInputSchema(), weight_schema=schema, num_experts=experts or None, torch_dtype=BF16,
        device=DEVICE,
    )  # fmt: skip
    kind = GemmType.INDEXED if experts else GemmType.DENSE
    tuning = get_heuristics_config(layer_config=config, use_f16_accum=False, use_batch_invariant=False, gemm_type=kind)
    x = torch.randn(tokens, columns, device=DEVICE, dtype=BF16)
    compute = {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": kind.value}
    asked: dict[str, Any] = {
        "compute_config": json.dumps(compute), "tuning_config": json.dumps(tuning),
        "locks": torch.zeros(132 * 8 * 8, dtype=torch.int32, device=DEVICE),
    }  # fmt: skip
    if experts:
        chosen = torch.stack([torch.randperm(experts, device=DEVICE)[:CHOSEN] for _ in range(tokens)])
        want = torch.einsum("tk,trk->tr", x.float().repeat_interleave(CHOSEN, 0), weights[chosen.view(-1)])
        out = torch.empty(len(want), config.shape_n - config.pad_shape_n, dtype=BF16, device=DEVICE)
        asked |= _sorted(chosen, experts, tuning) | {"outputs": out}
    else:
        want = x.float() @ weights[0].T
    got = humming_forward(config, inputs=x, weight=tensors["weight"], weight_scale=tensors["weight_scale"], **asked)
    got = asked.get("outputs") if got is None else got
    got = got.float().view(len(want), -1)[:, :rows]
    return float((got - want).norm() / want.norm())


def _sorted(chosen: torch.Tensor, experts: int, tuning: Any) -> dict[str, Any]:
    """Places of `chosen` [tokens, CHOSEN] by expert, each expert's padded to whole blocks, as vLLM has them."""
    share = chosen.numel()  # estimate_local_valid_shape_m without expert parallelism
    block = next(c["block_shape"][0] for low, high, c in tuning if low < share <= high)
    ids, owners = [], []
    for expert in range(experts):
        mine = torch.where(chosen.view(-1) == expert)[0]
        count = -(-len(mine) // block)
        ids.append(torch.nn.functional.pad(mine, (0, count * block - len(mine)), value=share))
        owners += [expert] * count
    places = torch.cat(ids).int()
    return {
        "sorted_ids": places, "expert_ids": torch.tensor(owners, dtype=torch.int32, device=DEVICE),
        "num_tokens_padded": torch.tensor([len(places)], dtype=torch.int32, device=DEVICE),
        "top_k": CHOSEN, "valid_shape_m": share,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    versions = f"dsv2quant {__version__}, humming-kernels 0.1.20, torch {torch.__version__}"
    for bits, group, shape in itertools.product((2, 3, 4), (128, 64, 32), SHAPES):
        rows, columns, tokens, experts = shape
        row = {
            "bits": bits, "group": group, "rows": rows, "columns": columns, "tokens": tokens, "experts": experts,
            "error": f"{error(bits, group, *shape):.2e}", "device": torch.cuda.get_device_name(), "versions": versions,
        }  # fmt: skip
        print(row, flush=True)
        append(options.results, [row])


if __name__ == "__main__":
    main()
