"""The INT4 kernels by Triton's interpreter against their torch references: a program of its own, since Triton reads
TRITON_INTERPRET when it is imported.

    TRITON_INTERPRET=1 python tests/int4_interpreted.py

Prints one JSON object: the relative error of each case, or of `dequantize` whether any value differs.
"""

from __future__ import annotations

import json

import torch
from int4_cases import error, random_weight

from dsv2quant.kernels.int4_gemm import Config, dequantize, linear
from dsv2quant.kernels.int4_held import Held
from dsv2quant.kernels.reference import dequantize_int4, linear_int4

CASES = {  # rows, columns, group, zeros, ordered, tokens, config
    "group 128": (64, 256, 128, False, False, 3, Config(64, 16, 1, 4, 3)),
    "split unevenly": (128, 640, 128, False, False, 5, Config(128, 16, 2, 4, 3)),
    "tails of rows and zeros": (200, 192, 64, True, False, 5, Config(128, 16, 2, 4, 3)),
    "group 32, tokens in two programs": (72, 96, 32, True, False, 17, Config(64, 16, 3, 4, 3)),
    "channel, tail of columns": (136, 200, 200, True, False, 4, Config(128, 16, 2, 4, 2)),
    "held at once": (64, 256, 128, False, False, 3, Held(1, 2)),
    "held in two parts": (128, 512, 128, True, False, 16, Held(2, 1)),
    "held, uneven parts, tails of rows": (136, 704, 64, False, False, 5, Held(3, 1)),
    "held, tokens in two programs": (72, 416, 32, True, False, 17, Held(2, 1)),
    "held, more parts than groups": (72, 64, 32, True, False, 2, Held(3, 4)),
    "held, channel, tail of columns": (136, 328, 328, True, False, 4, Held(2, 2)),
    "in another order": (64, 128, 32, False, True, 1, None),
    "chosen": (200, 768, 64, False, False, 2, None),
}


def main() -> None:
    torch.manual_seed(0)
    found: dict[str, float] = {}
    for name, (rows, columns, group, zeros, ordered, tokens, config) in CASES.items():
        weight = random_weight(rows, columns, group, zeros, ordered)
        nothing = torch.full_like(weight.scales, torch.nan)  # may be read before and behind them
        weight = weight._replace(scales=torch.stack([nothing, weight.scales, nothing])[1])
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(tokens, columns).to(dtype)
            out = torch.full((tokens, rows), torch.nan, dtype=dtype)
            for _ in range(2):  # twice: the counters are as they were
                linear(x, weight, out, config)
            found[f"{name} {dtype}"] = error(out, linear_int4(x.double(), weight))
            found[f"dequantize {name} {dtype}"] = float(
                not torch.equal(dequantize(weight, dtype), dequantize_int4(weight, dtype))
            )
    many = random_weight(72, 64, 32)
    x = torch.randn(300, 64)
    found["many tokens torch.float32"] = error(linear(x, many), linear_int4(x.double(), many))
    try:
        linear(x.bfloat16(), many)
    except ValueError as refused:
        found[str(refused)] = 0.0
    print(json.dumps(found))


if __name__ == "__main__":
    main()
