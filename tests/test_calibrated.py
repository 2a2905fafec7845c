"""What comes out of a calibrated conversion: tensors, the streams they were made in, and what each was fitted to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from calibrated import CTX, WINDOWS, aside, calibration, inputs, manifest, planned, raw, recorded, rules, run
from test_convert import bits, tensors

from dsv2quant.arch.deepseek_v2 import SEQUENCE_CLASSIFICATION
from dsv2quant.calib import choosing, gptq, hidden, layerwise, routed
from dsv2quant.calib.calibration import Calibration, Encoded
from dsv2quant.checkpoint.dtypes import torch_dtype
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.evaluation import divergence as perplexity
from dsv2quant.evaluation.divergence import bootstrap, compare
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.layers import FFN, MoE, route
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import Plan, make_plan
from dsv2quant.planning.recipe import CALIBRATED
from dsv2quant.storage.durable import MANIFEST_FILE
from dsv2quant.text.text import python_topics
from dsv2quant.text.tokenizer import Tokenizer, cut

pytestmark = pytest.mark.usefixtures("one_thread", "in_float32")
U = 2.0**-24  # float32's largest relative rounding error


class Made(NamedTuple):
    """A checkpoint, and what became of it; `states` are the hidden states on the way."""

    model: Path
    plan: Plan
    states: dict[tuple[int, str], torch.Tensor]
    encoded: Encoded
    out: Path


SPLIT = "{roles: [routed.%s_proj], scheme: int4-g32, method: gptq}, {roles: ['routed.*'], scheme: int4-g32}"
VARIANTS: dict[str, tuple[dict[str, Any], str | recipe.Recipe]] = {
    "lite-pure": (tiny.GROUPED, "int4-pure"),
    "lite-mixed": (tiny.GROUPED, "int4-mixed"),
    "v2-pure": (tiny.GROUPED_V2 | {"attention_bias": True}, "int4-pure"),
    "v2-mixed": (tiny.GROUPED_V2 | {"architectures": [SEQUENCE_CLASSIFICATION]}, "int4-mixed"),
    # One projection by GPTQ beside others by rounding: each keeps its own method.
    "gate-alone": (tiny.GROUPED, rules(SPLIT % "gate")),
    "down-alone": (tiny.GROUPED, rules(SPLIT % "down")),
}


@pytest.fixture(scope="module", params=VARIANTS)
def made(request: pytest.FixtureRequest, in_float32: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    config, name = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    plan = planned(tiny.write_checkpoint(folder / "model", config), name)
    with pytest.MonkeyPatch.context() as m:
        states = recorded(m)
        encoded = layerwise.quantize_layers(plan, folder / "work", calibration())
    run(plan, folder / "out")
    return Made(folder / "model", plan, states, encoded, folder / "out")


# What is computed


def test_calibrated_tensors_are_as_planned_and_the_artifact_loads(made):
    written = tensors(made.out)
    assert set(written) == {output.name for line in made.plan.entries for output in line.outputs}
    for line in made.plan.entries:
        for output in line.outputs:
            got = written[output.name]
            assert tuple(got.shape) == output.shape
            assert got.dtype == torch_dtype(output.dtype)
            if line.method in CALIBRATED:
                # From another run, whose work folder is still there.
                assert raw(got) == made.encoded.part(output.name).tobytes(), output.name
    opened = open_checkpoint(made.out)
    assert {w.spec.name: w.scheme for w in opened.weights} == {x.spec.name: x.scheme for x in made.plan.entries}
    assert Model(opened).forward(torch.from_numpy(calibration().ids)).isfinite().all()
    assert {p.name for p in made.out.iterdir()} == set(manifest(made.out)["files"]) | {MANIFEST_FILE}


def test_outcomes_name_every_calibrated_matrix_once_and_no_other(made):
    wanted = {line.spec.module: line.spec.role for line in made.plan.entries if line.method in CALIBRATED}
    assert {o.module: o.role for o in made.encoded.outcomes} == wanted
    assert len(made.encoded.outcomes) == len(wanted) > 0
    listed = manifest(made.out)["calibrated"]
    assert sum(entry["matrices"] for entry in listed["errors"]) == len(wanted)
    assert listed["kept_rtn"] == [o.module for o in made.encoded.outcomes if o.kept_rtn]


def test_what_needs_no_calibration_has_the_bytes_of_a_conversion_without(made):
    source, written = tensors(made.model), tensors(made.out)
    kinds = set()
    for line in made.plan.entries:
        if line.method in CALIBRATED:
            continue
        kinds.add(line.scheme)
        (encoded,) = CODECS[line.scheme].encode([bits(source[line.spec.name])], "cpu", line.method)
        for output, array in zip(line.outputs, encoded.values(), strict=True):
            assert raw(written[output.name]) == array.tobytes(), output.name
    assert kinds >= made.plan.schemes - {"int4-g32"} | {"bf16"}


def test_gptq_chooses_other_codes_than_rounding(made):
    source, written = tensors(made.model), tensors(made.out)
    same = []
    for line in made.plan.entries:
        if line.method == "gptq":
            (rounded,) = CODECS[line.scheme].encode([bits(source[line.spec.name])])
            same.append(raw(written[line.outputs[0].name]) == rounded["weight_packed"].tobytes())
    assert same
    assert not any(same)


def in_front(folder: Path) -> Iterator[torch.Tensor]:
    """Hidden states in front of each layer, [windows, tokens, hidden]."""
    model = Model(open_checkpoint(folder))
    with torch.inference_mode():
        x = model.ends.embed(torch.from_numpy(calibration().ids))
        for layer in model.layers():
            yield x
            x, _ = layer(x, model.rope(0, CTX))


def test_the_streams_are_the_forward_passes_of_source_and_artifact(made):
    # The same operations on tensors of the same shapes: at most rounding lies between them. Where activations are
    # quantized, that may carry single values to the next FP8 code, 1/16 away, in 1 of 61,440 places.
    tolerance = 1e-3 if "fp8-channel" in made.plan.schemes else 64 * U
    for side, folder in (("ideal", made.model), ("real", made.out)):
        for i, x in enumerate(in_front(folder)):
            assert (made.states[i, side].view_as(x) - x).norm() <= tolerance * x.norm(), (side, i)
    real, ideal = (made.states[2, side] for side in ("real", "ideal"))
    assert (real - ideal).norm() > 0.01 * ideal.norm()


@pytest.mark.parametrize("dtype", ["block FP8", "float32"])
def test_what_becomes_bf16_is_rounded_in_the_stream_too(dtype, tmp_path):
    source = tiny.random_weights(tiny.GROUPED, dtype=torch.float32)
    source |= {name: t.bfloat16() for name, t in source.items() if "proj" not in name}
    model = tiny.write_checkpoint(tmp_path / "model", tiny.GROUPED, source)
    if dtype == "block FP8":
        fp8 = make_plan(open_checkpoint(model), recipe.builtin("fp8-block"), for_targets=["vllm"])
        assert "fp8-block" in fp8.schemes
        model = convert(fp8, tmp_path / "fp8", command="").out
    plan = planned(model, "int4-experts")
    with pytest.MonkeyPatch.context() as m:
        states = recorded(m)
        layerwise.quantize_layers(plan, tmp_path / "work", calibration())
    run(plan, tmp_path / "out")
    *_, x = in_front(tmp_path / "out")
    # Unrounded, it would be off by BF16's 2⁻⁹.
    assert (states[2, "real"].view_as(x) - x).norm() <= 64 * U * x.norm()


def assert_moments(found: gptq.Moments, which: int, x: torch.Tensor, ideal: torch.Tensor, keep: torch.Tensor) -> None:
    """Entry `which` of float32 moments against float64's over the tokens `keep`, to what summing them may cost."""
    x, ideal = x[keep], ideal[keep]
    assert found.count[which] == len(x)
    h, s = x.T @ x, (ideal - x).T @ x
    # Of N products, each rounded and added with an error of U of Σ|xᵢ xⱼ|, which Cauchy–Schwarz bounds; the inputs
    # themselves are off by as much as sums over their columns are, and by what attention by blocks rounds elsewhere.
    size = torch.maximum(h.diagonal(), (ideal * ideal).sum(0)).sqrt()
    bound = (2 * len(x) + 4 * x.shape[1]) * U * size[:, None] * h.diagonal().sqrt() + 1e-30
    most = torch.maximum(x.abs(), ideal.abs())
    off = most.T @ (64 * U * most.square().mean(1, keepdim=True).sqrt().expand_as(most))
    bound = bound + off + off.T
    assert ((found.h[which] - h).abs() <= bound).all()
    assert ((found.s[which] - s).abs() <= bound).all()
    if len(x):
        # Other inputs, such as an unquantized layer's, would be far outside.
        assert ((ideal.T @ ideal - h).abs() > bound).any() == bool((ideal != x).any())


def before_down(expert: FFN, x: torch.Tensor) -> torch.Tensor:
    return F.silu(expert.gate_proj(x)) * expert.up_proj(x)


@pytest.mark.parametrize("config", [tiny.GROUPED, tiny.GROUPED_V2], ids=["lite", "v2"])
def test_every_matrix_is_fitted_to_what_it_sees_in_the_artifact(config, tmp_path, monkeypatch):
    # Everything in front of a matrix is settled before it: its inputs are those of the finished artifact.
    model, using = tiny.write_checkpoint(tmp_path / "model", config), calibration()
    plan = planned(model)
    choose, shrink = choosing.choose, gptq.Moments.shrunk
    chosen: dict[str, tuple[gptq.Moments, gptq.Moments]] = {}
    # A layer's experts: gate and up to fit on, the same held out, down to fit on, held out.
    own: list[gptq.Moments] = []
    priors: list[gptq.Moments] = []
    shrunk: list[gptq.Moments] = []
    used: list[gptq.Moments] = []

    def record(job, linears, moments):
        if len(linears) == 1:
            chosen.update({linear.module.removeprefix("model.layers."): moments for linear in linears[0]})
        else:
            used.extend(moments)
        choose(job, linears, moments)

    def record_shrinking(self, prior):
        own.append(self)
        priors.append(prior)
        shrunk.append(shrink(self, prior))
        return shrunk[-1]

    for module in (layerwise, routed):
        monkeypatch.setattr(module, "choose", record)
    monkeypatch.setattr(routed, "TURNS", 1)  # all experts at once
    monkeypatch.setattr(gptq.Moments, "shrunk", record_shrinking)
    run(plan, tmp_path / "out", using)
    (real, artifact), (ideal, source) = inputs(tmp_path / "out", using), inputs(model, using)
    held = aside()
    assert held.sum() == CTX
    for name, pair in chosen.items():
        at = name.replace("self_attn", "attention").replace("mlp.shared_experts", "ffn.shared").replace("mlp", "ffn")
        for moments, keep in zip(pair, (~held, held), strict=True):
            assert_moments(moments, 0, real[at], ideal[at], keep)
    assert len(chosen) == (4 if config is tiny.GROUPED else 5) * 3 + 3 * 3
    for i, (ours, theirs) in enumerate(zip(artifact.layers(), source.layers(), strict=True)):
        if not isinstance(ours.ffn, MoE):
            continue
        x, y = (seen[f"{i}.ffn.shared.gate_proj"] for seen in (real, ideal))
        weights, experts = route(x.float(), ours.ffn.router.weight, ours.ffn.routing, ours.ffn.router_bias)
        first = 4 * (i - 1)
        for e, (expert, original) in enumerate(zip(ours.ffn.experts, theirs.ffn.experts, strict=True)):
            tokens, specs = (experts == e).nonzero(as_tuple=True)
            weight = weights[tokens, specs, None].double()
            a, b = before_down(expert, x[tokens].float()), before_down(original, y[tokens].float())
            every_a, every_b = before_down(expert, x.float()).double(), before_down(original, y.float()).double()
            for k, keep in enumerate((~held, held)):
                assert_moments(own[first + k], e, x[tokens], y[tokens], keep[tokens])
                assert_moments(own[first + 2 + k], e, a.double() * weight, b.double() * weight, keep[tokens])
                assert_moments(priors[first + k], 0, x, y, keep)
                assert_moments(priors[first + 2 + k], e, every_a, every_b, keep)
    assert len(used) == 8
    assert all(a is b for a, b in zip(used, shrunk, strict=True))


def test_outcomes_count_the_tokens_that_the_artifact_routes(made):
    passed = perplexity.run(Model(open_checkpoint(made.out)), calibration().ids, [slice(0, WINDOWS)])
    fitted = ~aside().numpy()
    for outcome in made.encoded.outcomes:
        chosen = passed.routes[int(outcome.module.split(".")[2])]
        if ".experts." in outcome.module:
            assert (
                outcome.tokens == (chosen.reshape(len(fitted), -1)[fitted] == int(outcome.module.split(".")[5])).sum()
            )
        else:
            assert outcome.tokens == fitted.sum()


def test_in_small_pieces_it_computes_the_same(grouped, tmp_path, monkeypatch):
    # One expert and one window at a time, on inputs read from disk, as where memory is short.
    run(planned(grouped), tmp_path / "whole")
    monkeypatch.setattr(routed, "MOMENT_BYTES", 1)
    monkeypatch.setattr(hidden, "ROWS", 1)
    monkeypatch.setattr(hidden, "room_on", lambda device: 0)
    monkeypatch.setattr(layerwise, "room_on", lambda device: 0)
    run(planned(grouped), tmp_path / "pieces")
    whole, pieces = tensors(tmp_path / "whole"), tensors(tmp_path / "pieces")
    same = [(whole[n].view(torch.uint8) == pieces[n].view(torch.uint8)).double().mean() for n in whole if "packed" in n]
    # Sums in another order differ by rounding, which may carry a code over an edge, and a row's later codes with it.
    assert min(same) > 0.9
    assert np.mean(same) > 0.99


# What it is worth


def test_gptq_diverges_less_than_rounding(tmp_path):
    source, tokenizer = open_checkpoint(tiny.MINI), Tokenizer.open(tiny.MINI)
    tokens = tokenizer.encode(python_topics().content[:20_000])
    ids = cut(tokens, 256, tokenizer.bos_id, "default", "topics").ids
    fitted, scored = ids[:8], ids[8:20]
    passes = [perplexity.run(Model(source), scored, [slice(0, len(scored))])]
    for method in ("rtn", "gptq"):
        plan = make_plan(source, recipe.builtin("int4-pure", method=method))
        result = run(plan, tmp_path / method, Calibration(fitted, "topics", "", 0, []))
        passes.append(perplexity.run(Model(open_checkpoint(result.out)), scored, [slice(0, len(scored))]))
    rounded, calibrated = (compare(passed, passes[0], scored, 0).kld.mean(1) for passed in passes[1:])
    gain = rounded - calibrated  # nats in each window
    assert gain.mean() > 4 * bootstrap(gain)
    assert calibrated.mean() < 0.9 * rounded.mean()
