"""What a codec or block encoder returns is checked against the plan: after a fault in one nothing looks finished."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf_tiny
import numpy as np
import pytest
import tiny
from calibrated import calibration
from test_convert import contents

from dsv2quant.calib.calibration import Prepared
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion import convert, gguf, shards
from dsv2quant.errors import PlanViolation
from dsv2quant.formats.codec import Inputs
from dsv2quant.formats.gguf import blocks
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning import recipe
from dsv2quant.planning.consumers import Parallel
from dsv2quant.planning.gguf_plan import Entry, GgufPlan, Options, make_gguf_plan
from dsv2quant.planning.plan import SMOOTHED, Plan, _lay_out, _line
from dsv2quant.storage.durable import MANIFEST_FILE, STATE_FILE, WORK_FOLDER, file_entry
from dsv2quant.storage.engine import File, Job, Written, write
from dsv2quant.storage.safetensors import HELD_AS

Parts = dict[str, np.ndarray]
SIGNED = {1: np.int8, 2: np.int16, 4: np.uint32, 8: np.uint64}


def last(parts: Parts, change: Callable[[np.ndarray], np.ndarray]) -> Parts:
    name = list(parts)[-1]
    return parts | {name: change(parts[name])}


def swapped(parts: Parts) -> Parts:
    values = list(parts.values())
    return dict(zip(parts, values[1:] + values[:1] if len(values) > 1 else [values[0].reshape(-1)], strict=True))


FAULTS: dict[str, Callable[[Parts], Parts]] = {
    "one scale too few": lambda parts: last(parts, lambda a: a.reshape(-1)[:-1]),
    "swapped parts": swapped,
    "wrong dtype": lambda parts: last(parts, lambda a: a.view(SIGNED[a.itemsize])),
    "missing part": lambda parts: dict(list(parts.items())[:-1]),
    "extra part": lambda parts: parts | {"surplus": np.zeros(1, np.float32)},
    "wrong shape": lambda parts: last(parts, lambda a: a.reshape(1, *a.shape)),
}


def plan_of_one(model: Path, scheme: str, method: str) -> Plan:
    """A matrix in a scheme, whatever consumers say to it, and one in fp8-channel before it."""
    checkpoint = open_checkpoint(model)
    weights = [w for w in checkpoint.weights if w.spec.role == "routed.down_proj"][:2]
    planned = ((weights[0], "fp8-channel", "rtn"), (weights[1], scheme, method))
    lines = tuple(_line(*choice, None, (), checkpoint.names) for choice in planned)
    steps, _, shards = _lay_out(lines, (), ("vllm",), 10**9)
    return Plan(
        checkpoint, recipe.builtin("fp8-channel"), ("vllm",), Parallel(), lines, steps, shards, checkpoint.raw_config
    )


def nothing_is_finished(out: Path) -> None:
    assert {path.name for path in out.iterdir()} <= {STATE_FILE, WORK_FOLDER}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows and columns that every scheme takes."""
    raw = tiny.GROUPED | {"moe_intermediate_size": 128, "num_hidden_layers": 2, "n_routed_experts": 2}
    return tiny.write_checkpoint(tmp_path_factory.mktemp("model") / "model", raw | {"num_experts_per_tok": 1})


@pytest.fixture
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("conversion.shards", "calib.calibrate"):
        monkeypatch.setattr(f"dsv2quant.{module}.needs_statistics", lambda plan: False)
    monkeypatch.setattr(Prepared, "__init__", lambda self, *args: self.__dict__.update(PREPARED))
    monkeypatch.setattr(Prepared, "inputs", lambda self, line: Inputs(np.ones(line.spec.shape[1], np.float32), 1.0))


PREPARED = {
    "statistics": None,
    "encoded": None,
    "smoothing": SimpleNamespace(tensors={}, apply=lambda spec, weight: weight),
}


@pytest.mark.usefixtures("uncalibrated")
@pytest.mark.parametrize("scheme", CODECS)
def test_a_codec_that_breaks_the_plan_finishes_nothing(scheme, model, tmp_path, monkeypatch):
    plan = plan_of_one(model, scheme, SMOOTHED)
    encode = CODECS[scheme].encode
    for name, fault in FAULTS.items():
        calls = []

        def faulty(*args, fault=fault, calls=calls):
            calls.append(1)
            parts = encode(*args)
            return [fault(parts[0])] if scheme != "fp8-channel" or len(calls) == 2 else parts

        monkeypatch.setattr(CODECS[scheme], "encode", faulty)
        with pytest.raises(PlanViolation, match=r"came") as refused:
            convert.convert(plan, tmp_path / name, command="")
        assert any(line.spec.module in str(refused.value) for line in plan.entries)  # workers race for the second call
        assert "\n" not in str(refused.value)
        nothing_is_finished(tmp_path / name)
    monkeypatch.setattr(CODECS[scheme], "encode", lambda *args: [])
    with pytest.raises(PlanViolation, match="0 weights came, 1 were planned"):
        convert.convert(plan, tmp_path / "none", command="")
    nothing_is_finished(tmp_path / "none")
    monkeypatch.setattr(CODECS[scheme], "encode", lambda *args: [dict(reversed(encode(*args)[0].items()))])
    convert.convert(plan, tmp_path / "another order", command="")
    monkeypatch.setattr(CODECS[scheme], "encode", encode)
    convert.convert(plan, tmp_path / "whole", command="")
    assert contents(tmp_path / "another order") == contents(tmp_path / "whole")


def test_a_step_that_is_never_done_finishes_nothing(model, tmp_path, monkeypatch):
    plan = plan_of_one(model, "int4-g128", "rtn")
    for steps in (plan.steps[:1], plan.steps[1:], (), (*plan.steps, plan.steps[1]), plan.steps[::-1]):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        if len(steps) == 2:
            convert.convert(replace(plan, steps=steps), out, command="")  # another order does no harm
            assert (out / MANIFEST_FILE).exists()
            continue
        with pytest.raises(PlanViolation):
            convert.convert(replace(plan, steps=steps), out, command="")
        assert not (out / "config.json").exists()
        assert not (out / MANIFEST_FILE).exists()


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_calibrated_parts_that_break_the_plan_finish_nothing(fault, model, tmp_path, monkeypatch):
    plan = plan_of_one(model, "int4-g64", "gptq")
    codec, shape = CODECS["int4-g64"], plan.entries[1].spec.shape
    whole = {part.suffix: np.zeros(part.shape, HELD_AS[part.dtype]) for part in codec.layout(shape)}
    module = plan.entries[1].spec.module
    found = {f"{module}.{suffix}": array for suffix, array in fault(whole).items()}
    monkeypatch.setattr(shards, "prepare", lambda *args: Prepared(plan))
    monkeypatch.setattr(Prepared, "encoded_parts", lambda self, line: found)
    with pytest.raises(PlanViolation, match="came"):
        convert.convert(plan, tmp_path / "out", command="", calibration=calibration())
    nothing_is_finished(tmp_path / "out")


def test_the_engine_takes_what_is_planned_alone(tmp_path):
    file, data = File(tmp_path / "f", b"head", (12, 16)), np.arange(16, dtype=np.uint8)

    def job(*spans: tuple[int, int], came: tuple[tuple[int, int], ...] = ()) -> Job:
        return Job(0, "a", spans, 1, 1, lambda: ((begin, data[begin:end]) for begin, end in came or spans))

    for jobs in (
        [],
        [job((4, 12))],
        [job((12, 16))],
        [job((4, 16)), job((4, 16))],
        [job((4, 12)), job((12, 16)), job((12, 16))],
        [job((4, 12), (12, 16), came=((4, 12),))],
        [job((4, 16), came=((4, 8), (12, 16)))],
        [job((4, 12), came=((4, 16),)), job((12, 16))],
        [job((4, 12), came=((0, 12),)), job((12, 16))],
    ):
        with pytest.raises(PlanViolation, match="came"):
            write(jobs, [Written(file)])
        assert list(tmp_path.iterdir()) == []
    written = Written(file)
    write([job((12, 16), (4, 8)), job((8, 12), came=((8, 9), (9, 12)))], [written])
    assert file.path.read_bytes() == b"head" + data[4:].tobytes()
    assert (written.is_whole, written.entry) == (True, file_entry(file.path.read_bytes()))


# GGUF


@pytest.fixture(scope="module")
def blocky(tmp_path_factory: pytest.TempPathFactory) -> GgufPlan:
    """A plan of rows of 256."""
    raw = gguf_tiny.V2 | {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}
    model = tiny.write_checkpoint(tmp_path_factory.mktemp("blocky") / "blocky", raw)
    return make_gguf_plan(open_checkpoint(model), Options("F16"))


BLOCK_FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "a row too few": lambda data: data[:-1],
    "a byte too few": lambda data: data[:, :-1],
    "a row too many": lambda data: np.concatenate([data, data[:1]]),
    "wrong dtype": lambda data: data.view(np.int8),
    "wrong shape": lambda data: data.reshape(-1),
}


def of_type(plan: GgufPlan, kind: str) -> GgufPlan:
    tensors = [line.tensor for line in plan.entries if len(line.tensor.shape) > 1 and line.tensor.shape[-1] == 256]
    return replace(plan, entries=tuple(Entry(tensor, kind, None) for tensor in tensors[1:3]))


@pytest.mark.parametrize("kind", blocks.TYPES)
def test_a_block_encoder_that_breaks_the_plan_finishes_nothing(kind, blocky, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "model_metadata", lambda *args, **options: {})
    plan, out = of_type(blocky, kind), tmp_path / "m.gguf"
    for fault in BLOCK_FAULTS.values():

        def faulty(kind, rows, fault=fault):
            return fault(np.zeros((len(rows), blocks.nbytes(kind, rows.shape[1:])), np.uint8))

        monkeypatch.setattr(blocks, "encode", faulty)
        with pytest.raises(PlanViolation, match=f"as {kind}: .* came, uint8 .* was planned"):
            convert.convert(plan, out)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost", [0, -1, 1], ids=["first", "last", "second"])
def test_a_piece_that_is_never_written_finishes_nothing(lost, blocky, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "model_metadata", lambda *args, **options: {})
    plan, cut = of_type(blocky, "Q8_0"), gguf.pieces
    monkeypatch.setattr("dsv2quant.conversion.gguf.PIECE", 100 * 256)

    def lossy(plan, line):
        found = list(cut(plan, line))
        assert len(found) > 2
        del found[lost]
        return found

    monkeypatch.setattr(gguf, "pieces", lossy)
    with pytest.raises(PlanViolation, match="came"):
        convert.convert(plan, tmp_path / "m.gguf")
    assert os.listdir(tmp_path) == []
