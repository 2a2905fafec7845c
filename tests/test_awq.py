"""Methods that use statistics: `mse` weighted by them, and `awq` with smoothing that leaves every logit as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file
from test_statistics import calibration

from dsv2quant.calib import awq
from dsv2quant.calib.calibrate import calibrate
from dsv2quant.calib.statistics import Statistics
from dsv2quant.checkpoint.checkpoint import Checkpoint, HfCheckpoint
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError
from dsv2quant.formats.cpu import search_scales
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import Plan, make_plan
from dsv2quant.planning.smoothing import SMOOTHING_FILE, Smoothing, SmoothingPair, smoothing_pairs

pytestmark = pytest.mark.usefixtures("one_thread")
# Inputs with a few strong channels, as trained models have: otherwise nothing is worth folding.
STRONG = [3, 17, 40]


def spiky(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    weights = tiny.random_weights(config, seed)
    for name, tensor in weights.items():
        if name.endswith("layernorm.weight"):
            tensor[[c for c in STRONG if c < len(tensor)]] *= 12
        elif name.endswith(("up_proj.weight", "kv_b_proj.weight")):
            tensor[[c for c in STRONG if c < len(tensor)]] *= 8
    return weights


@pytest.fixture(scope="module", params=["lite", "v2"])
def made(request, tmp_path_factory):
    """(plan, statistics, artifact) with every kind of smoothing in use: kv_b_proj is INT4 too."""
    folder = tmp_path_factory.mktemp(request.param)
    config = {"lite": tiny.LITE, "v2": tiny.V2}[request.param]
    checkpoint = open_checkpoint(tiny.write_checkpoint(folder / "model", config, spiky(config)))
    text = (
        "name: x\nrules: [{roles: ['routed.*', 'shared.*', 'dense.*', '*_proj', '*_mqa'],"
        " scheme: int4-channel, method: awq}]"
    )
    plan = make_plan(checkpoint, recipe.parse(text, "test"), for_targets=["transformers"])
    statistics = calibrate(checkpoint, folder / "stats", calibration())
    convert(plan, folder / "out", command="", statistics=statistics)
    return plan, statistics, folder / "out"


def folded(smoothing: Smoothing, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The unquantized model with smoothing applied."""

    decode = HfCheckpoint.decode

    def scaled(checkpoint_, weight, dtype, *rest):
        return torch.from_numpy(smoothing.apply(weight.spec, decode(checkpoint_, weight, torch.float32).numpy())).to(
            dtype
        )

    with monkeypatch.context() as m:
        m.setattr(HfCheckpoint, "decode", scaled)
        return Model(checkpoint)


def test_chosen_folds_leave_every_logit_as_it_is(made, monkeypatch):
    plan, _, out = made
    smoothing = Smoothing.open(out / SMOOTHING_FILE, plan.checkpoint.config)
    moved = {name for name, exponents in smoothing.tensors.items() if exponents.any()}
    for kind in ("input_layernorm", "kv_a_layernorm", "post_attention_layernorm", "up_proj"):
        assert any(f"{kind}.weight.rows" in name for name in moved), kind
    assert any("mlp.gate.weight.columns" in name for name in moved)
    tokens = torch.from_numpy(calibration(3, 20, seed=9).ids)
    want = Model(plan.checkpoint).forward(tokens)
    assert torch.equal(folded(smoothing, plan.checkpoint, monkeypatch).forward(tokens), want)


@pytest.mark.parametrize("config", [tiny.LITE, tiny.V2], ids=["lite", "v2"])
def test_every_legal_fold_at_once_is_exact_and_one_reader_less_is_not(config, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(tiny.write_checkpoint(tmp_path / "model", config))
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    smoothing = [pair for layer in range(3) for pair in smoothing_pairs(checkpoint.config, layer)]

    def chosen(pair: SmoothingPair) -> dict[str, np.ndarray]:
        return Smoothing.of(pair, rng.integers(-3, 4, pair.consumers[0].shape[1]).astype(np.int8))

    for pair in smoothing:
        for name, exponents in chosen(pair).items():
            # A matrix may produce for one pair and consume in another; kv_b_proj produces, and reads the latent's norm.
            assert name not in tensors
            tensors[name] = exponents
    tokens = torch.from_numpy(calibration(2, 20).ids)
    want = Model(checkpoint).forward(tokens)
    assert torch.equal(folded(Smoothing(tensors), checkpoint, monkeypatch).forward(tokens), want)
    readers = [name for name in tensors if name.endswith("columns") and "layers.1" in name]
    roles = {"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate", "down_proj"}
    for role in sorted(roles):
        name = next((name for name in readers if f".{role}.weight" in name), None)
        if name is None:
            assert role in ("q_proj", "q_a_proj", "q_b_proj")
            continue
        rest = {key: value for key, value in tensors.items() if key != name}
        off = folded(Smoothing(rest), checkpoint, monkeypatch).forward(tokens) - want
        assert off.abs().max() > 1e-3, name


def test_exponents_are_those_of_least_weighted_error(made):
    """Against float64: every α's candidate, each group at the best of the scales tried."""
    plan, statistics, _ = made
    lines = {line.spec.name: line for line in plan.entries if line.method == "awq"}
    for pair in smoothing_pairs(plan.checkpoint.config, 1)[:8]:
        readers = [lines[spec.name] for spec in pair.consumers if spec.name in lines]
        found = awq._exponents(plan, pair, readers, statistics, "cpu")
        strength = statistics.mean_square(min(pair.consumers, key=lambda s: s.expert is not None)).astype(np.float64)
        logs = 0.5 * np.log2(np.maximum(strength, strength.max() * 1e-12))
        candidates = [np.rint(a * (logs - logs.mean())).clip(-8, 8) for a in np.linspace(0, 1, 21)]

        def lost(e: np.ndarray, readers=readers) -> float:
            total = 0.0
            for line in readers:
                w = plan.checkpoint.decode(line.weight, torch.float64).numpy() * 2.0**e
                m = statistics.mean_square(line.spec) * max(1, statistics.count(line.spec)) * 4.0**-e
                best = np.full(len(w), np.inf)
                for clip in awq.CLIPS:
                    scales = torch.from_numpy(np.abs(w).max(1) / 7 * clip).float().bfloat16().double().numpy()[:, None]
                    best = np.minimum(best, (m * (np.clip(np.rint(w / scales), -8, 7) * scales - w) ** 2).sum(1))
                total += best.sum()
            return total

        errors = [lost(e) for e in candidates]
        assert lost(found.astype(np.float64)) <= min(errors) * (1 + 1e-4)  # BF16 scales may round the other way
        assert any((found == e).all() for e in candidates)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, e: {name: e[1:]}, "is missing or does not undo its smoothing"),
        (lambda name, e: {name: e.astype(np.float32)}, "is F32, not I8"),
        (lambda name, e: {name: e.reshape(1, -1)}, "is missing or does not undo its smoothing"),
        (lambda name, e: {name.replace("layers.1", "layers.9"): e}, "is missing or does not undo its smoothing"),
        (lambda name, e: {name.rpartition(".")[0]: e}, "is missing or does not undo its smoothing"),
    ],
)
def test_folds_that_do_not_fit_the_model_are_an_error(change, message, made, tmp_path):
    plan, _, out = made
    tensors = load_file(out / SMOOTHING_FILE)
    name = next(name for name in tensors if "layers.1" in name)
    save_file({k: e for k, e in tensors.items() if k != name} | change(name, tensors[name]), tmp_path / SMOOTHING_FILE)
    with pytest.raises(InputError, match=message):
        Smoothing.open(tmp_path / SMOOTHING_FILE, plan.checkpoint.config)


def test_the_artifact_is_folded_weights_with_weighted_scales(made):
    plan, statistics, out = made
    smoothing, artifact = Smoothing.open(out / SMOOTHING_FILE, plan.checkpoint.config), open_checkpoint(out)
    source = {w.spec.name: w for w in plan.checkpoint.weights}
    for weight in artifact.weights:
        want = smoothing.apply(weight.spec, plan.checkpoint.decode(source[weight.spec.name], torch.float32).numpy())
        got = artifact.decode(weight, torch.float32).numpy()
        if weight.scheme == "bf16":
            np.testing.assert_array_equal(got, want)
            continue
        importance = statistics.mean_square(weight.spec)
        columns = smoothing.columns(weight.spec)
        importance = np.ldexp(importance, -2 * columns.astype(np.int32)) if columns is not None else importance
        scales = search_scales(want, importance[None], want.shape[1])
        np.testing.assert_array_equal(got, np.clip(np.rint(want / scales), -8, 7) * scales)


def test_with_a_calibration_it_measures_by_itself_and_gives_the_same_tensors(made, tmp_path):
    plan, _, out = made
    convert(plan, tmp_path / "out", command="", calibration=calibration())
    for name in ("model.safetensors", SMOOTHING_FILE, "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()
    assert not (tmp_path / "out" / ".dsv2quant-work").exists()
    theirs, ours = (json.loads((f / "dsv2quant.json").read_text()) for f in (tmp_path / "out", out))
    assert theirs["calibrated"]["experts"] == ours["calibrated"]["experts"]


@pytest.mark.parametrize("at", ["statistics", "folds", "shards"])
def test_cut_short_it_ends_with_the_same_bytes(at, made, tmp_path, monkeypatch):
    plan, _, out = made
    where = {
        "statistics": ("dsv2quant.calib.collect._measured", 3),
        "folds": ("dsv2quant.calib.awq._exponents", 30),
        "shards": ("dsv2quant.formats.int4.check_finite", 40),
    }[at]
    module, _, name = where[0].rpartition(".")
    original, calls = getattr(__import__(module, fromlist=[name]), name), []

    def cut(*args):
        calls.append(1)
        if len(calls) == where[1]:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as m:
        m.setattr(where[0], cut)
        with pytest.raises(KeyboardInterrupt):
            convert(plan, tmp_path / "out", command="", calibration=calibration())
    assert not (tmp_path / "out" / "config.json").exists()
    convert(plan, tmp_path / "out", command="", calibration=calibration())
    for name in ("model.safetensors", SMOOTHING_FILE, "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes()


def test_verify_compares_with_the_folded_source(made, cli):
    plan, _, out = made
    ran = cli("verify", out, "--source", plan.checkpoint.folder, "--json", "-q")
    assert ran.code == 0, ran.err
    roles = {role["role"]: role["sqnr_db"] for role in json.loads(ran.out)["roles"]}
    assert roles["norm"] is roles["router"] is None  # exact
    assert all(value > 8 for role, value in roles.items() if value is not None)


def planned(model: Path, rules: str) -> Plan:
    return make_plan(
        open_checkpoint(model), recipe.parse(f"name: x\nrules: [{rules}]", "x"), for_targets=["transformers"]
    )


def test_only_what_a_fold_touches_is_rewritten(lite):
    plan = planned(lite, "{roles: [dense.down_proj, q_proj], layers: 0, scheme: int4-channel, method: awq}")
    changed = {line.spec.module: line.method for line in plan.entries if line.method != "rtn"}
    assert changed == {
        "model.layers.0.input_layernorm": "fold",
        "model.layers.0.self_attn.q_proj": "awq",
        "model.layers.0.self_attn.kv_a_proj_with_mqa": "fold",
        "model.layers.0.mlp.up_proj": "fold",
        "model.layers.0.mlp.down_proj": "awq",
    }


def test_awq_does_not_mix_with_gptq(lite):
    rules = "{roles: [o_proj], scheme: int4-channel, method: awq}, {roles: ['*'], scheme: int4-channel, method: gptq}"
    with pytest.raises(InputError, match=r"mixes awq with gptq.*use one of them"):
        planned(lite, rules)


def test_statistics_of_another_model_make_nothing(made, lite, tmp_path):
    _, statistics, _ = made
    other = tiny.write_checkpoint(tmp_path / "other", tiny.LITE, tiny.random_weights(tiny.LITE, seed=5))
    plan = planned(other, "{roles: [o_proj], scheme: int4-channel, method: mse}")
    with pytest.raises(InputError, match="statistics of another model"):
        convert(plan, tmp_path / "out", command="", statistics=statistics)
    assert not (tmp_path / "out").exists()


def test_without_statistics_or_calibration_it_is_a_programming_error(lite, tmp_path):
    plan = planned(lite, "{roles: [o_proj], scheme: int4-channel, method: mse}")
    with pytest.raises(ValueError, match="needs calibration"):
        convert(plan, tmp_path / "out", command="")


def test_mse_searches_with_the_measured_importance(lite, tmp_path):
    plan = planned(lite, "{roles: [o_proj, routed.down_proj], scheme: int4-channel, method: mse}")
    statistics = calibrate(plan.checkpoint, tmp_path / "stats", calibration())
    convert(plan, tmp_path / "out", command="", statistics=Statistics(statistics.path))
    assert SMOOTHING_FILE not in {path.name for path in (tmp_path / "out").iterdir()}
    stored = load_file(tmp_path / "stats")
    name = "model.layers.2.self_attn.o_proj"
    artifact = {w.spec.name: w for w in open_checkpoint(tmp_path / "out").weights}
    (weight,) = (w for w in plan.checkpoint.weights if w.spec.module == name)
    x = plan.checkpoint.decode(weight, torch.float32).numpy()
    scales = search_scales(x, stored[f"{name}.square"][None], x.shape[1])
    got = open_checkpoint(tmp_path / "out").decode(artifact[f"{name}.weight"], torch.float32).numpy()
    np.testing.assert_array_equal(got, np.clip(np.rint(x / scales), -8, 7) * scales)
