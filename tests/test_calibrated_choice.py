"""Calibrated INT4 where it could do harm: starved experts, codes worse than plain rounding, and refitting BF16."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tiny
import torch
from calibrated import WINDOWS, aside, calibration, decoded, inputs, manifest, planned, raw, rules, run
from test_convert import bits, tensors

from dsv2quant.calib import gptq
from dsv2quant.errors import InputError
from dsv2quant.formats.codec import Inputs
from dsv2quant.formats.schemes import CODECS
from dsv2quant.report.calibration import calibration_text

pytestmark = pytest.mark.usefixtures("one_thread", "in_float32")

# Few tokens


@pytest.mark.parametrize(("count", "ctx"), [(2, 6), (1, 1)])
def test_starved_experts_are_rounded_not_zeroed(count, ctx, tmp_path):
    greedy = {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    model = tiny.write_checkpoint(tmp_path / "model", tiny.GROUPED_V2 | greedy)
    plan = planned(model)
    result = run(plan, tmp_path / "out", calibration(count, ctx))
    tokens = {o.module: o.tokens for o in result.outcomes if ".experts." in o.module}
    assert {0, 1} <= set(tokens.values())
    source, ours = decoded(model), decoded(tmp_path / "out")
    run(planned(model, method="rtn"), tmp_path / "rtn")
    rounded = decoded(tmp_path / "rtn")
    for outcome in result.outcomes:
        name = outcome.module
        assert np.isfinite([outcome.error, outcome.rtn_error]).all()
        assert ours[name].isfinite().all()
        assert (ours[name] != 0).any(0).all()  # no column is dropped
        off, rtn = ((w[name] - source[name]).norm() for w in (ours, rounded))
        assert off < 2 * rtn or name.endswith("kv_b_proj")
    rows = manifest(tmp_path / "out")["calibrated"]["experts"]
    modules = {name.rpartition(".")[0]: n for name, n in tokens.items()}
    unseen = [f"model.layers.{row['layer']}.mlp.experts.{expert}" for row in rows for expert in row["unseen"]]
    assert unseen == [module for module, n in modules.items() if n == 0]
    assert max(row["most"] for row in rows) == max(tokens.values())
    assert [row["starved"] for row in rows] == [16, 16]
    assert calibration_text(plan, result.outcomes, result.expert_tokens).count(" 16 of 16") == 2


# Plain rounding where it is better


def plain(weight: torch.Tensor) -> dict[str, np.ndarray]:
    """Plain rounding of a BF16 weight in groups of 32, to the scale of least squared error of the weight itself."""
    alike = Inputs(np.ones(weight.shape[1], np.float32), 1.0)
    (parts,) = CODECS["int4-g32"].encode([bits(weight)], method="mse", inputs=[alike])
    return parts


def plain_values(weight: torch.Tensor) -> torch.Tensor:
    """What `plain` stands for, in float32."""
    parts = {suffix: torch.from_numpy(array) for suffix, array in plain(weight).items()}
    parts["weight_scale"] = parts["weight_scale"].view(torch.bfloat16)
    return CODECS["int4-g32"].decode(parts, torch.float32)


@pytest.mark.parametrize("count", [WINDOWS, 1], ids=["windows held out", "one window"])
def test_plain_rounding_is_kept_where_gptq_is_worse(count, grouped, tmp_path, monkeypatch):
    def garbage(weight, scales, factored, bits):
        return torch.randint(-8, 8, weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)

    monkeypatch.setattr(gptq, "quantize", garbage)
    plan = planned(grouped, "int4-experts")
    result = run(plan, tmp_path / "out", calibration(count))
    assert all(o.kept_rtn for o in result.outcomes)
    assert manifest(tmp_path / "out")["calibrated"]["kept_rtn"] == [o.module for o in result.outcomes]
    assert len(result.outcomes) == 2 * 8 * 3
    first = ", ".join(o.module for o in result.outcomes[:3])
    said = f"plain rounding was better on windows held out, and is kept, in {first} and 45 more"
    assert said in calibration_text(plan, result.outcomes, result.expert_tokens)
    source, ours = tensors(grouped), tensors(tmp_path / "out")
    for outcome in result.outcomes:
        for suffix, array in plain(source[f"{outcome.module}.weight"]).items():
            assert raw(ours[f"{outcome.module}.{suffix}"]) == array.tobytes(), outcome.module


@pytest.mark.parametrize("count", [WINDOWS, 8], ids=["one window aside", "the ends of all"])
def test_no_matrix_is_worse_than_plain_rounding_on_windows_kept_aside(count, tmp_path):
    model, using = tiny.write_checkpoint(tmp_path / "model", tiny.GROUPED_V2), calibration(count)
    result = run(planned(model), tmp_path / "out", using)
    real, ideal = inputs(tmp_path / "out", using)[0], inputs(model, using)[0]
    original, ours = decoded(model), decoded(tmp_path / "out")
    kept = aside(count)
    checked = []
    for outcome in result.outcomes:
        if ".experts." in outcome.module:
            continue  # their moments are drawn toward all tokens'
        at = outcome.module.removeprefix("model.layers.").replace("self_attn", "attention")
        at = at.replace("mlp.shared_experts", "ffn.shared").replace("mlp", "ffn")
        x, y = real[at][kept], ideal[at][kept]
        w, q = original[outcome.module].double(), ours[outcome.module].double()
        p = w if outcome.role == "kv_b_proj" else plain_values(original[outcome.module].bfloat16()).double()
        wanted = y @ w.T
        lost, lost_by_plain = ((wanted - x @ v.T).square().sum() for v in (q, p))
        assert lost <= lost_by_plain * (1 + 1e-4)
        assert outcome.kept_rtn == torch.equal(q, p) or outcome.role == "kv_b_proj"  # which may need no fit
        relative = ((x @ (w - p).T).square().sum() / (x @ w.T).square().sum()).item()
        assert outcome.rtn_error == pytest.approx(relative, rel=1e-3)
        checked.append(outcome.kept_rtn)
    assert len(checked) == 5 * 3 + 3 * 3
    assert not all(checked)


# Damaged checkpoints

GATE = "model.layers.2.mlp.experts.7.gate_proj"
SHARED = "model.layers.1.mlp.shared_experts"
O_PROJ = "model.layers.1.self_attn.o_proj"
WEIGHT = "{name}.weight is NaN, infinite or beyond BF16's range at [3, 5] (the checkpoint is damaged: get it again)"
INPUTS = ": its inputs are not finite (the checkpoint is damaged, or its activations overflow float32)"


@pytest.mark.parametrize(
    ("name", "value", "recipe", "message"),
    [
        (GATE, np.nan, "int4-pure", WEIGHT),  # of the last layer: no later input tells
        ("model.layers.0.self_attn.kv_b_proj", -np.inf, "int4-pure", WEIGHT),
        (O_PROJ, np.nan, "int4-experts", WEIGHT),  # stays BF16
        (O_PROJ, np.nan, "int4-mixed", WEIGHT),  # becomes FP8
        (O_PROJ, 3.4e38, "int4-mixed", WEIGHT),  # finite in float32
        ("model.embed_tokens", np.nan, "int4-pure", f"model.layers.0.self_attn.q_proj{INPUTS}"),
        ("model.layers.2.mlp.gate", np.nan, "int4-pure", "model.layers.2.mlp.experts."),
        (f"{SHARED}.gate_proj", 1e25, "int4-pure", f"{SHARED}.down_proj{INPUTS}"),
    ],
)
def test_what_is_not_finite_is_refused(name, value, recipe, message, tmp_path):
    source = tiny.random_weights(tiny.GROUPED, dtype=torch.float32)
    source[f"{name}.weight"][3, 5] = value
    model = tiny.write_checkpoint(tmp_path / "model", tiny.GROUPED, source)
    with pytest.raises(InputError, match=re.escape(message.format(name=name))):
        run(planned(model, recipe), tmp_path / "out")


# Refitting what stays BF16

FIT = "{roles: [kv_b_proj], scheme: bf16, method: %s}, {roles: [kv_a_proj_with_mqa], scheme: int4-g32}"


def test_a_refitted_kv_b_stays_bf16_and_makes_up_for_kv_a(grouped, tmp_path):
    using = calibration()
    result = run(planned(grouped, rules(FIT % "fit")), tmp_path / "fit", using)
    run(planned(grouped, rules(FIT % "rtn")), tmp_path / "plain")
    real, ideal = inputs(tmp_path / "fit", using)[0], inputs(grouped, using)[0]
    source, ours, plain = tensors(grouped), tensors(tmp_path / "fit"), tensors(tmp_path / "plain")
    assert {o.role for o in result.outcomes} == {"kv_b_proj"}
    assert not any(o.kept_rtn for o in result.outcomes)
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.kv_b_proj.weight"
        assert torch.equal(plain[name], source[name])
        assert ours[name].dtype == torch.bfloat16
        assert not torch.equal(ours[name], source[name])
        x, y = (seen[f"{layer}.attention.kv_b_proj"] for seen in (real, ideal))
        wanted = y @ source[name].double().T
        fitted, unfitted = ((wanted - x @ t[name].double().T).square().mean() for t in (ours, plain))
        assert fitted < 0.99 * unfitted
    others = [name for name in source if "kv_b" not in name and "kv_a_proj" not in name]
    assert all(torch.equal(ours[name], source[name]) for name in others)


def test_without_error_in_front_there_is_nothing_to_refit(grouped, tmp_path):
    text = "{roles: [kv_b_proj], scheme: bf16, method: fit}, {roles: ['routed.*'], layers: '1', scheme: int4-g32}"
    run(planned(grouped, rules(text)), tmp_path / "out", calibration(100))
    source, ours = tensors(grouped), tensors(tmp_path / "out")
    same = [torch.equal(ours[n], source[n]) for n in (f"model.layers.{i}.self_attn.kv_b_proj.weight" for i in range(3))]
    assert same == [True, True, False]
