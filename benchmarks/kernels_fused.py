"""What stands between the products of a decode step, on a CUDA device: µs per call.

    python benchmarks/kernels_fused.py --results benchmarks/results/kernels_fused.csv [--sweep]

Times are CUDA-graph replays. Activations, which the kernel before has just written, lie in the L2, and so do norms'
weights; kv_b's halves rotate over 0.2 GB or more. `empty` is a launch that does nothing. `--sweep` tries other shares
of absorb.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton
from convert import append
from device import bandwidth, measured_on, microseconds

from dsv2quant.kernels.absorb import Share, absorb_k, absorb_v, choose
from dsv2quant.kernels.add_norm import add_norm
from dsv2quant.kernels.latents import append_latents
from dsv2quant.kernels.silu_mul import silu_mul

TOKENS = (1, 8, 64)
RANK, ROPE, NOPE, V = 512, 64, 128, 128
ROTATED = 200_000_000  # bytes of weights
CALLS = 64  # of those without great weights


@triton.jit
def _empty_kernel():
    pass


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def elementwise(tokens: int, hidden: int, heads: int, widths: dict[str, int]) -> Iterator[tuple[str, Callable]]:
    """Name and call."""
    x, addend, pairs = bf16(tokens, hidden), bf16(tokens, hidden), torch.randn(tokens, 6, hidden, device="cuda")
    weight = bf16(hidden)
    for kind in (None, "group128", "token"):
        for what, more in (("", {}), (" + 1", {"addend": addend}), (" + 1 + 6", {"addend": addend, "pairs": pairs})):
            yield f"add_norm{what} {kind}", partial(add_norm, x, weight, 1e-6, quantize=kind, **more)
    latent = bf16(tokens, 2112)[:, :1536]
    yield "q_a norm group128", partial(add_norm, latent, weight[:1536], 1e-6, quantize="group128")
    for name, width in widths.items():
        gate_up = bf16(tokens, 2 * width)
        for kind in (None, "group128", "token"):
            yield f"silu_mul {name} {kind}", partial(silu_mul, *gate_up.chunk(2, 1), quantize=kind)
    q, kv, q_out = bf16(tokens, heads * 192), bf16(tokens, 2112)[:, 1536:], bf16(tokens, heads, 576)
    table, positions = torch.randn(4096, 32, 2, device="cuda"), torch.arange(tokens, device="cuda").int() * 50
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        cache = torch.zeros(tokens, 4096, 576, device="cuda", dtype=dtype)
        scale = torch.ones(1, device="cuda") if dtype.itemsize == 1 else None
        call = partial(append_latents, q, kv, weight[:RANK], 1e-6, table, positions, cache, scale, q_out)
        yield f"latents {str(dtype)[6:]}", call


def shares(tokens: int, heads: int, depth: int, columns: int, wide: int | None, sweep: bool) -> list[Share]:
    """The choice, and others."""
    found = [choose(tokens, heads, depth, columns, wide)]
    if sweep:
        for width in (wide,) if wide else (16, 32, 64, 128):
            if tokens == 1:
                steps = [step for step in (64, 128, 256, 512) if step <= depth and 4096 <= width * step <= 16384]
                found += [Share(width, 1, step, warps, 1) for step in steps for warps in (4, 8)]
            if tokens == 64 or (tokens == 1 and width >= 64):
                found += [Share(width, max(16, tokens), 128, warps, 3) for warps in (4, 8)]
    return list(dict.fromkeys(found))


def absorbing(tokens: int, heads: int, sweep: bool) -> Iterator[tuple[str, list[Callable], list[tuple[Share, list]]]]:
    """Name, torch's calls, and ours by share."""
    count = -(-ROTATED // (heads * (NOPE + V) * RANK * 2))
    kv_b = [bf16(heads, NOPE + V, RANK) for _ in range(count)]
    q, q_out = bf16(tokens, heads, 192)[..., :NOPE], bf16(tokens, heads, RANK + ROPE)
    mixed = torch.randn(tokens, heads, RANK, device="cuda")
    narrow = mixed.bfloat16()
    by_torch = [partial(torch.bmm, q.transpose(0, 1), w[:, :NOPE]) for w in kv_b]
    ours = [(s, [partial(absorb_k, q, w[:, :NOPE], q_out, s) for w in kv_b])
            for s in shares(tokens, heads, NOPE, RANK, None, sweep)]  # fmt: skip
    yield "absorb_k", by_torch, ours
    by_torch = [partial(torch.bmm, narrow.transpose(0, 1), w[:, NOPE:].mT) for w in kv_b]
    for what, kind, given in (("", None, mixed), (" of bf16", None, narrow), (" group128", "group128", mixed)):
        ours = [(s, [partial(absorb_v, given, w[:, NOPE:], quantize=kind, share=s) for w in kv_b])
                for s in shares(tokens, heads, RANK, V, 128 if kind else None, sweep and given is mixed)]  # fmt: skip
        yield f"absorb_v{what}", by_torch, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    rate, where = bandwidth(), measured_on()
    print(
        f"{where['GPU']}: {rate / 1e12:.2f} TB/s; empty {microseconds([lambda: _empty_kernel[(1,)]()] * CALLS):.2f} µs"
    )
    models = {
        "V2-Lite": (2048, 16, {"shared": 2816, "dense": 10944}),
        "V2": (5120, 128, {"shared": 3072, "dense": 12288}),
    }
    rows = []
    for model, (hidden, heads, widths) in models.items():
        columns: dict[str, list[str]] = {}
        for tokens in TOKENS:
            for name, call in elementwise(tokens, hidden, heads, widths):
                taken = microseconds([call] * CALLS)
                columns.setdefault(name, []).append(f"{taken:.2f}")
                rows.append({"model": model, "T": tokens, "what": name, "us": f"{taken:.2f}"} | where)
        for name, taken in columns.items():
            print(f"{model} {name}: {' / '.join(taken)}")
        for tokens in TOKENS:
            for name, by_torch, ours in absorbing(tokens, heads, options.sweep):
                peer = microseconds(by_torch)
                timed = {share: microseconds(calls) for share, calls in ours}
                taken, best = timed[ours[0][0]], sorted(timed, key=timed.__getitem__)[:3]
                others = "; ".join(f"{timed[share]:.2f} {tuple(share)}" for share in best if options.sweep)
                floor = heads * NOPE * RANK * 2 / rate * 1e6
                print(
                    f"{model} T={tokens} {name}: {taken:.2f}, bmm {peer:.2f}, floor {floor:.2f}; {others}", flush=True
                )
                rows.append({"model": model, "T": tokens, "what": name, "us": f"{taken:.2f}", "bmm us": f"{peer:.2f}",
                             "floor us": f"{floor:.2f}"} | where)  # fmt: skip
    empty = dict.fromkeys(itertools.chain.from_iterable(rows), "")
    append(options.results, [empty | row for row in rows])


if __name__ == "__main__":
    main()
