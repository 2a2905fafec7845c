"""docs/sizes.md has what plans say now."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from gguf_tiny import PUBLISHED

from dsv2quant.arch.families import model_config

ROOT = Path(__file__).parent.parent
SIZES = runpy.run_path(str(ROOT / "tools/sizes.py"))


@pytest.mark.parametrize("model", SIZES["MODELS"])
def test_the_tables_are_those_of_the_plans(model: str, tmp_path: Path) -> None:
    text = (ROOT / "docs/sizes.md").read_text()
    written = text.partition(f"\n## {model}\n")[2].partition("\n## ")[0].strip().splitlines()
    assert written == SIZES["tables"](tmp_path, {model: SIZES["MODELS"][model]})[model]


def test_what_a_gpu_holds_is_counted_with_its_cache() -> None:
    config = model_config(PUBLISHED["lite"], "config.json")
    room = SIZES["card_capacity"]("16GB") - SIZES["cached"](config) - SIZES["COMPUTING"]
    assert SIZES["cached"](config) == 32_768 * 27 * (512 + 64) * 2
    for more, gpus in ((0, "1"), (1, "2")):
        assert SIZES["counts"](SIZES["Size"]("--int8", room + more, 0), config)[1] == gpus
        assert SIZES["counts"](SIZES["Size"]("--gguf Q8_0", room + more, 0), config)[1] == gpus
