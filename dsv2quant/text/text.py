"""The text to score: a file, wikitext-2, or Python's own help topics, which are on every machine."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dsv2quant.errors import InputError
from dsv2quant.storage.files import check_pointer

DATASETS = ("wikitext2",)
_UTF8 = "give a UTF-8 text file: iconv -f UTF-16 -t UTF-8 makes one of Windows' Unicode"


@dataclass(frozen=True)
class Text:
    """A text, where it comes from, and the hash that says whether two measurements scored the same one."""

    source: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def find(path: str | None, dataset: str | None, cache_dir: str | None = None, offline: bool = False) -> Text:
    """A file's text, a dataset's, or without either the help topics. Raises InputError as these do."""
    if path is not None:
        return from_file(path)
    return python_topics() if dataset is None else from_dataset(dataset, cache_dir, offline)


def from_file(path: str) -> Text:
    """A UTF-8 text file. Raises InputError for one that can't be read or is none: NUL is in UTF-16 and binary files."""
    try:
        content = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"can't be read: {error.strerror}", where=path, fix="give a UTF-8 text file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"can't be read: {error}", where=path, fix=_UTF8) from None
    check_pointer(content[:64].encode(), Path(path))
    if "\0" in content:
        raise InputError("holds NUL characters, which no text has", where=path, fix=_UTF8)
    return Text(Path(path).name, content)


def python_topics() -> Text:
    """`pydoc_data.topics` of the running Python: every topic in order of its key, joined by blank lines."""
    from pydoc_data.topics import topics

    return Text("pydoc_data.topics", "\n\n".join(topics[key] for key in sorted(topics)))


def from_dataset(name: str, cache_dir: str | None = None, offline: bool = False) -> Text:
    """A dataset from the hub. wikitext2 is the raw test split, its lines joined as every published figure has them."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError("needs pyarrow", where=f"--dataset {name}", fix="pip install 'dsv2quant[datasets]'") from None
    from huggingface_hub import errors, hf_hub_download

    try:
        path = hf_hub_download(
            "Salesforce/wikitext",
            "wikitext-2-raw-v1/test-00000-of-00001.parquet",
            repo_type="dataset",
            cache_dir=cache_dir,
            local_files_only=offline,
        )
    except (errors.HTTPError, errors.EntryNotFoundError, OSError) as error:
        fix = "download it once with a connection, or give --text FILE"
        raise InputError(f"can't be downloaded: {error}", where=f"--dataset {name}", fix=fix) from None
    lines = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    return Text(name, "\n\n".join(lines))
