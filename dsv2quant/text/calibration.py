"""The text to calibrate on: a file, or the docstrings and sources of Python's standard library.

Evaluation texts are kept out: `wikitext2` is refused, the default text leaves out `pydoc_data`, and a fingerprint of
what was calibrated on travels with the artifact, so that a later measurement can tell what it shares with it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import platform
import re
import sysconfig
import tokenize
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv2quant.errors import InputError
from dsv2quant.text import dataset
from dsv2quant.text.chat import Chat, Templates
from dsv2quant.text.text import DATASETS, SUFFIXES, StrPath, from_file, records
from dsv2quant.text.tokenizer import Tokenizer, cut

logger = logging.getLogger(__name__)
# Rich in docstrings, pure Python, the same on every platform. A package stands for the files directly in its folder.
# What a version lacks is skipped: datetime's docstrings lie in _pydatetime from 3.12 on, decimal's in _pydecimal.
MODULES = (
    "_collections_abc", "_pydatetime", "_pydecimal", "argparse", "ast", "asyncio", "collections", "concurrent.futures",
    "configparser", "contextlib", "csv", "dataclasses", "datetime", "difflib", "doctest", "email", "enum", "fractions",
    "ftplib", "functools", "heapq", "http", "imaplib", "importlib.metadata", "inspect", "ipaddress", "json", "logging",
    "mailbox", "multiprocessing", "optparse", "os", "pathlib", "pickle", "pickletools", "platform", "random", "re",
    "shutil", "smtplib", "socket", "socketserver", "sqlite3", "ssl", "statistics", "string", "subprocess", "tarfile",
    "tempfile", "textwrap", "threading", "traceback", "turtle", "typing", "unittest", "urllib", "uuid", "wsgiref",
    "xml.etree", "xml.sax", "xmlrpc", "zipfile",
)  # fmt: skip
# Characters, some 2,000 tokens. Whole sources reach 79,000 tokens: one could fill half of a calibration set.
SECTION = 8_000

# A fingerprint: hashes of lines that are long enough to be nobody else's, one in 8 of them, and no more than 4,096.
LINE = 40
ONE_IN = 8
SKETCH = 4096
MAX_OVERLAP = 0.01  # a larger share of common lines is no coincidence


@dataclass(frozen=True)
class Document:
    """A piece of text; in a rendered chat, special tokens that are spelled out are meant as such."""

    text: str
    is_chat: bool = False


@dataclass(frozen=True)
class CalibrationText:
    """Documents, where they come from, and the hash that says whether two calibrations had the same ones."""

    source: str
    documents: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        """Of the documents as JSON, which keeps their borders: [[text, is_chat], ...]."""
        return hashlib.sha256(json.dumps([[d.text, d.is_chat] for d in self.documents]).encode()).hexdigest()


def load(
    spec: StrPath | None, folder: Path, cache_dir: StrPath | None = None, offline: bool = False
) -> CalibrationText:  # fmt: skip
    """The text that `spec` names: a UTF-8 text file, a file of records (.jsonl, .json), a data set of the hub, or None
    for the default text.

    Records hold texts or chats, which the chat template of the checkpoint in `folder` renders. Of a data set `source`
    has the commit. Raises InputError naming the file, and the line or record, where one can't be read or holds no text.
    """
    if spec is None:
        return standard_library()
    spec = os.fspath(spec)
    if spec in DATASETS:
        what = "an evaluation text, on which a model calibrated on it would look better than it is"
        raise InputError(what, where=spec, fix="give another text")
    if (asked := dataset.named(spec)) is not None:
        read, held = dataset.read(asked, None if cache_dir is None else os.fspath(cache_dir), offline)
        source, found = str(read), iter(_rendered(spec, held, folder))
    elif not Path(spec).exists():
        fix = "give a text, .jsonl or .json file, or a data set of the hub: ORG/NAME:SPLIT#COLUMN"
        raise InputError("can't be read: no such file", where=spec, fix=fix)
    elif spec.lower().endswith(SUFFIXES):
        source, found = Path(spec).name, iter(_rendered(spec, records(spec, from_file(spec).content), folder))
    else:
        source, found = Path(spec).name, _sections(from_file(spec).content)
    documents = tuple(document for document in found if document.text.strip())
    if not documents:
        raise InputError("holds no text", where=spec, fix="give a file with text")
    return CalibrationText(source, documents)


def standard_library() -> CalibrationText:
    """The docstrings of each file of MODULES, then its source, in sections. The same for the same Python version.

    Files are read and parsed, not imported. Raises InputError where Python was installed without its sources.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    documents: list[Document] = []
    for name in MODULES:
        path = library.joinpath(*name.split("."))
        single = path.with_name(f"{path.name}.py")
        for file in [single] if single.exists() else sorted(path.glob("*.py")):
            with tokenize.open(file) as lines:  # decodes as Python does
                source = lines.read()
            documents += [*_sections(_docstrings(source)), *_sections(source)]
    if not documents:
        raise InputError("no sources of Python's standard library", where=library, fix="give a text file")
    return CalibrationText(f"Python {platform.python_version()} standard library", tuple(documents))


def _sections(text: str) -> Iterator[Document]:
    """Documents of SECTION characters and the rest of a line: windows shall come from all over a long text."""
    return map(Document, re.findall(rf"(?s).{{{SECTION}}}.*?\n|.+", text))


def _docstrings(source: str) -> str:
    """The docstrings of a module, its classes and its functions in order of their lines, dedented."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in _statements(ast.parse(source)) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # a module has no line and comes first
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all statements within: no expression, of which there are most, holds a definition."""
    yield node
    for name in ("body", "handlers", "orelse", "finalbody", "cases"):
        for inner in getattr(node, name, ()):
            yield from _statements(inner)


def _rendered(path: str, held: Iterable[str | Chat], folder: Path) -> list[Document]:
    """Records as documents, in their order. Chats are rendered together: a template runs elsewhere."""
    found = list(held)
    chats = [record for record in found if isinstance(record, Chat)]
    texts = Templates.of_folder(folder).render(chats) if chats else []
    partly = sum(not _is_whole(chat, text) for chat, text in zip(chats, texts, strict=True))
    if partly:
        what = "the chat template leaves out some of %d of %d chats: roles, tools or calls that it doesn't know"
        logger.warning(f"warning: %s: {what}", path, partly, len(chats))
    rest = iter(texts)
    return [Document(r) if isinstance(r, str) else Document(next(rest), is_chat=True) for r in found]


def _is_whole(chat: Chat, text: str) -> bool:
    """Whether a rendered chat holds each message's content, and the names of what can be and is called."""
    parts = [message["content"] or "" for message in chat.messages]
    calls = [call for message in chat.messages for call in message.get("tool_calls") or ()]
    for named in (*calls, *(chat.tools or ())):
        match named:
            case {"function": {"name": str(name)}}:
                parts.append(name)
    return all(part.strip() in text for part in parts)


def windows(text: CalibrationText, tokenizer: Tokenizer, count: int, length: int, seed: int) -> np.ndarray:
    """Token ids (int64) [count, length], or fewer windows where the text gives fewer: BOS and length − 1 tokens each.

    The documents are shuffled by `seed` and tokenized one after the other until there are enough. A chat's own BOS is
    left out. Raises InputError when the text is too short for a single window.
    """
    needed = count * (length - 1)
    stream = [np.empty(0, np.int64)]
    for i in np.random.default_rng(seed).permutation(len(text.documents)):
        document = text.documents[i]
        if document.is_chat:
            ids = tokenizer.encode(document.text, parse_special=True)
            ids = ids[1:] if ids[:1].tolist() == [tokenizer.bos_id] else ids
        else:
            ids = tokenizer.encode(f"{document.text}\n\n")  # the next one begins a paragraph
        stream.append(ids)
        needed -= len(ids)
        if needed <= 0:
            break
    joined = np.concatenate(stream)[: count * (length - 1)]
    if len(joined) < length - 1:
        what = f"{len(joined)} tokens don't fill one window of {length}"
        raise InputError(what, where=text.source, fix="give a longer text or make windows shorter")
    return cut(joined, length, tokenizer.bos_id, "default", text.source).ids


def windows_in_order(text: CalibrationText, tokenizer: Tokenizer, count: int, length: int) -> np.ndarray:
    """The first windows that llama-imatrix makes of a text file, token ids (int64) [count, length] or fewer.

    Raises InputError when the text is too short for a single window.
    """
    joined = "".join(document.text for document in text.documents)
    ids = tokenizer.encode(joined.removesuffix("\n"))  # as common/arg.cpp reads a file
    return cut(ids, length, tokenizer.bos_id, "llama.cpp", text.source).ids[:count]


def fingerprint(text: str) -> list[int]:
    """What is kept of a text to compare it with others later: the smallest SKETCH of its lines' hashes, sorted.

    Lines of at least LINE characters count, whitespace normalised, each once, by a 64-bit hash; of the hashes those
    that ONE_IN divides. It finds lines that were copied, not text that was reworded or wrapped anew.
    """
    lines = {" ".join(line.split()) for line in text.splitlines()}
    digests = (hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines if len(line) >= LINE)
    hashes = (int.from_bytes(digest, "big") for digest in digests)
    return sorted(value for value in hashes if value % ONE_IN == 0)[:SKETCH]


def overlap(a: Collection[int], b: Collection[int]) -> float:
    """The share of the lines of fingerprint `a` that occur in `b`: 0 to 1, and 0 where there are none to compare.

    A full fingerprint knows all of its text's hashes up to its largest and none beyond. So only hashes up to the
    smaller of two full fingerprints' largest are compared: up to there both are complete, and as hashes are uniform,
    the lines below are a random sample of a's lines. The longer text decides how many there are.
    """
    reach = min((max(full) for full in (a, b) if len(full) >= SKETCH), default=2**64)
    sample = {value for value in a if value <= reach}
    return len(sample & set(b)) / len(sample) if sample else 0.0
