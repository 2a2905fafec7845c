"""Data sets of lm_eval's tasks are cached where a test's other files are."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
