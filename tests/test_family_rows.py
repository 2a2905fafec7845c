"""Three rows of docs/family.md's table run here, as unlike as can be; all of them by tools/family_table.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_configs import ROWS
from family_rows import COLUMNS, ticks, tried, with_rows

PAGE = Path(__file__).parent.parent / "docs" / "family.md"
RUN = ("deepseek-llm-67b", "deepseek-moe-16b", "DeepSeek-V3")


@pytest.mark.parametrize("name", RUN)
def test_every_verb_takes_it(name, tmp_path, cli, one_thread):
    said = tried(name, tmp_path, cli)
    page = PAGE.read_text(encoding="utf-8")
    assert with_rows(page, {name: ticks(said)}) == page, said


def test_every_row_is_in_the_table():
    page = PAGE.read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| ") and line.count("|") == len(COLUMNS) + 2]
    names = [line.split("|")[1].strip() for line in lines]
    assert [name for name in names if name] == list(ROWS)
