"""Tasks of lm_eval over files: what needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def written(folder: Path, tasks: Mapping[str, tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]) -> Path:
    """The folder with a file of records and a configuration of each task, by name."""
    for name, (records, task) in tasks.items():
        data = folder / f"{name}.json"
        data.write_text(json.dumps(records))
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **files, **task}))
    return folder
