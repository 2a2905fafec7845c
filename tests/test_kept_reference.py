"""A kept reference: the live one's numbers to the last bit, what it refuses, and what a kill leaves of it."""

from __future__ import annotations

import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from calibrated import files_no_larger_than, killer

import dsv2quant as dq
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError, UsageError
from dsv2quant.evaluation import keeping
from dsv2quant.evaluation.divergence import Pass, batches_of, compare, run
from dsv2quant.evaluation.reference import HeldReference, KeptHead
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan

# What dsv2-mini's tokenizer fits: a dense layer, and two with experts, of which 300 don't go into a byte.
WIDE = tiny.LITE | {"vocab_size": 4096}
TEXT = tiny.MINI.parent.parent / "LICENSE"  # short: it is tokenized for every evaluation
SCORED = {"text": TEXT, "ctx": 32, "limit": 3}
AS_WORDS = ("--text", TEXT, "--ctx", "32", "--limit", "3", "-q")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("wide") / "wide", WIDE)


@pytest.fixture(scope="module")
def quantized(wide, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "out"
    convert(make_plan(open_checkpoint(wide), recipe.builtin("fp8-channel")), out, command="")
    return out


@pytest.fixture(scope="module")
def kept(wide, tmp_path_factory):
    path = tmp_path_factory.mktemp("kept") / "reference.safetensors"
    dq.evaluate(wide, save_reference=path, **SCORED)
    return path


@pytest.fixture
def copied(kept, tmp_path):
    return shutil.copy(kept, tmp_path / "reference")


def same(left, right):
    """Whether two evaluations found the very same."""
    return (left.scored, left.comparison, left.tokens) == (right.scored, right.comparison, right.tokens)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"protocol": "llama.cpp"},
        {"dtype": "bfloat16"},
        {"stream": True, "batch": 2},
        {"decode_path": True},
        {"weight_only": True},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_numbers_are_those_of_the_live_reference(wide, quantized, tmp_path, options):
    path, scored = tmp_path / "kept", SCORED | options
    alone = dq.evaluate(wide, save_reference=path, **scored)
    live = dq.evaluate(quantized, reference=wide, **scored)
    assert same(dq.evaluate(quantized, reference=path, **scored), live)
    assert live.comparison.kld.mean > 1e-4
    assert alone.perplexity == live.comparison.reference.perplexity
    assert sorted(tmp_path.iterdir()) == [path]


def test_one_that_is_held_makes_its_logits_once(wide, quantized, kept, monkeypatch):
    held, made = HeldReference.opened(kept), []
    logits = KeptHead.logits

    def counted(head, x):
        made.append(len(x))
        return logits(head, x)

    monkeypatch.setattr(KeptHead, "logits", counted)
    for model in (quantized, wide):
        found, live = (dq.evaluate(model, reference=given, **SCORED) for given in (held, kept))
        assert same(found, live)
    windows, scored = SCORED["limit"], SCORED["ctx"] - 1
    # What is held once, one position before it, and the rest each time.
    assert sum(made) == (1 + 2) * windows * scored + 1
    monkeypatch.setattr("dsv2quant.evaluation.reference.HELD", 4 * 4096 * windows * scored - 1)
    large = HeldReference.opened(kept)
    assert all(same(dq.evaluate(wide, reference=large, **SCORED), live) for _ in range(2))
    assert sum(made) == (1 + 2 + 2) * windows * scored + 1  # too large to be held


@pytest.mark.parametrize("family", ["llama", "v3"])
def test_models_without_and_with_many_experts(family, tmp_path):
    more = {"vocab_size": 4096, "n_routed_experts": 320} if family == "v3" else {"vocab_size": 4096}
    model = tiny.write_checkpoint(tmp_path / "m", tiny.FAMILY[family] | more)
    out, path = tmp_path / "out", tmp_path / "kept"
    convert(make_plan(open_checkpoint(model), recipe.builtin("fp8-channel")), out, command="")
    dq.evaluate(model, save_reference=path, **SCORED)
    assert same(dq.evaluate(out, reference=path, **SCORED), dq.evaluate(out, reference=model, **SCORED))


def test_of_dsv2_mini_and_its_artifacts(tmp_path, cli):
    path, scored = tmp_path / "kept", ("--ctx", "128", "--limit", "6", "-q")
    ran = cli("eval-ppl", tiny.MINI, "--save-reference", path, *scored)
    size = path.stat().st_size
    assert f"kept as a reference in kept: {size / 1e6:.2f} MB, {size / 762:,.0f} bytes a token" in ran.out
    head = 2 * 4096 * 256
    assert size - head < 762 * (4 * 256 + 3 * 4 + 4) * 128 / 127 + 4096  # llama.cpp's are 8,200 bytes a token
    for name, method in (("fp8-block", None), ("int4-pure", "rtn")):
        out = tmp_path / name
        convert(make_plan(open_checkpoint(tiny.MINI), recipe.builtin(name, method=method)), out, command="")
        found, live = (cli("eval-ppl", out, "--reference", given, *scored).out for given in (path, tiny.MINI))
        assert found.rpartition(",")[0] == live.rpartition(",")[0]  # but for the seconds
        assert "same routed experts" in found


def test_a_vocabulary_as_large_as_v2s(tmp_path):
    model = tiny.write_checkpoint(tmp_path / "m", WIDE | {"vocab_size": 102_400, "num_hidden_layers": 2})
    out, path = tmp_path / "out", tmp_path / "kept"
    convert(make_plan(open_checkpoint(model), recipe.builtin("fp8-channel")), out, command="")
    dq.evaluate(model, save_reference=path, **SCORED)
    assert same(dq.evaluate(out, reference=path, **SCORED), dq.evaluate(out, reference=model, **SCORED))


def test_fewer_windows_than_it_holds_are_enough(wide, quantized, kept):
    few = SCORED | {"limit": 2, "batch": 1}  # batches are others then, and so is the last bit
    found, live = (dq.evaluate(quantized, reference=given, **few).comparison for given in (kept, wide))
    assert found.kld.mean == pytest.approx(live.kld.mean, rel=1e-4)
    with pytest.raises(InputError, match=r"holds 3 windows, this run has 4 \(give --limit 3"):
        dq.evaluate(quantized, reference=kept, **SCORED | {"limit": 4})


def test_a_reference_diverges_from_itself_by_nothing(wide, kept):
    comparison = dq.evaluate(wide, reference=kept, **SCORED).comparison
    assert comparison.kld.max == 0
    assert comparison.top1_agreement.value == comparison.router_agreement.value == 1


def test_json_says_what_was_kept(wide, kept, cli):
    ran = json.loads(cli("eval-ppl", wide, "--save-reference", kept, "--json", *AS_WORDS).out)  # it is there already
    assert ran["saved"] == {"file": kept.name, "size": kept.stat().st_size}
    against = json.loads(cli("eval-ppl", wide, "--reference", kept, "--json", *AS_WORDS).out)
    assert against["saved"] is None
    assert against["reference"]["identity"] == ran["identity"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--protocol", "llama.cpp"), "was scored with --protocol default, this run has llama.cpp"),
        (("--ctx", "16"), "was scored with --ctx 32, this run has 16 (give --ctx 32"),
        (("--dtype", "bfloat16"), "was scored with --dtype float32, this run has bfloat16"),
        (("--decode-path",), "was scored without --decode-path"),
        (("--text", "mine.txt"), "was scored on LICENSE (sha256 "),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_was_scored_otherwise_is_refused(quantized, kept, tmp_path, monkeypatch, cli, options, words):
    (tmp_path / "mine.txt").write_text("The quick brown fox jumps over the lazy dog. " * 99)
    monkeypatch.chdir(tmp_path)
    given = {"--text": TEXT, "--ctx": 32, "--limit": 3, options[0]: options[-1]}
    words_given = [word for option in given.items() for word in dict.fromkeys(option)]
    ran = cli("eval-ppl", quantized, "--reference", kept, *words_given)
    assert ran.code == 3
    assert words in ran.err


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"vocab_size": 4100}, "has a vocabulary of 4096, m one of 4100"),
        ({"num_hidden_layers": 2}, "is of a model of 3 layers, m has 2"),
    ],
    ids=["vocabulary", "layers"],
)
def test_another_model_is_refused(kept, tmp_path, config, words):
    model = tiny.write_checkpoint(tmp_path / "m", WIDE | config)
    with pytest.raises(InputError, match=words):
        dq.evaluate(model, reference=kept, **SCORED)


def test_another_tokenizer_is_refused(wide, kept, tmp_path):
    model = shutil.copytree(wide, tmp_path / "m")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    learned = [name for name, number in vocabulary.items() if number >= 300]
    vocabulary |= {name: vocabulary[other] for name, other in zip(learned, reversed(learned), strict=True)}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="has other tokens of the same text than m: the tokenizers differ"):
        dq.evaluate(model, reference=kept, **SCORED)


def test_an_artifact_of_other_weights_warns(kept, quantized, tmp_path, cli):
    other = tiny.write_checkpoint(tmp_path / "other", WIDE, tiny.random_weights(WIDE, seed=5))
    out = tmp_path / "out"
    convert(make_plan(open_checkpoint(other), recipe.builtin("fp8-channel")), out, command="")
    ran = cli("eval-ppl", out, "--reference", kept, *AS_WORDS[:-1])
    assert f"warning: {kept} is of wide, and not of the weights that out was made from" in ran.err
    assert "warning" not in cli("eval-ppl", quantized, "--reference", kept, *AS_WORDS[:-1]).err
    dq.evaluate(out, save_reference=tmp_path / "of-out", **SCORED)
    second = shutil.copytree(out, tmp_path / "second")  # made from the same
    assert "warning" not in cli("eval-ppl", second, "--reference", tmp_path / "of-out", *AS_WORDS[:-1]).err


def test_options_that_contradict_each_other(wide, tmp_path):
    path = tmp_path / "kept"
    with pytest.raises(UsageError, match="--save-reference and --reference exclude each other"):
        dq.evaluate(wide, reference=wide, save_reference=path)
    with pytest.raises(UsageError, match="--kv-cache fp8_e4m3: a reference"):
        dq.evaluate(wide, save_reference=path, decode_path=True, kv_cache="fp8_e4m3")
    assert not path.exists()


def test_what_is_there_is_never_overwritten(wide, copied, tmp_path):
    before = copied.read_bytes()
    with pytest.raises(InputError, match="is there, with another ctx, windows, batch than asked for"):
        dq.evaluate(wide, save_reference=copied, **SCORED | {"ctx": 16, "limit": 5})
    assert copied.read_bytes() == before
    notes = tmp_path / "notes.txt"
    notes.write_text("not to be lost")
    with pytest.raises(InputError, match="is there, and truncated or not a safetensors file"):
        dq.evaluate(wide, save_reference=notes, **SCORED)
    assert notes.read_text() == "not to be lost"
    with pytest.raises(InputError, match="would lie among the checkpoint's weights"):
        dq.evaluate(wide, save_reference=wide / "kept.safetensors", **SCORED)
    with pytest.raises(InputError, match="is an input of this command"):
        dq.evaluate(wide, save_reference=wide / "config.json", **SCORED)


def header(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewritten(path, change, data=None):
    """The file with a header that `change` has changed."""
    layout, rest = header(path.read_bytes())
    about = json.loads(layout["__metadata__"]["reference"])
    change(layout, about)
    layout["__metadata__"] = {"reference": json.dumps(about)}
    text = json.dumps(layout).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + (rest if data is None else data))


def reshape(name, shape):
    return lambda layout, about: layout[name].update(shape=shape)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda layout, about: about.update(schema="dsv2quant.reference/9"), "has schema 'dsv2quant.reference/9'"),
        (lambda layout, about: about.pop("schema"), "is no kept reference .give the file that"),
        (lambda layout, about: about.update(windows=1 << 60), "ids is not what its header says"),
        (lambda layout, about: about.update(layers=1 << 60), "its digest is another"),
        (lambda layout, about: about.update(ctx=-1), "its header is incomplete: ctx"),
        (lambda layout, about: about.update(first=31), "its header is incomplete: first"),
        (lambda layout, about: about.update(protocol="mine", dtype="F8"), "its header is incomplete: protocol, dtype"),
        (lambda layout, about: about.pop("noise_floor"), "its header is incomplete: noise_floor"),
        (lambda layout, about: about["weights"].pop("identity"), "its header is incomplete: weights"),
        (lambda layout, about: about["weights"].update(model="another"), "was changed: its digest is another"),
        (lambda layout, about: layout.update(head2=layout.pop("head")), "head is not what its header says"),
        (lambda layout, about: layout["hidden"].update(dtype="I32"), "hidden is not what its header says"),
        (reshape("norm", [1, 64]), "hidden is not what its header says"),
        (reshape("routes.1", [3 * 32 * 3]), "routes.1 is not what its header says"),
    ],
)
def test_a_file_that_nobody_vouches_for(quantized, copied, change, words):
    rewritten(copied, change)
    with pytest.raises(InputError, match=words):
        dq.evaluate(quantized, reference=copied, **SCORED)


def test_damage_is_seen(quantized, copied, tmp_path, cli):
    content = copied.read_bytes()
    for damaged, words in (
        (content[:-1], "truncated: "),
        (content + b"\0", "too long: "),
        (content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "was changed: its digest is another"),
        (b"", "truncated or not a safetensors file"),
    ):
        copied.write_bytes(damaged)
        ran = cli("eval-ppl", quantized, "--reference", copied, *AS_WORDS)
        assert (ran.code, words in ran.err) == (3, True), ran.err
    ran = cli("eval-ppl", quantized, "--reference", tmp_path / "none", *AS_WORDS)
    assert (ran.code, "no such folder" in ran.err) == (3, True)


@pytest.fixture
def at_every_layer(monkeypatch):
    monkeypatch.setattr(keeping, "EVERY", 0.0)


class Stopped(BaseException):
    """Of a run that ends in the midst."""


def test_finished_layers_are_not_computed_again(wide, kept, tmp_path, monkeypatch, at_every_layer):
    path, computed = tmp_path / kept.name, []
    whole = keeping.Snapshots.take

    def stop_behind_two(self, hidden, routes):
        whole(self, hidden, routes)
        if len(routes) == 2:
            raise Stopped

    monkeypatch.setattr(keeping.Snapshots, "take", stop_behind_two)
    with pytest.raises(Stopped):
        dq.evaluate(wide, save_reference=path, **SCORED)
    assert {entry.name for entry in tmp_path.iterdir()} == {f"{kept.name}.hidden", f"{kept.name}.state"}
    with pytest.raises(InputError, match="is of an unfinished reference of another model, text or version"):
        dq.evaluate(wide, save_reference=path, **SCORED | {"ctx": 16})
    monkeypatch.setattr(keeping.Snapshots, "take", lambda self, hidden, routes: computed.append(len(routes)))
    dq.evaluate(wide, save_reference=path, **SCORED)
    assert computed == [3]
    assert path.read_bytes() == kept.read_bytes()
    assert [*tmp_path.iterdir()] == [path]


def test_killed_anywhere_it_ends_with_the_same_bytes(wide, kept, tmp_path):
    command = ("eval-ppl", str(wide), *map(str, AS_WORDS), "--save-reference")
    with killer() as run_killed:
        run_killed(0, *command, str(tmp_path / "first"))  # counts changes of imports, too
        changes, status = run_killed(0, *command, str(tmp_path / "whole"))
        assert status == 0
        expected = (tmp_path / "whole").read_bytes()
        assert expected == kept.read_bytes()
        assert changes > 20
        left = set()
        for n in range(1, changes + 1):
            path = tmp_path / f"{n}" / "kept.safetensors"
            path.parent.mkdir()
            assert run_killed(n, *command, str(path)) == [-signal.SIGKILL]
            left |= {entry.suffix for entry in path.parent.iterdir()}
            assert not path.exists() or path.read_bytes() == expected
            assert run_killed(0, *command, str(path))[1] == 0
            assert path.read_bytes() == expected
            assert [*path.parent.iterdir()] == [path]
        assert left == {".state", ".hidden", ".partial", ".safetensors"}


def test_a_full_disk_is_one_line(wide, tmp_path, cli):
    path = tmp_path / "kept"
    with files_no_larger_than(1 << 16):
        ran = cli("eval-ppl", wide, "--save-reference", path, *AS_WORDS)
    assert ran.code == 3
    assert "can't be written" in ran.err
    assert [*tmp_path.iterdir()] == []


def test_a_disk_too_small_is_told_before_the_work(wide, tmp_path, monkeypatch, cli):
    needed = 4 * (3 * 3 * 32 * 64 + 4096 * 64)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    ran = cli("eval-ppl", wide, "--save-reference", tmp_path / "kept", *AS_WORDS)
    assert (ran.code, f"takes at most {needed:,} bytes, the disk has {needed - 1:,} free" in ran.err) == (3, True)
    assert [*tmp_path.iterdir()] == []


def test_a_pass_that_was_begun_goes_on(wide):
    model, ids = Model(open_checkpoint(wide)), np.random.default_rng(0).integers(0, 4096, (3, 12))
    behind = []
    passed = run(model, ids, batches_of(3, 2), behind=lambda hidden, routes: behind.append((hidden.clone(), [*routes])))
    counted = []
    again = run(model, ids, batches_of(3, 2), counted.append, begun=behind[0])
    assert torch.equal(again.hidden, passed.hidden)
    assert sum(counted) == ids.size * 3
    assert isinstance(again, Pass)
    assert compare(again, passed, ids, 0).router[2].mean() == 1


def test_a_head_that_takes_quantized_activations_is_refused(tmp_path):
    small, path = tmp_path / "small.gguf", tmp_path / "kept"
    dq.convert(tiny.MINI, small, gguf="Q8_0")
    with pytest.raises(InputError, match="its head takes quantized activations"):
        dq.evaluate(small, save_reference=path, serving="llama.cpp", **SCORED)
    assert not path.exists()
    dq.evaluate(small, save_reference=path, **SCORED)
    assert dq.evaluate(small, reference=path, **SCORED).comparison.kld.max == 0
