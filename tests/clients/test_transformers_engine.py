"""`verify --engine transformers`: transformers in a process of its own, on artifacts of each scheme."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import faults
import pytest
import tiny
from engine_stand_in import program

from dsv2quant.api import convert

WIDE = tiny.WORDY | {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "kv_lora_rank": 128}
MODELS = {
    "v2-lite": WIDE,
    "llama": tiny.LLAMA | {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2},
}
SCHEMES = {
    "fp8-block": {}, "fp8-channel": {}, "fp8-tensor": {},
    "int4-mixed": {"method": "rtn", "group_size": 64}, "int4-pure": {"method": "rtn", "group_size": 64},
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: tiny.write_checkpoint(folder / name, raw) for name, raw in MODELS.items()}


@pytest.fixture
def verify(cli, fox):
    def verify(artifact: Path, *args: object):
        words = ("--engine", "transformers", "--text", fox, "--windows", 3, "--ctx", 64, "--json", "-q")
        return cli("verify", artifact, *words, *args)

    return verify


def made(source: Path, out: Path, scheme: str) -> Path:
    convert(source, out, scheme=scheme, targets=["transformers"], **SCHEMES[scheme])
    return out


@pytest.mark.parametrize(
    ("model", "scheme"),
    [*(("v2-lite", scheme) for scheme in SCHEMES), ("llama", "fp8-channel"), ("llama", "int4-pure")],
)
def test_it_computes_what_the_runtime_computes(model, scheme, sources, verify, tmp_path):
    ran = verify(made(sources[model], tmp_path / "out", scheme))
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["engine"]
    assert found["report"]["versions"].keys() >= {"transformers", "torch"}
    assert found["likeliest"] is None
    # Its departures from the engines are part of that: without them, it would be beyond its limit.
    assert 0 < found["kld"]["mean"] <= found["limit"]


def test_beside_its_source_and_from_text_to_text(sources, verify, tmp_path):
    source = sources["v2-lite"]
    ran = verify(made(source, tmp_path / "out", "int4-pure"), "--source", source, "--generate")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["engine"]
    assert found["floor"]["kld"]["mean"] > 0
    assert len(found["generated"]) == 5


@pytest.mark.parametrize("fault", [faults.scales_permuted, faults.expert_swapped], ids=lambda f: f.__name__)
def test_where_it_reads_something_else_it_is_seen(fault, sources, verify, tmp_path):
    artifact = made(sources["v2-lite"], tmp_path / "out", "int4-pure")
    bad = faults.copy(artifact, tmp_path / "bad", fault)
    ran = verify(artifact, "--engine-python", program(tmp_path / "python", model=bad, python=sys.executable))
    assert (ran.code, "out in transformers: mean KLD from the runtime is" in ran.err) == (4, True)


@pytest.mark.parametrize("scheme", ["fp8-channel", "fp8-block"])
def test_in_float32_codes_fall_either_way_too(scheme, sources, verify, tmp_path):
    """The limit knows, though nothing but the order of sums differs."""
    ran = verify(made(sources["v2-lite"], tmp_path / "out", scheme), "--dtype", "float32")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["engine"]
    assert (found["own_dtype"], found["floor"]) == ("bfloat16", None)
