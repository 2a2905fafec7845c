"""Data sets of the hub as records: `ORG/NAME`, with `@REVISION`, `:SPLIT` and `#COLUMN` behind it as wanted.

Which files make a split is said by the data set's card (`configs` in its front matter), else by their names, as
datasets/data_files.py reads both. Only parquet and JSON files are read, never a data set's own script.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from dsv2quant.errors import InputError, listing
from dsv2quant.storage.hub import is_offline
from dsv2quant.storage.hub_errors import hub_errors
from dsv2quant.text.chat import Chat
from dsv2quant.text.text import from_file, objects, record

MAX_ROWS = 20_000  # of a split, from its begin: more are needed for no calibration, and take minutes to render
ALONE, BESIDE = ("text", "messages", "conversations", "prompt"), ("completion", "system", "tools")  # of a record
_SUFFIXES = (".parquet", ".jsonl", ".json")
_NO_DATA = ("dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_NAMED = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?(?::([\w.-]+))?(?:#(.+))?")
_SHARDED = re.compile(r"(?:.*/)?([\w.-]+?)-\d{5}-of-\d{5}[^/]*")
_TRAIN = "train"
_WITH = "give ORG/NAME:SPLIT#COLUMN, or a file of it"


@dataclass(frozen=True)
class Dataset:
    """A split of a data set, and the column that is its text or chats; None: as records of a file have them."""

    repo: str
    revision: str | None
    split: str
    column: str | None

    def __str__(self) -> str:
        """As `--calibration` takes it."""
        at, column = f"@{self.revision}" * bool(self.revision), f"#{self.column}" * bool(self.column)
        return f"{self.repo}{at}:{self.split}{column}"


def named(spec: str) -> Dataset | None:
    """The data set that `spec` names; None where it is the path of a file, be that there or not."""
    found = _NAMED.fullmatch(spec)
    is_path = Path(spec).exists() or spec.lower().endswith((*_SUFFIXES, ".txt", ".md"))
    if found is None or is_path:
        return None
    return Dataset(found[1], found[2], found[3] or _TRAIN, found[4])


def read(dataset: Dataset, cache_dir: str | None, offline: bool) -> tuple[Dataset, list[str | Chat]]:
    """(the data set at the commit that was read, its first MAX_ROWS texts and chats in their order). Raises InputError
    where it, the split or the column is not there, or a record holds no text."""
    files = _Files.offline(dataset, cache_dir) if is_offline(offline) else _Files.online(dataset, cache_dir)
    found = replace(dataset, revision=files.commit)
    wanted = split_files(files.names, dataset.split, files.card(), str(dataset))
    rows = (row for name in wanted for row in _rows(files.fetch(name), name, found))
    return found, list(islice(rows, MAX_ROWS))


@dataclass(frozen=True)
class _Files:
    """The names of a data set's files at a commit, and how they are had: from its `folder` in the cache, if that is
    given, else from the hub."""

    dataset: Dataset
    commit: str
    names: list[str]
    cache_dir: str | None
    folder: Path | None = None

    @classmethod
    def online(cls, dataset: Dataset, cache_dir: str | None) -> _Files:
        from huggingface_hub import HfApi

        with hub_errors(dataset.repo, cache_dir, is_dataset=True):
            info = HfApi().dataset_info(dataset.repo, revision=dataset.revision)
            return cls(dataset, str(info.sha), [entry.rfilename for entry in info.siblings], cache_dir)

    @classmethod
    def offline(cls, dataset: Dataset, cache_dir: str | None) -> _Files:
        from huggingface_hub import errors, snapshot_download

        with hub_errors(dataset.repo, cache_dir, is_dataset=True):
            try:
                found = snapshot_download(
                    dataset.repo, repo_type="dataset", revision=dataset.revision, cache_dir=cache_dir,
                    local_files_only=True,
                )  # fmt: skip
            except errors.LocalEntryNotFoundError:
                again = "run once online, without --offline and HF_HUB_OFFLINE"
                raise InputError("not in the local cache", where=dataset, fix=again) from None
        folder = Path(found)
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        return cls(dataset, folder.name, names, cache_dir, folder)

    def fetch(self, name: str) -> Path:
        if self.folder is not None:
            return self.folder / name
        from huggingface_hub import hf_hub_download

        with hub_errors(self.dataset.repo, self.cache_dir, is_dataset=True):
            # By its branch, not the commit: the cache then knows the branch when offline.
            found = hf_hub_download(
                self.dataset.repo, name, repo_type="dataset", revision=self.dataset.revision, cache_dir=self.cache_dir
            )  # fmt: skip
        if f"/snapshots/{self.commit}/" not in found:
            raise InputError("changed while it was read", where=self.dataset, fix="run the same command again")
        return Path(found)

    def card(self) -> Sequence[Any]:
        """`configs` of the card's front matter; empty where there is none that can be read."""
        if "README.md" not in self.names:
            return ()
        parts = re.split("^---[ \t]*\r?\n", self.fetch("README.md").read_text("utf-8-sig", "replace"), flags=re.M)
        try:
            front = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
        except (yaml.YAMLError, RecursionError):
            return ()
        configs = front.get("configs") if isinstance(front, dict) else None
        return configs if isinstance(configs, list) else ()


def split_files(names: Sequence[str], split: str, configs: Sequence[Any], where: str) -> list[str]:
    """The files of a split, of a data set with files of these names and these `configs` in its card, in order. Raises
    InputError naming the splits that there are."""
    data = sorted(name for name in names if name.lower().endswith(_SUFFIXES) and name not in _NO_DATA)
    if not data:
        raise InputError("holds no parquet and no JSON files", where=where, fix="give a text, .jsonl or .json file")
    splits = _declared(configs, data, where) or _by_name(data, where)
    if split not in splits:
        raise InputError(f"has no split {split!r}: there are {listing(sorted(splits), 8)}", where=where, fix=_WITH)
    return splits[split]


def _declared(configs: Sequence[Any], data: Sequence[str], where: str) -> dict[str, list[str]]:
    """{split: files} as the card has them of its one or default configuration; empty where it says nothing."""
    given = [config for config in configs if isinstance(config, Mapping) and config.get("data_files")]
    default = [config for config in given if config.get("default") or config.get("config_name") == "default"]
    if len(given) > 1 and len(default) != 1:
        names = [str(config.get("config_name")) for config in given]
        raise InputError(f"has several configurations: {listing(names, 8)}", where=where, fix="give a file of it")
    splits: dict[str, list[str]] = {}
    for config in default or given:
        listed = config["data_files"]
        entries = listed if isinstance(listed, list) else [listed]
        for entry in entries:
            is_split = isinstance(entry, Mapping) and "split" in entry
            paths = entry.get("path") if is_split else entry
            patterns = [path for path in (paths if isinstance(paths, list) else [paths]) if isinstance(path, str)]
            held = splits.setdefault(str(entry["split"]) if is_split else _TRAIN, [])
            held += [name for name in data if any(fnmatch.fnmatchcase(name, p) for p in patterns) and name not in held]
    return {name: files for name, files in splits.items() if files}


def _by_name(data: Sequence[str], where: str) -> dict[str, list[str]]:
    """{split: files} by `SPLIT-00000-of-00001`, else by a word in the path; what has neither is all there is."""
    splits: dict[str, list[str]] = {}
    for name in data:
        if sharded := _SHARDED.fullmatch(name):
            splits.setdefault(sharded[1], []).append(name)
    for word in (_TRAIN, "test", "validation"):
        for name in data if not splits.get(word) and not any(map(_SHARDED.fullmatch, data)) else ():
            if re.search(rf"(?<![a-zA-Z]){word}(?![a-zA-Z])", name):
                splits.setdefault(word, []).append(name)
    splits = splits or {_TRAIN: list(data)}
    for files in splits.values():
        folders = sorted({name.rpartition("/")[0] for name in files})
        if len(folders) > 1:
            raise InputError(f"has several configurations: {listing(folders, 8)}", where=where, fix="give a file of it")
    return splits


def _rows(path: Path, name: str, dataset: Dataset) -> Iterator[str | Chat]:
    """The texts and chats of a file, one by one. Raises InputError naming the file and the row that is wrong."""
    where = f"{dataset.repo}, {name}"
    if name.lower().endswith(".parquet"):
        found = _parquet(path, dataset, where)
    else:
        found = objects(where, from_file(path, MAX_ROWS if name.lower().endswith(".jsonl") else None).content)
    for row, at in found:
        yield record(row if dataset.column is None else _of_column(row, dataset.column, at), at)


def _parquet(path: Path, dataset: Dataset, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(what a row holds of the columns that are read, which row it is)."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError("needs pyarrow", where=dataset, fix="pip install 'dsv2quant[datasets]'") from None
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise InputError(f"can't be read: {error!s:.200}", where=where, fix="tell the data set's owner") from None
    columns = _columns(file.schema_arrow.names, dataset, where)
    rows = (row for batch in file.iter_batches(1024, columns=columns) for row in batch.to_pylist())
    for number, row in enumerate(rows, 1):
        yield _without_nulls(row), f"{where}, row {number}"


def _columns(held: Sequence[str], dataset: Dataset, where: str) -> list[str]:
    """The columns to read: the one that is asked for, or those that make a record."""
    there = listing([*held], 12)
    if dataset.column is not None:
        if dataset.column in held:
            return [dataset.column]
        raise InputError(f"has no column {dataset.column!r}: there are {there}", where=where, fix=_WITH)
    alone = [name for name in ALONE if name in held]
    if not alone:
        what = f"has none of the columns {', '.join(ALONE)}: there are {there}"
        raise InputError(what, where=where, fix=f"name one of texts or chats: {dataset.repo}#COLUMN")
    if len(alone) > 1:
        fix = f"name one, as {dataset.repo}#{alone[0]}"
        raise InputError(f"has the columns {' and '.join(alone)}", where=where, fix=fix)
    return [*alone, *(name for name in BESIDE if name in held)]


def _without_nulls(value: Any) -> Any:
    """Parquet's rows have every key that any row has: what is null was not there."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _of_column(row: Any, column: str, where: str) -> dict[str, Any]:
    """A column's text or chat as a record."""
    value = row.get(column) if isinstance(row, dict) else None
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list):
        return {"messages": value}
    what = f"{column!r} is neither a text nor a list of messages: {value!r:.40}"
    raise InputError(what, where=where, fix="name another column")
