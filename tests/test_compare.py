"""compare: artifacts beside each other, whoever made them."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import tiny

import dsv2quant as dq
from dsv2quant.errors import InputError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = {"ctx": 64, "limit": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """dsv2-mini in block FP8, by others in GPTQ's layout, whose folder has no manifest, and in Q4_K_M."""
    folder = tmp_path_factory.mktemp("compare")
    dq.convert(tiny.MINI, folder / "fp8", scheme="fp8-block")
    dq.convert(tiny.MINI, folder / "gptq", scheme="int4-pure", method="rtn", layout="gptq", targets=["vllm"])
    (folder / "gptq/dsv2quant.json").unlink()
    (folder / "gptq/README.md").unlink()
    dq.convert(tiny.MINI, folder / "Q4_K_M.gguf", gguf="Q4_K_M")
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"The {i}th file is opened, read and closed again." for i in range(80)))
    return path


def test_sizes_and_bits_need_headers_alone(made, cli, monkeypatch):
    monkeypatch.setattr("dsv2quant.checkpoint.checkpoint.Checkpoint.read", None)
    ran = cli("compare", made / "fp8", made / "gptq", made / "Q4_K_M.gguf")
    assert ran.code == 0, ran.err
    head, _, *rows = ran.out.splitlines()
    assert head.split() == ["artifact", "size", "bits/weight"]
    sizes = [
        (made / name).stat().st_size for name in ("fp8/model.safetensors", "gptq/model.safetensors", "Q4_K_M.gguf")
    ]
    assert [row.split() for row in rows] == [
        [name, f"{size / 1e6:.2f}", "MB", f"{dq.inspect(made / name).bits_per_weight:.2f}"]
        for name, size in zip(("fp8", "gptq", "Q4_K_M.gguf"), sizes, strict=True)
    ]


def test_distances_are_those_of_eval_ppl(made, text, cli):
    options = ("--reference", tiny.MINI, "--text", text, "--ctx", "64", "--limit", "4", "--json", "-q")
    result = json.loads(cli("compare", made / "fp8", made / "Q4_K_M.gguf", *options).out)
    assert (result["schema"], result["model"]) == ("dsv2quant.compare/1", "dsv2-mini")
    for artifact, name in zip(result["artifacts"], ("fp8", "Q4_K_M.gguf"), strict=True):
        alone = json.loads(cli("eval-ppl", made / name, *options).out)
        scores = artifact["scores"]
        assert scores["kld"] == {key: alone["kld"][name] for key, name in (("value", "mean"), ("stderr", "stderr"))}
        assert scores["ln_ratio"] == {"value": alone["delta"]["ln_ratio"], "stderr": alone["delta"]["stderr"]}
        assert scores["top1"]["value"] == alone["top1_agreement"]
        assert scores["text_sha256"] == alone["text"]["sha256"]
        assert (artifact["name"], artifact["bytes"]) == (name, sum(f["size"] for f in dq_files(made / name)))


def dq_files(path):
    return [{"size": size} for size in dq.inspect(path).files.values()]


def test_without_a_reference_the_first_is_it(made, text):
    report = dq.compare([tiny.MINI, made / "fp8", made / "gptq"], text=text, **FEW)
    first, fp8, gptq = report.artifacts
    assert report.model == first.name == "dsv2-mini"
    assert first.measured.scores is None
    assert fp8.measured.scores.reference == "dsv2-mini"
    assert 0 < fp8.measured.scores.kld.value < gptq.measured.scores.kld.value
    with pytest.raises(UsageError, match="one model alone has nothing to be compared with"):
        dq.compare([made / "fp8"], text=text)
    with pytest.raises(UsageError, match="--limit goes with --text, --dataset or --reference"):
        dq.compare([tiny.MINI, made / "fp8"], limit=2)


def test_errors_are_by_role_and_of_others_artifacts_too(made, cli):
    ran = cli("compare", tiny.MINI, made / "fp8", made / "gptq", "--source", tiny.MINI, "-q")
    assert ran.code == 0, ran.err
    table = ran.out.partition("SQNR, dB")[2]
    rows = {row[0]: row[1:] for row in (line.split() for line in table.splitlines()[2:])}
    checked = {role.role: role for role in dq.verify(made / "fp8", tiny.MINI).errors.roles}
    assert rows["routed.up_proj"][:2] == ["exact", f"{checked['routed.up_proj'].sqnr_db:.2f}"]
    assert rows["o_proj"][:2] == ["exact", f"{checked['o_proj'].sqnr_db:.2f}"]
    assert 15 < float(rows["o_proj"][2]) < 25  # four bits
    assert rows["q_a_proj"][:2] == ["exact", "exact"]  # block FP8 leaves it
    assert not re.search(r"perplexity", ran.out)


def test_a_model_of_another_source_is_refused(made, lite):
    with pytest.raises(InputError, match="lite is another model"):
        dq.compare([made / "fp8"], source=lite)


def test_artifacts_of_one_name_are_told_apart_by_their_paths(made, tmp_path):
    for place in ("one", "two"):
        shutil.copytree(made / "fp8", tmp_path / place / "fp8")
    report = dq.compare([tmp_path / "one/fp8", tmp_path / "two/fp8", made / "gptq"])
    assert [a.name for a in report.artifacts] == [str(tmp_path / "one/fp8"), str(tmp_path / "two/fp8"), "gptq"]


def test_what_experts_saw_is_in_the_manifest_of_ours(wordy, fox, tmp_path):
    calibrated = {"calibration": fox, "samples": 2, "group_size": 32, "targets": ["transformers"]}
    dq.convert(wordy, tmp_path / "out", scheme="int4-experts", **calibrated)
    (artifact,) = dq.compare([tmp_path / "out"]).artifacts
    (row,) = artifact.coverage
    assert row["layer"] == 1
    assert 0 <= row["fewest"] <= row["median"] <= row["most"] <= 64
