"""Whole GGUF files, byte for byte those of llama.cpp: convert_hf_to_gguf.py, llama-quantize, llama-gguf-split.

tests/golden/gguf_files.json is made by tests/clients/llama_cpp/goldens.py (llama.cpp 0c1e57098); the models and the
importance matrices are made here, the same on every machine.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from gguf_expected import (
    CASES,
    OPTIONS,
    SPLIT_MODELS,
    SPLIT_SIZE,
    Case,
    crc,
    keys_and_values,
    types_and_digests,
    write_imatrix,
)  # fmt: skip
from gguf_tiny import MODELS, write

from dsv2quant.formats.gguf.file_types import FILE_TYPES
from dsv2quant.storage import gguf as container

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gguf_files.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def imatrices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{model: folder of its imatrix.gguf}: a file repeats the path that was given, which is relative here."""
    folders = {model: tmp_path_factory.mktemp(model) for model in MODELS}
    for model, folder in folders.items():
        write_imatrix(folder / "imatrix.gguf", model)
    return folders


@pytest.fixture
def convert(cli, models, imatrices, tmp_path, monkeypatch):
    """Convert a case with the command; more options may follow."""

    def run(case: Case, *more: str) -> Path:
        monkeypatch.chdir(imatrices[case.model])
        out = tmp_path / f"{case.model}.gguf"
        weighted = ["--imatrix", "imatrix.gguf"] * case.weighted
        options = [*weighted, *OPTIONS.get(case.options, ()), *more]
        ran = cli("convert", models[case.model], "--gguf", case.file_type, *options, "-q", "-o", out)
        assert ran.code == 0, ran.err
        return out

    return run


def expected_types(case: Case) -> list[str]:
    runs = GOLDEN["cases"][str(case)]["types"].split(", ")
    return [name for run in runs for name in [run.split()[1]] * int(run.split()[0])]


def expected_metadata(case: Case) -> list[list]:
    found = GOLDEN["metadata"][f"{case.model}{'-imatrix' * case.weighted}"]
    number = FILE_TYPES[case.file_type].number
    return [[key, kind, number if key == "general.file_type" else value] for key, kind, value in found]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_file_is_llama_quantizes(case: Case, convert) -> None:
    golden = GOLDEN["cases"][str(case)]
    out = convert(case)
    made = container.read(out)
    digests = re.findall("." * 8, golden["tensors"])
    ours = types_and_digests(made)
    assert len(ours) == len(digests)
    wrong = [
        (name, ours_type, theirs_type)
        for (name, ours_type, ours_crc), theirs_type, crc_ in zip(ours, expected_types(case), digests, strict=True)
        if (ours_type, ours_crc) != (theirs_type, crc_)
    ]
    assert not wrong, f"{len(wrong)} tensors differ, the first (our type, theirs): {wrong[:3]}"
    assert keys_and_values(made) == expected_metadata(case)
    assert crc(out.read_bytes()) == golden["file"]


@pytest.mark.parametrize("model", SPLIT_MODELS)
def test_a_split_file_is_llama_gguf_splits(model: str, convert) -> None:
    out = convert(Case(model, "Q4_K_M", False), "--split-max-size", SPLIT_SIZE)
    assert {path.name: crc(path.read_bytes()) for path in out.parent.glob("*.gguf")} == GOLDEN["split"][model]


def test_a_file_that_fits_is_not_split(convert) -> None:
    """llama-gguf-split would call it …-00001-of-00001.gguf."""
    case = Case("tiny-odd", "Q4_K_M", False)
    assert crc(convert(case, "--split-max-size", "1GB").read_bytes()) == GOLDEN["cases"][str(case)]["file"]


def test_without_expert_groups_nothing_but_two_keys_differs(convert) -> None:
    """llama.cpp routes within groups as DeepSeek-V3 does, not as V2: without the keys it routes over all experts."""
    case = Case("tiny-v2", "Q4_0", False)
    made = container.read(convert(case, "--drop-expert-groups"))
    groups = ("deepseek2.expert_group_count", "deepseek2.expert_group_used_count")
    assert keys_and_values(made) == [item for item in expected_metadata(case) if item[0] not in groups]
    assert "".join(digest for _, _, digest in types_and_digests(made)) == GOLDEN["cases"][str(case)]["tensors"]


def test_the_plan_says_why_a_width_falls_back_to_f16(cli, models) -> None:
    ran = cli("plan", models["tiny-odd"], "--gguf", "Q4_K_M")
    assert "ffn_down_exps, 1 → F16: rows of 40 are not whole blocks of 256, as Q6_K has" in ran.out
