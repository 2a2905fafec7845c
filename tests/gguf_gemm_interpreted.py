"""The kernels for GGUF weights by Triton's interpreter against their torch references: a program of its own, since
Triton reads TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python tests/gguf_gemm_interpreted.py

Prints one JSON object: the relative error of each case, or of `dequantize` whether any bit differs.
"""

from __future__ import annotations

import json

import torch
import triton.language as tl
from gguf_weights import error, random_choices, random_weight

from dsv2quant.kernels import gguf_gemm as gguf_product
from dsv2quant.kernels.gguf_experts import experts_product
from dsv2quant.kernels.gguf_gemm import Config, dequantize, linear
from dsv2quant.kernels.gguf_layout import SPECS
from dsv2quant.kernels.reference import dequantize_gguf, linear_gguf, sort_pairs
from dsv2quant.kernels.reference import experts_product as experts_twin

SPLIT = Config(64, 16, 2, 4, 3)
CASES = {  # type, rows, columns, tokens, config
    "tails of rows": ("Q4_K", 72, 256, 3, SPLIT),
    "tail of columns, tokens in two programs": ("Q5_1", 64, 160, 17, Config(64, 16, 1, 4, 3)),
    "split unevenly, two blocks of rows": ("Q8_0", 128, 384, 5, Config(128, 16, 2, 4, 3)),
    "8 tokens in a program": ("Q4_1", 64, 160, 9, Config(64, 8, 1, 4, 3)),
    "chosen": ("Q6_K", 64, 256, 1, None),
}


def main() -> None:
    torch.manual_seed(0)
    found: dict[str, float] = {}
    for name, spec in SPECS.items():
        weight = random_weight(name, (8, 256 if spec.values == 256 else 96))
        x = torch.randn(2, weight.columns)
        found[f"{name} product"] = error(
            linear(x, weight, config=Config(64, 16, 1, 4, 3)), linear_gguf(x.double(), weight)
        )
        values = dequantize(weight, torch.float32).view(torch.int32)
        found[f"{name} values"] = float(not torch.equal(values, dequantize_gguf(weight).view(torch.int32)))
    for case, (name, rows, columns, tokens, config) in CASES.items():
        weight = random_weight(name, (rows, columns))
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(tokens, columns).div(64).to(dtype)  # what float16 holds of the product
            out = torch.full((tokens, rows), torch.nan, dtype=dtype)
            for _ in range(2):  # twice: the counters are as they were
                linear(x, weight, out, config)
            found[f"{case} {dtype}"] = error(out, linear_gguf(x.double(), weight))
    gguf_product.NARROW = tl.constexpr(not gguf_product.NARROW.value)
    weight = random_weight("Q5_1", (64, 160))
    x = torch.randn(3, 160)
    got = linear(x, weight, config=Config(64, 8, 1, 4, 3))
    found["8 tokens in the other order"] = error(got, linear_gguf(x.double(), weight))
    many = random_weight("Q8_0", (8, 32))
    x = torch.randn(130, 32)
    found["many tokens"] = error(linear(x, many), linear_gguf(x.double(), many))
    for name, columns in (("Q4_1", 160), ("Q2_K", 256)):
        stack = random_weight(name, (3, 72, columns))
        found[f"stack {name} values"] = float(not torch.equal(dequantize(stack, torch.float32), dequantize_gguf(stack)))
        chosen = random_choices(9, 2, 3)
        routes = sort_pairs(chosen, 3, 16)
        x, weights = torch.randn(18, columns), torch.rand(9, 2)
        for config in (SPLIT, None):
            got = experts_product(x[:9], routes, 2, stack, config=config)
            found[f"experts {name} {config}"] = error(got, experts_twin(x[:9].double(), routes, 2, stack))
        got = experts_product(x, routes, 1, stack, weights)
        found[f"experts {name} weighted"] = error(got, experts_twin(x, routes, 1, stack, weights))
    try:
        linear(torch.zeros(1, 32).bfloat16(), many)
    except ValueError as refused:
        found[str(refused)] = 0.0
    print(json.dumps(found))


if __name__ == "__main__":
    main()
