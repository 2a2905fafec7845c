"""Routing's kernels: by Triton's interpreter against their references, and as code for Hopper. tests/gpu has the same
on a device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from routing_cases import KIMI, ROUTED, ROUTERS, V3, expected, logits
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from triton_tools import compile_for_hopper, interpreted

from dsv2quant.arch.spec import Router
from dsv2quant.kernels import reference, routing
from dsv2quant.model import layers as moe

TYPES = {
    **dict.fromkeys(("logits", "bias", "weights"), "*fp32"),
    **dict.fromkeys(("chosen", "pairs", "tile_experts", "begins", "ends"), "*i32"),
    "scale": "fp32",
}


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
def test_the_cases_are_those_of_the_model(case: tuple[int, int, Router]) -> None:
    tokens, experts, router = case
    x, bias = logits(tokens, experts, router)
    x = x[: max(1, tokens - 1)]  # the others' ties go anywhere there
    weights, chosen = moe.route(x, torch.eye(experts), router, bias)
    want_weights, want = expected(x, router, bias)
    dense, wanted = (torch.zeros_like(x) for _ in range(2))
    dense.scatter_(1, chosen, weights)
    torch.testing.assert_close(dense, wanted.scatter_(1, want, want_weights), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("experts", "router"),
    [(256, V3), (384, KIMI), (64, replace(KIMI, k=6, normalise=False)), (16, replace(V3, k=1))],
)
def test_routes_are_those_of_transformers(experts: int, router: Router) -> None:
    """Also of a single expert per token, whose weight both normalise."""
    config = DeepseekV3Config(
        hidden_size=32, n_routed_experts=experts, num_experts_per_tok=router.k, n_group=router.groups,
        topk_group=router.topk_group, norm_topk_prob=router.normalise, routed_scaling_factor=router.scale,
    )  # fmt: skip
    theirs = DeepseekV3TopkRouter(config)
    generator = torch.Generator().manual_seed(experts)
    x, weight = torch.randn(500, 32, generator=generator), torch.randn(experts, 32, generator=generator) / 4
    bias = torch.randn(experts, generator=generator) / 2
    theirs.load_state_dict({"weight": weight, "e_score_correction_bias": bias})
    _, want_weights, want = theirs(x)
    weights, chosen = moe.route(x, weight, router, bias)
    assert torch.equal(chosen.sort().values, want.sort().values)
    torch.testing.assert_close(
        weights.gather(1, chosen.argsort()), want_weights.gather(1, want.argsort()), rtol=1e-6, atol=0
    )
    _, unbiased = moe.route(x, weight, replace(router, bias=False), None)
    assert (chosen.sort().values != unbiased.sort().values).any(1).float().mean() > 0.5


@pytest.mark.parametrize(
    ("router", "width"), [(Router(6), 64), (Router(6, 8, 3), 32), (V3, 32), (KIMI, 512), (replace(V3, bias=False), 32)]
)
@pytest.mark.parametrize("one", [True, False])
def test_routing_compiles(router: Router, width: int, one: bool, tmp_path: Path) -> None:
    """By one warp, which needs no shared memory."""
    groups, sigmoid = router.groups, router.score == "sigmoid"
    constants = {"GROUPS": groups, "MANY_GROUPS": groups, "WIDTH": width, "KEPT": router.topk_group, "K": router.k}
    constants |= {"MANY": 8, "SIGMOID": sigmoid, "TOP2": sigmoid, "NORM": router.normalise, "SORTED": one}
    constants |= {} if one else dict.fromkeys(("pairs", "tile_experts", "begins", "ends"))
    constants |= {} if router.bias else {"bias": None}
    made = compile_for_hopper(routing._route_kernel, TYPES, constants, tmp_path / "k.cubin", ("EXPERTS",), num_warps=1)
    assert made.resources["STACK"] == made.resources["LOCAL"] == made.shared == 0


@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
@pytest.mark.parametrize("hidden", [2048, 5120])
def test_logits_compile(hidden: int, tokens: int, tmp_path: Path) -> None:
    """To plain float32; all loads come first, in 16 bytes of the router."""
    rows, wide, held = routing.share(tokens, hidden)
    constants = {"COLUMNS": hidden, "ROWS": rows, "TOKENS": wide, "HELD": held}
    types = {"x": "*bf16", "router": "*fp32", "logits": "*fp32"}
    aligned = ("EXPERTS", "x_stride")
    made = compile_for_hopper(routing._router_kernel, types, constants, tmp_path / "k.cubin", aligned, num_warps=4)
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
        ((x, Router(2, groups=16, topk_group=4, group_score="top2")), "a group has one expert"),
        ((x, Router(5, groups=4, bias=True), torch.zeros(16)), "those groups have fewer experts"),
        ((x, Router(4, bias=True)), "the router has a bias: none given"),
        ((x, Router(4), torch.zeros(16)), "the router has no bias: one given"),
        ((x, Router(4, bias=True), torch.zeros(15)), r"bias has shape \(15,\); need \(16\)"),
        ((x, Router(4, bias=True), torch.zeros(16).double()), "bias is torch.float64"),
    ):
        for route in (routing.route, reference.route):
            with pytest.raises(ValueError, match=message):
                route(*given)
    for given, message in (
        ((x, torch.zeros(4, 16).double()), "router is torch.float64"),
        ((x, torch.zeros(4, 15)), r"x has shape \(2, 16\); need \(any, 15\)"),
        ((x.int(), torch.zeros(4, 16)), "x is torch.int32"),
        ((x, torch.zeros(4, 20)[:, :16]), "router must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            routing.router_logits(*given)
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
