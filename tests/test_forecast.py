"""`plan --time`: the arithmetic that calibration really does, counted; what ranks send; measured layers."""

from __future__ import annotations

import csv
import json
import math
import runpy
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from family_configs import V2, V2_LITE, V3, Config
from torch.utils.flop_counter import FlopCounterMode

import dsv2quant as dq
from dsv2quant.arch.families import model_config
from dsv2quant.calib import forecast, layerwise, routed
from dsv2quant.calib.calibration import LANES, Calibration
from dsv2quant.calib.costs import Costs, Share, added_up
from dsv2quant.calib.forecast import USUAL
from dsv2quant.calib.layer import Job
from dsv2quant.calib.rates import H200, RATES, Rates
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import UsageError
from dsv2quant.kernels import reference
from dsv2quant.model import attention
from dsv2quant.planning import recipe
from dsv2quant.planning.memory import CARDS
from dsv2quant.planning.plan import Plan, make_plan

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent
WINDOWS, CTX = 32, 64
ROOMY = 1 << 40
# Where a product's FLOP take a second each and all else no time, seconds are FLOP.
COUNTING = replace(
    Rates(**{item.name: math.inf for item in fields(Rates)}), product=1.0, launch=0.0, column=0.0, block=0.0
)


def plan_of(folder: Path, config: Config, name: str = "int4-mixed", group: int | None = None) -> Plan:
    return make_plan(open_checkpoint(tiny.write_headers(folder, config)), recipe.builtin(name, group_size=group))


def spent(plan: Plan, rates: Rates, share: Share) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by phase and bytes by link, of all layers."""
    config = plan.checkpoint.config
    costs = Costs(config, rates, share)
    layers = [[e for e in plan.entries if e.spec.layer == layer] for layer in range(config.num_hidden_layers)]
    found = [costs.layer(entries) for entries in layers]
    return added_up(x.seconds for x in found), added_up(x.links for x in found)


def values_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Of attention's own shape, without its products."""
    return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2)


@pytest.mark.parametrize("room", [ROOMY, 0], ids=["roomy", "anew"])
@pytest.mark.parametrize("name", ["int4-mixed", "int4-pure"])
@pytest.mark.parametrize("config", [tiny.GROUPED, tiny.GROUPED_V2, tiny.LLAMA], ids=["lite", "v2", "llama"])
def test_it_counts_the_products_that_calibration_takes(config, name, room, tmp_path, monkeypatch) -> None:
    """But for attention's own, the router's, and those within GPTQ's loop, which count to 2%."""
    monkeypatch.setattr(reference, "_has_onednn", lambda: False)  # whose products torch's counter doesn't know
    monkeypatch.setattr(layerwise, "room_on", lambda device: room)
    for module in (layerwise, routed):  # torch counts what this thread does
        monkeypatch.setattr(module, "in_turn", lambda threads, do, items: map(do, items))
    monkeypatch.setattr(attention, "_by_blocks", values_alone)
    checkpoint = open_checkpoint(tiny.write_checkpoint(tmp_path / "model", config))
    plan = make_plan(checkpoint, recipe.builtin(name, group_size=32))
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (WINDOWS, CTX))
    with FlopCounterMode(display=False) as counter:
        layerwise.quantize_layers(plan, tmp_path / "work", Calibration(ids, "random", "", 0, []))
    seconds, _ = spent(plan, COUNTING, Share(ids.size, CTX, 1, 1, room, 0))
    counted = {str(kind): flop for kind, flop in counter.get_flop_counts()["Global"].items()}
    products = sum(flop for kind, flop in counted.items() if "attention" not in kind)
    assert sum(seconds.values()) == pytest.approx(products, rel=0.03)


@pytest.mark.parametrize("config", [V2_LITE, V2, V3], ids=["V2-Lite", "V2", "V3"])
def test_experts_and_stages_take_what_calibration_says(config) -> None:
    read = model_config(config, "config.json")
    job = SimpleNamespace(config=read, threads=0)
    costs = Costs(read, H200, Share(1 << 20, 2048, 1, 1, 0, 0))
    assert costs._token_bytes() == Job.token_bytes.fget(job)  # type: ignore[attr-defined]
    pairs = (1 << 20) * read.num_experts_per_tok // read.n_routed_experts
    groups = routed._groups(job, [pairs] * read.n_routed_experts)  # type: ignore[arg-type]
    assert {len(group) for group in groups[:-1]} == {costs._together(pairs)}


def test_what_ranks_send(tmp_path) -> None:
    plan = plan_of(tmp_path, tiny.GROUPED | {"num_hidden_layers": 3}, group=32)
    c = plan.checkpoint.config
    alone, two, eight, nodes = (
        spent(plan, H200, Share(1 << 14, CTX, ranks, local, ROOMY, 0))[1]
        for ranks, local in ((1, 1), (2, 2), (8, 8), (8, 2))
    )
    assert alone["nvlink"] == alone["network"] == two["network"] == eight["network"] == 0
    # Of both layers with experts, inputs of both models and in the first the output of each token and expert, half of
    # them elsewhere; H and S of all tokens and of those held out, summed and sent back.
    exchanged = (3 + 2) * 4 * c.hidden_size * (1 << 13) * c.num_experts_per_tok // 2
    assert two["nvlink"] == exchanged + 2 * 2 * 4 * 4 * c.hidden_size**2
    assert nodes["network"] == 6 * nodes["nvlink"]  # six others on other machines, one on this
    assert nodes["network"] + nodes["nvlink"] == eight["nvlink"]


def test_attention_that_is_calibrated_sends_sums_and_weights(tmp_path) -> None:
    config = tiny.LLAMA | {"num_hidden_layers": 1}
    plan = plan_of(tmp_path, config, "int4-pure", 32)
    _, links = spent(plan, H200, Share(1 << 12, CTX, 2, 2, ROOMY, 0))
    made = [e.spec for e in plan.entries if e.method == "gptq"]
    assert {spec.role for spec in made} >= {"q_proj", "o_proj", "dense.up_proj"}
    sites = {spec.site: spec.shape[1] for spec in made}
    sums = sum(16 * columns**2 for columns in sites.values())  # H and S, twice, in float32
    assert links["nvlink"] == sums + 4 * sum(spec.size for spec in made)


def test_more_ranks_take_less_time_and_memory(tmp_path) -> None:
    found = dq.forecast(plan_of(tmp_path, V2 | {"num_hidden_layers": 2}))
    one, two, eight, cluster = found.each
    assert [(x.machines.gpus, x.machines.nodes) for x in found.each] == list(USUAL)
    assert cluster.machines.ranks <= LANES
    assert one.total > two.total > eight.total > cluster.total
    assert one.device > two.device > eight.device
    for phase in ("forward", "moments", "factor", "quantize", "pack"):
        assert one.seconds[phase] / 2 == pytest.approx(two.seconds[phase], rel=0.02), phase
    assert one.seconds["read"] == eight.seconds["read"]
    assert one.total == pytest.approx(sum(one.layers) + one.artifact)
    assert next(iter(one.busy)) == "GPU"


def test_a_smaller_gpu_keeps_streams_in_memory(tmp_path) -> None:
    plan = plan_of(tmp_path, V2 | {"num_hidden_layers": 2})
    (large,), (small,) = (dq.forecast(plan, gpu=gpu, gpus=1).each for gpu in ("H200", "H100"))
    state = 4 * (1 << 20) * 5120
    assert large.host == 0
    assert small.host == state  # beside 40 GB of work memory there is room for two of three
    assert large.device - small.device == small.host
    assert small.total > large.total


def test_what_is_refused(tmp_path, cli) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model", tiny.WORDY)
    plan = dq.plan(folder, scheme="int4-mixed", group_size=32)
    assert isinstance(plan, Plan)
    with pytest.raises(UsageError, match="33 ranks for 512 windows of 2048 tokens, which go in 32 parts"):
        dq.forecast(plan, gpus=33, length=2048)
    with pytest.raises(UsageError, match="2 ranks for 1 windows"):
        dq.forecast(plan, nodes=2, samples=1)
    assert [x.machines.ranks for x in dq.forecast(plan, samples=1).each] == [1]
    with pytest.raises(UsageError, match="recipe fp8-block has none"):
        dq.forecast(dq.plan(folder, scheme="fp8-block"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="it takes H200, H100"):
        dq.forecast(plan, gpu="A100-40GB")
    assert "--gpus goes with --time" in cli("plan", folder, "--int4", "--gpus", "2").err
    assert "--gguf does not go with --time" in cli("plan", folder, "--gguf", "Q8_0", "--time").err


def test_the_verb_is_the_function(tmp_path, cli) -> None:
    folder = tiny.write_checkpoint(tmp_path / "model", tiny.WORDY)
    args = ("plan", folder, "--int4", "--group-size", "32", "--time", "--gpu", "H100", "--gpus", "2")
    ran = cli(*args, "--json")
    assert ran.code == 0, ran.err
    plan = dq.plan(folder, scheme="int4-mixed", group_size=32)
    assert isinstance(plan, Plan)
    (each,) = dq.forecast(plan, gpu="H100", gpus=2).each
    (machine,) = json.loads(ran.out)["machines"]
    assert (machine["total"], machine["busy"], machine["nvlink"]) == (each.total, each.busy, each.nvlink)
    assert "2 H100" in cli(*args).out


MEASURED = [  # by what packs and saves beside the rest, with kernels that were compiled before
    row
    for row in csv.DictReader((ROOT / "benchmarks/results/calibration.csv").open())
    if row["device"] == "NVIDIA H200" and "compiling kernels" not in row["versions"]
]
SHAPES = {"v2-lite": V2_LITE, "v2": V2}


def shape_of(name: str) -> Config:
    """The configuration that a benchmark's folder is named after."""
    return SHAPES[max((known for known in SHAPES if name.startswith(known)), key=len)]


@pytest.mark.parametrize(
    "row", MEASURED, ids=lambda row: f"{row['model']}-{row['recipe']}-{row['ranks']}-{row['tokens']}"
)
def test_measured_layers_are_within_a_fifth(
    row: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if allowed := row["GPU GB allowed"]:
        monkeypatch.setattr(forecast, "card_capacity", lambda gpu: int(float(allowed) * 1e9))
    layers, tokens = int(row["layers"]), int(row["tokens"])
    plan = plan_of(tmp_path, shape_of(row["model"]) | {"num_hidden_layers": layers}, row["recipe"])
    (each,) = dq.forecast(plan, gpus=int(row["ranks"]), samples=tokens // 2048, length=2048).each
    experts = [float(seconds) for seconds in row["expert layer s"].split()]
    dense = (layers - len(experts)) * float(row["dense layer s"])
    assert sum(each.layers) == pytest.approx(dense + sum(experts), rel=0.2)
    assert sum(each.layers[-len(experts) :]) == pytest.approx(sum(experts), rel=0.2)


@pytest.mark.parametrize("model", ["DeepSeek-V2", "DeepSeek-R1"])
def test_the_tables_are_those_of_the_plans(model, tmp_path) -> None:
    lines = runpy.run_path(str(ROOT / "tools/times.py"))["table"](tmp_path, model)
    assert "\n".join(lines) in (ROOT / "docs/scale.md").read_text()


def test_every_gpu_with_rates_has_its_memory_known() -> None:
    assert set(RATES) <= set(CARDS)
