"""`calibrate`: what the statistics file says against what a forward pass shows, and what a run cut short leaves."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file

from dsv2quant.arch.spec import LINEAR_ROLES
from dsv2quant.calib import collect, streams
from dsv2quant.calib.calibrate import calibrate, statistics_bytes
from dsv2quant.calib.calibration import Calibration
from dsv2quant.calib.statistics import Statistics
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError
from dsv2quant.model.attention import Rope
from dsv2quant.model.layers import Linear, MoE, Served, route
from dsv2quant.model.runtime import Model

WINDOWS, CTX = 5, 12


pytestmark = pytest.mark.usefixtures("one_thread")


def calibration(windows: int = WINDOWS, ctx: int = CTX, seed: int = 0, vocabulary: int = 160) -> Calibration:
    ids = np.random.default_rng(seed).integers(0, vocabulary, (windows, ctx))
    return Calibration(ids, "random", "", seed, [])


@pytest.fixture(scope="module", params=["lite", "v2"])
def measured(request, tmp_path_factory):
    """(checkpoint, statistics) of a tiny model, measured in small pieces."""
    folder = tmp_path_factory.mktemp(request.param)
    config = {"lite": tiny.LITE, "v2": tiny.V2}[request.param]
    checkpoint = open_checkpoint(tiny.write_checkpoint(folder / "model", config))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(streams, "ROWS", 2 * CTX)
        return checkpoint, calibrate(checkpoint, folder / "stats.safetensors", calibration())


def names_of(model: Model) -> dict[int, str]:
    """Module names by the identity of their weights."""
    found = {}
    for index, layer in enumerate(model.layers()):
        at = f"model.layers.{index}"
        owners = [(f"{at}.self_attn", layer.attention)]
        if isinstance(layer.ffn, MoE):
            owners += [(f"{at}.mlp.experts.{e}", ffn) for e, ffn in enumerate(layer.ffn.experts)]
            owners.append((f"{at}.mlp.shared_experts", layer.ffn.shared))
        else:
            owners.append((f"{at}.mlp", layer.ffn))
        for name, owner in owners:
            for key, value in vars(owner).items():
                if isinstance(value, Linear):
                    found[id(value.weight)] = f"{name}.{key}"
    return found


def test_every_input_is_measured_as_a_forward_pass_shows_it(measured, monkeypatch):
    """Inputs differ from those of one whole batch by float32 rounding, about 1e-6; sums add in float64."""
    checkpoint, statistics = measured
    model = Model(checkpoint)
    names, seen, routes = names_of(model), defaultdict(list), []
    linear = Linear.__call__

    def record(self, x):
        if id(self.weight) in names:  # the head's input is not measured
            seen[names[id(self.weight)]].append((x.x if isinstance(x, Served) else x).flatten(0, -2))
        return linear(self, x)

    def recorded_route(x, *router):
        routes.append((x, *route(x, *router)))
        return routes[-1][1:]

    monkeypatch.setattr(Linear, "__call__", record)
    monkeypatch.setattr("dsv2quant.model.layers.route", recorded_route)
    model.forward(torch.from_numpy(calibration().ids))
    stored = load_file(statistics.path)
    used = set()
    moe_layers = [i for i in range(checkpoint.config.num_hidden_layers) if checkpoint.config.is_moe(i)]
    for weight in checkpoint.weights:
        spec = weight.spec
        if spec.role not in LINEAR_ROLES:
            continue
        x = torch.cat(seen[spec.module]) if spec.module in seen else torch.zeros(0, spec.shape[1])
        used |= {f"{spec.site}.{suffix}" for suffix in ("amax", "square")}
        assert statistics.count(spec) == len(x)
        want = x.abs().amax(0).numpy() if len(x) else np.zeros(spec.shape[1], np.float32)
        np.testing.assert_allclose(statistics.amax(spec), want, rtol=1e-5)
        squares = x.double().square()
        np.testing.assert_allclose(stored[f"{spec.site}.square"], squares.sum(0), rtol=1e-5)
        if spec.expert is not None:
            _, weights, chosen = routes[moe_layers.index(spec.layer)]
            g = weights[chosen == spec.expert].double()  # by token, as the expert's tokens are
            assert len(g) == len(x)
            name = f"{spec.site}.weighted_square"
            used.add(name)
            np.testing.assert_allclose(stored[name], (g[:, None] ** 2 * squares).sum(0), rtol=1e-5)
    for layer, (x, *_) in zip(moe_layers, routes, strict=True):
        name = f"model.layers.{layer}.mlp.gate"
        np.testing.assert_allclose(stored[f"{name}.square"], x.double().square().sum(0), rtol=1e-5)
        used |= {f"{name}.amax", f"{name}.square"}
    radii = {f"model.layers.{i}.self_attn.k_pe_radius" for i in range(checkpoint.config.num_hidden_layers)}
    assert set(stored) == used | radii
    assert sum(array.nbytes for array in stored.values()) <= statistics_bytes(checkpoint.config)


def test_the_radius_of_k_pe_bounds_it_at_every_position(measured, monkeypatch):
    checkpoint, statistics = measured
    rotated = defaultdict(list)
    rotate = Rope.rotate

    def record(x, table, halves):
        out = rotate(x, table, halves)
        rotated[x.dim()].append(out)  # keys are [batch, new, ·], queries [batch, heads, new, ·]
        return out

    monkeypatch.setattr(Rope, "rotate", staticmethod(record))
    Model(checkpoint).forward(torch.from_numpy(calibration().ids))
    for layer, k_pe in enumerate(rotated[3]):
        pairs = k_pe.flatten(0, 1).unflatten(-1, (-1, 2)).double()
        radius = load_file(statistics.path)[f"model.layers.{layer}.self_attn.k_pe_radius"]
        np.testing.assert_allclose(radius, pairs.norm(dim=-1).amax(0), rtol=1e-5)
        latent, largest = statistics.kv_ranges(layer)
        assert largest == radius.max() >= float(k_pe.abs().max()) * (1 - 1e-6)
        assert latent == load_file(statistics.path)[f"model.layers.{layer}.self_attn.kv_b_proj.amax"].max()


def test_experts_with_few_tokens_lean_on_their_layer(measured, tmp_path):
    checkpoint, statistics = measured
    stored = load_file(statistics.path)
    specs = [w.spec for w in checkpoint.weights if w.spec.role.startswith("routed.")]
    for spec in specs:
        count, columns = statistics.count(spec), spec.shape[1]
        down = spec.role == "routed.down_proj"
        own = stored[f"{spec.site}.{'weighted_square' if down else 'square'}"].astype(np.float64)
        prior = np.ones(columns) if down else stored[f"model.layers.{spec.layer}.mlp.gate.square"].astype(np.float64)
        found = statistics.mean_square(spec)
        if not count:
            np.testing.assert_array_equal(found, prior.astype(np.float32))
            continue
        want = (count * own + columns * prior * own.sum() / prior.sum()) / (count + columns) / count
        np.testing.assert_allclose(found, want, rtol=1e-6)
    starved = calibrate(checkpoint, tmp_path / "one", calibration(1, 2))
    unseen = [spec for spec in specs if not starved.count(spec)]
    assert unseen
    assert all(starved.mean_square(spec).all() and not starved.amax(spec).any() for spec in unseen)
    some = next(w.spec for w in checkpoint.weights if w.spec.role == "o_proj")
    want = stored[f"{some.site}.square"] / np.float32(WINDOWS * CTX)
    np.testing.assert_array_equal(statistics.mean_square(some), want)


def lite(folder: Path) -> Checkpoint:
    return open_checkpoint(tiny.write_checkpoint(folder / "lite", tiny.LITE))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("lost", [None, "hidden"])
def test_cut_short_it_continues_and_ends_with_the_same_bytes(layer, lost, tmp_path, monkeypatch):
    checkpoint = lite(tmp_path)
    calibrate(checkpoint, tmp_path / "whole", calibration())
    original, calls = collect._measured, []

    def cut(layer_, at, *args):
        calls.append(at)
        if at == f"model.layers.{layer}":
            raise KeyboardInterrupt
        return original(layer_, at, *args)

    with monkeypatch.context() as m:
        m.setattr(collect, "_measured", cut)
        with pytest.raises(KeyboardInterrupt):
            calibrate(checkpoint, tmp_path / "stats", calibration())
    assert not (tmp_path / "stats").exists()
    if lost:
        for path in (tmp_path / "stats.work" / "layers").glob(f"{lost}*"):
            path.unlink()
    monkeypatch.setattr(collect, "_measured", lambda layer_, at, *a: (calls.append(at), original(layer_, at, *a))[1])
    calls.clear()
    calibrate(checkpoint, tmp_path / "stats", calibration())
    assert calls[0] == f"model.layers.{0 if lost else layer}"
    assert (tmp_path / "stats").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["lite", "stats", "whole"]
    calls.clear()
    calibrate(checkpoint, tmp_path / "stats", calibration())
    assert not calls


def test_what_is_there_is_not_overwritten(tmp_path, monkeypatch):
    checkpoint = lite(tmp_path)
    out = tmp_path / "stats"
    calibrate(checkpoint, out, calibration())
    before = out.read_bytes()
    with pytest.raises(InputError, match=r"stats: holds statistics of another model or another calibration .*--force"):
        calibrate(checkpoint, out, calibration(seed=1))
    assert out.read_bytes() == before

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(collect, "_measured", interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibrate(checkpoint, out, calibration(seed=1), force=True)
    assert out.read_bytes() == before
    out.unlink()
    with pytest.raises(InputError, match=r"stats.work: holds an unfinished calibration of another model, text or"):
        calibrate(checkpoint, out, calibration(seed=2))
    calibrate(checkpoint, out, calibration(seed=2), force=True)
    assert Statistics(out).about["calibration"]["seed"] == 2


def test_two_runs_do_not_share_a_work_folder(tmp_path, monkeypatch):
    checkpoint = lite(tmp_path)
    original = collect._measured

    def meanwhile(*args):
        with pytest.raises(InputError, match="another run is writing to it"):
            calibrate(checkpoint, tmp_path / "stats", calibration())
        return original(*args)

    monkeypatch.setattr(collect, "_measured", meanwhile)
    calibrate(checkpoint, tmp_path / "stats", calibration())


def test_the_disk_is_checked_before_the_work(tmp_path, monkeypatch):
    checkpoint = lite(tmp_path)
    needed = 2 * statistics_bytes(checkpoint.config) + 2 * 4 * WINDOWS * CTX * 64
    usage = os.statvfs(tmp_path)
    assert usage.f_bavail * usage.f_frsize > needed
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": needed - 1}))
    with pytest.raises(InputError, match=f"needs {needed:,} bytes beside it, the disk has {needed - 1:,} free"):
        calibrate(checkpoint, tmp_path / "stats", calibration())


def test_statistics_of_another_model_are_refused(measured, tmp_path):
    checkpoint, statistics = measured
    statistics.check(checkpoint)
    raw = json.loads((checkpoint.folder / "config.json").read_text())
    weights = tiny.random_weights(raw)
    resharded = open_checkpoint(tiny.write_checkpoint(tmp_path / "sharded", raw, weights, shards=3))
    statistics.check(resharded)
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][0, 3] += 1
    other = open_checkpoint(tiny.write_checkpoint(tmp_path / "other", raw, weights))
    with pytest.raises(InputError, match=r"stats.safetensors: statistics of another model, model \(calibrate other\)"):
        statistics.check(other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "no such file .*dsv2quant calibrate"),
        (lambda p: (p.unlink(), p.mkdir()), "stats: is a folder"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "not a statistics file"),
        (lambda p: p.write_bytes(b"{}"), "not a statistics file"),
        (lambda p: p.write_bytes(next(tiny.MINI.glob("*.safetensors")).read_bytes()), "not a statistics file"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"statistics/2", b"statistics/9")), "schema .*calibrate again"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"identity", b"identitx")), "its header is incomplete"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b'counts\\": {', b'countx\\": {')), "its header is incomplete"),
    ],
)
def test_a_damaged_file_is_one_line(damage, message, tmp_path):
    path = calibrate(lite(tmp_path), tmp_path / "stats", calibration()).path
    damage(path)
    with pytest.raises(InputError, match=message):
        Statistics(path)


def test_the_command_prints_coverage_and_draws_it(wordy, fox, tmp_path, cli):
    out, figure = tmp_path / "stats.safetensors", tmp_path / "experts.svg"
    options = ("--calibration", fox, "--num-calibration-samples", "4", "--max-seq-length", "16", "--figure", figure)
    ran = cli("calibrate", wordy, "-o", out, *options)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0].split() == [
        "layer", "fewest", "tokens", "median", "most", "variation", "below", "128", "unseen", "experts",
    ]  # fmt: skip
    assert ran.out.splitlines()[-1].endswith("inputs of wordy, 64 tokens")
    assert "<svg" in figure.read_text()
    result = json.loads(cli("calibrate", wordy, "-o", out, *options, "--json", "-q").out)
    assert result["schema"] == "dsv2quant.calibrate/2"
    statistics = Statistics(out)
    for row in result["experts"]:
        tokens = [statistics.counts[f"model.layers.{row['layer']}.mlp.experts.{e}.gate_proj"] for e in range(4)]
        assert sum(tokens) == 64 * 2
        assert (row["fewest"], row["most"]) == (min(tokens), max(tokens))
        assert row["median"] == int(np.median(tokens))
        assert math.isclose(row["variation"], np.std(tokens) / np.mean(tokens))
        assert row["starved"] == sum(n < 128 for n in tokens)
        assert row["unseen"] == [e for e in range(4) if not tokens[e]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--figure", "x.gif"), "must end in .png, .svg or .pdf"),
        (("--max-seq-length", "4"), "x>=8"),
        (("--device", "cuda:9"), "--device cuda:9 can't be used"),
    ],
)
def test_wrong_usage(options, message, tmp_path, cli):
    ran = cli("calibrate", tiny.MINI, "-o", tmp_path / "stats", *options)
    assert ran.code == 2
    assert message in ran.err
    assert not list(tmp_path.iterdir())


def test_a_figure_without_matplotlib_is_refused_before_the_work(tmp_path, cli, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = cli("calibrate", tiny.MINI, "-o", tmp_path / "stats", "--figure", "x.png")
    assert ran.code == 2
    assert "pip install 'dsv2quant[viz]'" in ran.err
