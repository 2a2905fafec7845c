"""Routing's kernels: by Triton's interpreter against their references, and as code for Hopper. tests/gpu has the same
on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from routing_cases import ROUTED, ROUTERS, expected, logits, router_of
from triton_tools import compile_for_hopper, interpreted

from dsv2quant.arch.spec import Router
from dsv2quant.kernels import routing
from dsv2quant.kernels import routing as router
from dsv2quant.model import layers as moe

TYPES = {
    "logits": "*fp32", "weights": "*fp32", "chosen": "*i32", "pairs": "*i32", "tile_experts": "*i32", "begins": "*i32",
    "ends": "*i32", "scale": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict:
    return interpreted("routing_interpreted.py")


def test_pairs_are_sorted_as_by_the_twin(results: dict) -> None:
    assert len(results["sorted"]) == 14
    assert all(results["sorted"].values()), results["sorted"]


def test_logits_are_those_of_float64(results: dict) -> None:
    assert len(results["logits"]) == 2 * len(ROUTERS)
    assert max(results["logits"].values()) <= 1, results["logits"]


def test_routes_are_those_of_the_cases(results: dict) -> None:
    assert len(results["routed"]) == len(ROUTED)
    for case, (differ, error) in results["routed"].items():
        assert differ == 0, case
        assert error < 1e-6, case  # an exponential, a quotient and a sum of some terms in float32


@pytest.mark.parametrize("case", ROUTED)
def test_the_cases_are_those_of_the_model(case: tuple) -> None:
    tokens, experts, n_group, topk_group, k, norm, scale = case
    x = logits(tokens, experts)[:1]  # the others' ties go anywhere there
    weights, chosen = moe.route(x, torch.eye(experts), router_of(n_group, topk_group, k, norm, scale))
    want_weights, want = expected(x, n_group, topk_group, k, norm, scale)
    order = weights.argsort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(weights.gather(1, order), want_weights, rtol=1e-6, atol=0)
    scored = want_weights[0] > 0
    assert torch.equal(chosen.gather(1, order)[0][scored], want[0][scored])


@pytest.mark.parametrize(("groups", "width", "kept"), [(1, 64, 1), (8, 32, 3)])
@pytest.mark.parametrize("one", [True, False])
def test_routing_compiles(groups: int, width: int, kept: int, one: bool, tmp_path: Path) -> None:
    """By one warp, which needs no shared memory."""
    constants = {"GROUPS": groups, "MANY_GROUPS": groups, "WIDTH": width, "KEPT": kept, "K": 6, "MANY": 8}
    constants |= {"NORM": False, "SORTED": one}
    constants |= {} if one else dict.fromkeys(("pairs", "tile_experts", "begins", "ends"))
    made = compile_for_hopper(routing._route_kernel, TYPES, constants, tmp_path / "k.cubin", ("EXPERTS",), num_warps=1)
    assert made.resources["STACK"] == made.resources["LOCAL"] == made.shared == 0


@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
@pytest.mark.parametrize("hidden", [2048, 5120])
def test_logits_compile(hidden: int, tokens: int, tmp_path: Path) -> None:
    """To plain float32; all loads come first, in 16 bytes of the router."""
    rows, wide, held = router.share(tokens, hidden)
    constants = {"COLUMNS": hidden, "ROWS": rows, "TOKENS": wide, "HELD": held}
    types = {"x": "*bf16", "router": "*fp32", "logits": "*fp32"}
    aligned = ("EXPERTS", "x_stride")
    made = compile_for_hopper(router._router_kernel, types, constants, tmp_path / "k.cubin", aligned, num_warps=4)
    assert made.resources["STACK"] == made.resources["LOCAL"] == 0
    assert "tf32" not in made.ptx
    asked, used = made.ptx.split("bar.sync", 1)
    assert asked.count("v4.b32") == rows * held
    assert "ld.global" not in used.split("bra", 1)[0]


@pytest.mark.parametrize(("chunk", "warps"), [(8, 4), (512, 8)])
def test_sorting_compiles(chunk: int, warps: int, tmp_path: Path) -> None:
    constants = {"BLOCK": 16, "BINS": 256, "SLICE": routing.SLICE, "CHUNK": chunk}
    made = compile_for_hopper(routing._sort_kernel, TYPES, constants, tmp_path / "k.cubin", (), num_warps=warps)
    assert made.resources["STACK"] == made.resources["LOCAL"] == 0


def test_other_arguments_are_refused() -> None:
    x = torch.zeros(2, 16)
    for given, message in (
        ((x.double(), Router(4)), "logits are torch.float64"),
        ((x.T, Router(4)), "need contiguous float32"),
        ((x, Router(4, groups=3)), "4 of 16 experts, of 1 of 3 groups"),
        ((x, Router(4, groups=4, topk_group=5)), "of 5 of 4 groups"),
        ((x, Router(17)), "17 of 16 experts"),
        ((x, Router(4, score="sigmoid")), "softmax's"),
        ((x, Router(4, group_score="top2")), "softmax's"),
        ((x, Router(4, bias=True)), "no bias"),
    ):
        with pytest.raises(ValueError, match=message):
            routing.route(*given)
    for given, message in (
        ((x, torch.zeros(4, 16).double()), "router is torch.float64"),
        ((x, torch.zeros(4, 15)), r"x has shape \(2, 16\); need \(any, 15\)"),
        ((x.int(), torch.zeros(4, 16)), "x is torch.int32"),
        ((x, torch.zeros(4, 20)[:, :16]), "router must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            router.router_logits(*given)
    for chosen in (torch.zeros(2, 4), torch.zeros(4, dtype=torch.int32), torch.zeros(4, 2, dtype=torch.int32).T):
        with pytest.raises(ValueError, match="need contiguous integers"):
            routing.sort_pairs(chosen, 16, 16)


def test_no_tokens_have_no_tiles() -> None:
    weights, chosen, routes = routing.route_and_sort(torch.zeros(0, 16), Router(4))
    assert weights.shape == chosen.shape == (0, 4)
    assert len(routes.pairs) == len(routes.experts) == 0


@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 6, 160), (64, 6, 160), (200, 6, 64), (4096, 6, 64)])
def test_there_are_tiles_for_the_worst_choice(tokens: int, k: int, experts: int) -> None:
    """As many experts as can be have one pair more than whole tiles."""
    block = routing.choose_block(tokens, k, experts)
    pairs = tokens * k
    singles = min(experts, pairs)
    counts = [1] * singles
    counts[0] += (pairs - singles) // block * block
    for i in range((pairs - singles) % block):
        counts[i % singles] += 1
    assert sum(-(-count // block) for count in counts) <= routing.tiles_needed(pairs, experts, block)
