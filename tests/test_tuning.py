"""Tuning: what is trained and what stays, what is refused, what is not taken, and runs that are cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from calibrated import files, interrupt, manifest
from test_convert import contents

import dsv2quant as dq
from dsv2quant.calib import local, trained, tuning, whole
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError, UsageError
from dsv2quant.formats.integers import levels
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.text.calibration import load, windows

pytestmark = pytest.mark.usefixtures("one_thread")
CTX, TOKENS = 32, 1024
LAYOUTS = ("compressed-tensors", "gptq", "awq")


@pytest.fixture
def quickly(monkeypatch):
    """Few steps that are large."""
    monkeypatch.setattr(trained, "RATE", 1e-2)
    monkeypatch.setattr(tuning, "STEP_TOKENS", 64)


@pytest.fixture(params=[True, False], ids=["whole", "by-layers"])
def way(request, monkeypatch) -> bool:
    """Whether the model is held whole, or each layer is tuned by itself."""
    if not request.param:
        monkeypatch.setattr(tuning, "_fits", lambda *args: False)
    return request.param


def made(model: Path, out: Path, fox: Path, tune: int | None = TOKENS, layout: str = "compressed-tensors") -> Path:
    asked: dict[str, Any] = {"calibration": fox, "length": CTX, "tune": tune} if tune is not None else {}
    dq.convert(model, out, scheme="int4-pure", method="rtn", group_size=32, targets=["transformers"], layout=layout,
               **asked)  # fmt: skip
    return out


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What is stored of each weight."""
    opened = open_checkpoint(folder)
    return {weight.spec.name: opened.parts(weight) for weight in opened.weights}


def divergence(source: Path, artifact: Path, ids: torch.Tensor) -> float:
    """KL(source ‖ artifact) over all positions of the windows, by the runtime."""
    options = LoadOptions(weight_only=True)
    wanted, found = (Model(open_checkpoint(f), options).forward(ids).log_softmax(-1) for f in (source, artifact))
    return float((wanted.exp() * (wanted - found)).sum(-1).double().mean())


@pytest.mark.parametrize("scheme", ["int4-g32", "gptq-g32", "awq-g32", "int3-g32", "int2-g32"])
def test_codes_and_scales_come_back_from_what_they_were_packed_into(scheme):
    integers = CODECS[scheme].integers
    rng, (low, high) = np.random.default_rng(0), levels(integers.bits)
    codes = rng.integers(low, high + 1, (16, 96)).astype(np.int8)
    scales = integers.storable(rng.random((16, 3), np.float32))
    found = integers.unpack(integers.pack(codes, scales))
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found, (codes, scales), strict=True))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A model without experts, which every layout takes."""
    config = tiny.LLAMA | {"vocab_size": 4096, "num_hidden_layers": 2}
    return tiny.write_checkpoint(tmp_path_factory.mktemp("dense") / "dense", config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_scales_norms_and_routers_are_trained_and_nothing_else(layout, wordy, dense, fox, tmp_path, quickly):
    model = wordy if layout == "compressed-tensors" else dense
    before = weights(made(model, tmp_path / "plain", fox, None, layout))
    after = weights(made(model, tmp_path / "tuned", fox, layout=layout))
    changed = {
        (name, suffix)
        for name, parts in before.items()
        for suffix, array in parts.items()
        if not torch.equal(array, after[name][suffix])
    }
    both = ("weight_packed", "weight_scale") if layout == "compressed-tensors" else ("qweight", "scales")
    stored = open_checkpoint(tmp_path / "plain").weights
    learnt = {(w.spec.name, part) for w in stored if w.scheme != "bf16" for part in both}
    assert changed == learnt | {(w.spec.name, "weight") for w in stored if w.spec.role in ("norm", "router")}
    assert manifest(tmp_path / "tuned")["tuned"]["accepted"]


def test_the_divergence_of_what_is_held_out_falls_as_the_manifest_says(wordy, fox, tmp_path, quickly, way):
    plain, tuned = made(wordy, tmp_path / "plain", fox, None), made(wordy, tmp_path / "tuned", fox)
    about = manifest(tuned)["tuned"]
    assert about["accepted"]
    assert about["together"] == way
    assert about["kld_after"] < 0.9 * about["kld_before"]
    tokenizer = open_checkpoint(wordy).tokenizer()
    ids = torch.from_numpy(windows(load(fox, wordy), tokenizer, TOKENS // CTX, CTX, 0))
    held = ids[8::16]
    assert (about["tokens"], about["held_out_tokens"]) == (ids.numel() - held.numel(), held.numel())
    for key, folder in (("kld_before", plain), ("kld_after", tuned)):
        assert divergence(wordy, folder, held) == pytest.approx(about[key], rel=1e-4)


def test_the_bar_ends_where_it_said(wordy, fox, tmp_path, quickly, way):
    told = Counter[str]()

    @contextmanager
    def progress(total: int, unit: str, label: str) -> Iterator[Any]:
        told[f"{label}, in all"] += total
        yield lambda amount: told.update({label: amount})

    dq.convert(wordy, tmp_path / "x", scheme="int4-pure", method="rtn", group_size=32, targets=["transformers"],
               calibration=fox, length=CTX, tune=TOKENS, progress=progress)  # fmt: skip
    assert told["tune"] == told["tune, in all"] == TOKENS + manifest(tmp_path / "x")["tuned"]["tokens"]


def test_no_scale_moves_beyond_the_bound(wordy, fox, tmp_path, quickly, monkeypatch):
    monkeypatch.setattr(trained, "RATE", 1.0)
    found = iter([1.0, 0.5])  # as if it had fallen
    monkeypatch.setattr(tuning, "_held_out", lambda whole, tokens: next(found))
    folders = made(wordy, tmp_path / "plain", fox, None), made(wordy, tmp_path / "tuned", fox)
    before, after = (weights(folder) for folder in folders)
    moved = [
        (after[name][suffix].double() / before[name][suffix].double()).log().abs().max()
        for name, parts in before.items()
        for suffix in parts
        if suffix == "weight_scale" or name.endswith(("norm.weight", "gate.weight"))
    ]
    assert 0.9 * trained.BOUND < max(moved) < trained.BOUND + 2**-8  # BF16's rounding


def test_where_it_rises_nothing_is_taken(wordy, fox, tmp_path, quickly, monkeypatch):
    monkeypatch.setattr(trained, "RATE", -1e-2)
    plain, tuned = made(wordy, tmp_path / "plain", fox, None), made(wordy, tmp_path / "tuned", fox)
    about = manifest(tuned)["tuned"]
    assert about["kld_after"] > about["kld_before"]
    assert not about["accepted"]
    assert contents(tuned)["model.safetensors"] == contents(plain)["model.safetensors"]


def test_it_is_told_what_came_of_it(wordy, fox, tmp_path, quickly, cli):
    asked = ["--int4=pure", "--method", "rtn", "--group-size", 32, "--target", "transformers", "--tune", "1k"]
    ran = cli("convert", wordy, "-o", tmp_path / "x", *asked, "--calibration", fox, "--max-seq-length", CTX)
    about = manifest(tmp_path / "x")["tuned"]
    assert ran.out.startswith(
        f"tuned on {29 * CTX:,} tokens: KLD of {2 * CTX} held out {about['kld_before']:.4f} → "
        f"{about['kld_after']:.4f} nats, taken\n"
    )
    assert "--tune 1k --calibration fox.txt --max-seq-length 32 --seed 0" in manifest(tmp_path / "x")["command"]


def test_gptqs_windows_are_the_first_of_those_it_is_tuned_on(wordy, fox, tmp_path, quickly):
    options: dict[str, Any] = {"calibration": fox, "length": CTX, "samples": 20, "targets": ["transformers"]}
    for name, tune in (("plain", None), ("tuned", "1k")):
        dq.convert(wordy, tmp_path / name, scheme="int4-pure", group_size=32, tune=tune, **options)
    plain, tuned = (manifest(tmp_path / name)["calibration"] for name in ("plain", "tuned"))
    assert tuned.pop("tuning")["windows"] == 1000 // CTX
    assert tuned == plain
    before, after = (weights(tmp_path / name) for name in ("plain", "tuned"))
    codes = [name for name, parts in before.items() if "weight_packed" in parts]
    assert codes
    moved = [(before[name]["weight_packed"] != after[name]["weight_packed"]).float().mean() for name in codes]
    assert max(moved) < 0.5  # of eight codes in a word: these began where GPTQ had left them


@pytest.mark.parametrize("at", ["layer", "snapshot", "end"])
def test_cut_anywhere_it_continues_to_the_same_bytes(at, wordy, fox, tmp_path, quickly, monkeypatch):
    whole = made(wordy, tmp_path / "whole", fox)
    steps = 15  # of 30 windows, two at a time
    with monkeypatch.context() as m:
        if at == "layer":
            m.setattr(tuning, "whole_model", interrupt)
        elif at == "end":
            m.setattr("dsv2quant.conversion.convert._write_small_files", interrupt)
        else:
            _interrupt_at(m, 7)
        with pytest.raises(KeyboardInterrupt):
            made(wordy, tmp_path / "cut", fox)
    assert "config.json" not in files(tmp_path / "cut")
    taken = []
    share = tuning._share
    monkeypatch.setattr(tuning, "_share", lambda step, steps: taken.append(step) or share(step, steps))
    made(wordy, tmp_path / "cut", fox)
    assert contents(tmp_path / "cut") == contents(whole)
    assert taken == list(range({"layer": 0, "snapshot": 7, "end": steps}[at], steps))


def _interrupt_at(m: pytest.MonkeyPatch, wanted: int) -> None:
    """Ctrl-C in the midst of a step of the training."""
    share = tuning._share
    m.setattr(tuning, "_share", lambda step, steps: interrupt() if step == wanted else share(step, steps))


def test_a_damaged_snapshot_is_not_used(wordy, fox, tmp_path, quickly, monkeypatch):
    whole = made(wordy, tmp_path / "whole", fox)
    with monkeypatch.context() as m:
        _interrupt_at(m, 7)
        with pytest.raises(KeyboardInterrupt):
            made(wordy, tmp_path / "cut", fox)
    (snapshot,) = (tmp_path / "cut").rglob("step-*.safetensors")
    content = snapshot.read_bytes()
    middle = len(content) // 2
    snapshot.write_bytes(content[:middle] + np.ones(1, np.float32).tobytes() + content[middle + 4 :])
    made(wordy, tmp_path / "cut", fox)
    assert contents(tmp_path / "cut") == contents(whole)


def test_a_short_text_is_gone_over_again_in_another_order(wordy, fox, tmp_path, quickly, monkeypatch):
    seen = []
    learn = whole.Whole.learn
    monkeypatch.setattr(whole.Whole, "learn", lambda one, ids, *rest: seen.append(ids) or learn(one, ids, *rest))
    short = tmp_path / "short.txt"
    short.write_text(fox.read_text()[:1500])
    about = manifest(made(wordy, tmp_path / "out", short))["tuned"]
    windows_seen = [tuple(window) for ids in seen for window in ids.tolist()]
    each = Counter(windows_seen)
    assert len(each) < 20
    assert max(each.values()) - min(each.values()) <= 1 < max(each.values())
    assert windows_seen[: len(each)] != windows_seen[len(each) : 2 * len(each)]
    assert about["tokens"] + about["held_out_tokens"] == TOKENS


def test_another_number_of_tokens_is_another_artifact(wordy, fox, tmp_path, quickly):
    made(wordy, tmp_path / "out", fox)
    with pytest.raises(InputError, match="is not empty"):
        made(wordy, tmp_path / "out", fox, 768)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--fp8", "--tune", "2M"], "--tune trains integers and their scales"),
        (["--int4", "--tune", "2X"], "--tune 2X (give a number of tokens"),
        (["--int4=pure", "--group-size", "32", "--tune", "100", "--max-seq-length", "32"], "3 windows of 32 tokens"),
        (["--gguf", "BF16", "--tune", "2M"], "--tune trains codes of blocks and their scales"),
        (["--gguf", "Q4_K_M", "--calibration", "x"], "--calibration does not go with --gguf"),
    ],
)
def test_what_can_not_be_tuned_is_refused(asked, message, wordy, fox, tmp_path, cli):
    text = [] if "--calibration" in asked else ["--calibration", fox]
    ran = cli("convert", wordy, "-o", tmp_path / ("x.gguf" if "--gguf" in asked else "x"), *asked, *text)
    assert ran.code == 2
    assert message in ran.err


def test_what_only_calibrates_is_refused_beside_tuning_alone(wordy, fox, tmp_path):
    with pytest.raises(UsageError, match="nothing of this recipe calibrates"):
        dq.convert(wordy, tmp_path / "x", scheme="int4-pure", method="rtn", samples=20, tune=TOKENS, calibration=fox)


def test_what_memory_holds_decides_how_it_is_tuned(wordy):
    specs = [weight.spec for weight in open_checkpoint(wordy).weights]
    layers = Counter[int | None]()
    for spec in specs:
        layers[spec.layer] += spec.size
    whole, layer = 4 * layers.total() + 12 * max(layers.values()), 16 * max(layers.values())
    assert layer < whole

    def fits(nbytes: int) -> bool:
        with pytest.MonkeyPatch.context() as m:
            m.setattr(tuning.os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": nbytes}.__getitem__)
            return tuning._fits("model", specs, "cpu")

    assert fits(whole)
    assert not fits(whole - 1)
    assert not fits(layer)
    with pytest.raises(InputError, match=f"tuning holds its largest layer, {layer:,} bytes; cpu has {layer - 1:,}"):
        fits(layer - 1)


def test_by_layers_all_but_what_lies_outside_of_them_is_trained(wordy, fox, tmp_path, quickly, monkeypatch):
    monkeypatch.setattr(tuning, "_fits", lambda *args: False)
    before = weights(made(wordy, tmp_path / "plain", fox, None))
    after = weights(made(wordy, tmp_path / "tuned", fox))
    same = {name for name in before if all(torch.equal(before[name][part], after[name][part]) for part in before[name])}
    stored = open_checkpoint(tmp_path / "plain").weights
    trained_ones = {w.spec.name for w in stored if w.scheme != "bf16" or w.spec.role in ("norm", "router")}
    assert before.keys() - same == trained_ones - {"model.norm.weight"}


def test_a_layer_whose_own_error_rises_stays(wordy, fox, tmp_path, quickly, monkeypatch):
    monkeypatch.setattr(tuning, "_fits", lambda *args: False)
    learn = local._Layer.learn

    def worse(layer, module, parts, windows, share):
        learn(layer, module, parts, windows, -share if layer.index == 1 else share)

    monkeypatch.setattr(local._Layer, "learn", worse)
    plain, tuned = made(wordy, tmp_path / "plain", fox, None), made(wordy, tmp_path / "tuned", fox)
    before, after = weights(plain), weights(tuned)
    same = {name for name in before if all(torch.equal(before[name][part], after[name][part]) for part in before[name])}
    of_layer = {name for name in before if ".layers.1." in name}
    assert of_layer <= same
    assert manifest(tuned)["tuned"]["accepted"]


def test_by_layers_cut_in_the_second_it_continues_to_the_same_bytes(wordy, fox, tmp_path, quickly, monkeypatch):
    monkeypatch.setattr(tuning, "_fits", lambda *args: False)
    whole = made(wordy, tmp_path / "whole", fox)
    seen, learn = [], local._Layer.learn

    def counted(layer, *rest):
        seen.append(layer.index)
        learn(layer, *rest)

    monkeypatch.setattr(local._Layer, "learn", counted)
    with monkeypatch.context() as m:
        m.setattr(local._Layer, "learn", lambda one, *rest: interrupt() if one.index == 1 else counted(one, *rest))
        with pytest.raises(KeyboardInterrupt):
            made(wordy, tmp_path / "cut", fox)
    assert set(seen) == {0}
    seen.clear()
    made(wordy, tmp_path / "cut", fox)
    assert set(seen) == {1}
    assert contents(tmp_path / "cut") == contents(whole)
