"""Problems for GPTQ's loops, and what is wrong with a solution: for the interpreter, the CPU and a device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsv2quant.formats.integers import factors, levels
from dsv2quant.kernels import gptq, reference_gptq

# batch, rows, columns, group, begin, width, bits: whole blocks, ragged rows and columns, one column, one group.
BLOCKS = [
    (2, 64, 128, 32, 64, 64, 4),
    (3, 37, 150, 30, 128, 22, 4),
    (1, 5, 64, 64, 0, 64, 3),
    (2, 33, 96, 32, 64, 32, 2),
    (1, 130, 65, 13, 64, 1, 4),
]
# batch, rows, columns, group, bits: with whole rows as groups, of more columns than a tile has or of fewer.
SEARCHES = [(2, 6, 128, 32, 4), (1, 7, 192, 64, 3), (2, 3, 256, 128, 2), (2, 5, 300, 300, 4), (1, 3, 40, 40, 4)]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block(
    batch: int, rows: int, columns: int, groups: int, width: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """w, scales, group and u. Every other row stands on ties until errors reach it, codes saturate here and there, and
    below its diagonal u is of no sense."""
    w, scales = 2 * random(batch, rows, columns, seed=0), 0.2 + random(batch, rows, groups, seed=1).abs() / 4
    w[:, ::2] = (8 * w[:, ::2]).round() / 8
    scales[:, ::2] = 0.25
    if bits < 4:
        scales[:, 1::3] *= -1
    order = torch.stack([torch.randperm(columns, generator=torch.Generator().manual_seed(i)) for i in range(batch)])
    u = random(batch, width, width, seed=2) / 8
    u.diagonal(dim1=1, dim2=2).abs_().add_(0.5)
    return w, scales, order // (columns // groups), u.triu() + torch.full_like(u, 1e30).tril(-1)


def block_faults(
    batch: int, rows: int, columns: int, group: int, begin: int, width: int, bits: int, device: str
) -> list[str]:
    """What the kernel makes otherwise than its reference."""
    given = [x.to(device) for x in block(batch, rows, columns, columns // group, width, bits)]
    codes = [torch.full((batch, rows, columns), 99, dtype=torch.int8, device=device) for _ in range(2)]
    errors = [
        f(*given, into, begin, bits)
        for f, into in zip((gptq.quantize_block, reference_gptq.quantize_block), codes, strict=True)
    ]
    low, high = levels(bits)
    inside = codes[1][:, :, begin : begin + width]
    usual = {low, high} <= {*inside.unique().tolist()} and (codes[1] == 99).sum() == codes[1].numel() - inside.numel()
    found = {"codes": torch.equal(*codes), "errors": torch.equal(*errors), "the case itself": usual}
    return [name for name, right in found.items() if not right]


def search_faults(
    batch: int, rows: int, columns: int, group: int, bits: int, device: str, search: Callable = gptq.search_scales
) -> list[str]:
    """What is wrong with the scales of a search: none may lose more, in float64, than the best candidate does."""
    w, importance = random(batch, rows, columns, seed=3) ** 3, random(batch, columns, seed=4).square()
    w[:, 0, :group] = 0
    w[:, 1] *= 2.0**-40
    w[:, 2] *= 2.0**40
    if columns > group:
        importance[-1, -group:] = 0
        w[-1, 0, -group:] = 7 * (1 + 3 * 2.0**-8)  # whose first scale is halfway between two of BF16, for 4 bits
    got = search(w.to(device), importance.to(device), group, bits).cpu()
    want = reference_gptq.search_scales(w, importance, group, bits)
    low, high = levels(bits)
    x, weights = w.unflatten(2, (-1, group)), importance.double().unflatten(1, (-1, group))[:, None]
    unit = x.abs().amax(-1, keepdim=True) / high
    candidates = (unit * torch.from_numpy(factors(bits))).bfloat16().float()  # [batch, rows, groups, factors]
    candidates = torch.where(candidates != 0, candidates, 1.0).double()

    def lost(scale: torch.Tensor) -> torch.Tensor:
        code = (x.double() / scale[..., None]).round().clamp(low, high)
        return ((code * scale[..., None] - x.double()).square() * weights).sum(-1)

    least = torch.stack([lost(scale) for scale in candidates.unbind(-1)], -1).amin(-1)
    plain = least == 0  # nothing tells candidates apart: the first
    found = {
        "no candidate": (candidates == got.double()[..., None]).any(-1).all(),
        "not the best": (lost(got.double()) <= (1 + 1e-5) * least).all(),
        "not the first": torch.equal(got[plain], want[plain]),
        "unlike the reference": float((got == want).float().mean()) > 0.9,
        "the case itself": plain.any() and not plain.all(),
    }
    return [name for name, right in found.items() if not right]
