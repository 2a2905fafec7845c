"""A folder's tokenizer: tokenizer.json as the tokenizers library runs it, with nothing of the file that transformers
ignores too; token streams cut into equal windows; and tokens as text again.

The file is a downloaded one: what makes the library abort is taken out before, what makes it panic becomes an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from dsv2quant.arch.multimodal import language_config
from dsv2quant.errors import InputError
from dsv2quant.storage.safetensors import AGAIN, read_json

logger = logging.getLogger(__name__)
FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
_LOOK = (("<|", "|>"), ("<｜", "｜>"))  # of DeepSeek's control tokens
# Of no use here: transformers sets its own padding and truncation for each call and so ignores the file's, and no
# special token is ever added to a text by the library.
_UNUSED = ("padding", "truncation", "post_processor")
Protocol = Literal["default", "llama.cpp"]
FEWEST = 4  # different tokens of a text


def is_control(token: str, special: bool) -> bool:
    """Whether an added token means something to the model and not to a reader, by llama.cpp's rule
    (conversion/base.py, does_token_look_special): Coder-V2 and V3 don't flag theirs as special."""
    return special or token == "<pad>" or any(token.startswith(a) and token.endswith(b) for a, b in _LOOK)


def read_tokenizer(path: Path) -> tuple[dict[str, Any], tokenizers.Tokenizer]:
    """(tokenizer.json as it is, the tokenizer without padding, truncation and post-processor). Control tokens are the
    special ones. Raises InputError for what is missing, damaged or not understood."""
    raw = read_json(path)
    model, added = raw.get("model"), raw.get("added_tokens")
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        if isinstance(model, dict) and model.get("type") == "BPE" and model.get(option):
            raise InputError(f"its BPE model has {option}", where=path, fix="use the tokenizer of this model")
    used = {key: value for key, value in raw.items() if key not in _UNUSED}
    if isinstance(added, list):
        used["added_tokens"] = [_flagged(token) for token in added]
    with no_panic(path):
        return raw, tokenizers.Tokenizer.from_str(json.dumps(used))


def _flagged(token: Any) -> Any:
    match token:
        case {"content": str(content), "special": bool(special)}:
            return token | {"special": is_control(content, special)}
    return token


@contextmanager
def no_panic(where: object) -> Iterator[None]:
    """What the library raises as InputError; a panic of its Rust code is no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise InputError(f"not a tokenizer: {error}", where=where, fix=AGAIN) from None


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, which a folder may lack."""
    path = folder / SETTINGS
    return read_json(path) if path.exists() else {}


def token_of(settings: Mapping[str, Any], name: str) -> str | None:
    """What tokenizer_config.json names as `name` ('bos_token'), as text or as an object with its content."""
    token = settings.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def adds_bos(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> bool | None:
    """Whether a text begins with BOS: as tokenizer_config.json says (transformers 4 and llama.cpp obey it), else as
    the post-processor of tokenizer.json does (what transformers 5 obeys, and all that it writes). None: neither says.
    """
    said = settings.get("add_bos_token")
    if isinstance(said, bool):
        return said
    first = leading_token(raw)
    return None if first is None else first == (token_of(settings, "bos_token") or first)


def leading_token(raw: Mapping[str, Any]) -> str | None:
    """What tokenizer.json's post-processor puts before a text: BOS, also where tokenizer_config.json names none, as
    GLM's does."""
    pending = [raw.get("post_processor")]
    while pending:
        match pending.pop(0):
            case {"type": "Sequence", "processors": [*steps]}:
                pending = [*steps, *pending]
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(first)}}, *_]}:
                return first
    return None


def bos_note(folder: Path) -> list[str]:
    """A line for the user where nothing in a folder says whether a text begins with BOS."""
    path = folder / FILE
    if not path.exists() or adds_bos(read_json(path), read_settings(folder)) is not None:
        return []
    return [
        f"{folder / SETTINGS} has no add_bos_token and {FILE} adds no BOS (transformers 5 drops the key when it saves "
        "a tokenizer): texts then begin without BOS, with which DeepSeek-V2 was trained. Set add_bos_token to true."
    ]


class Tokenizer:
    """A checkpoint's own tokenizer: tokenizer.json with the BOS that tokenizer_config.json or config.json names, or
    what the metadata of a GGUF file holds. `add_bos` says whether llama.cpp puts BOS before a text.

    A folder and its GGUF file give a text the same tokens: control tokens that are spelled out in it are text, other
    added tokens are themselves. Two are equal that give every text the same tokens.
    """

    def __init__(self, backend: Any, bos_id: int, where: Path | str, add_bos: bool = True) -> None:
        self._backend, self.bos_id, self._where, self.add_bos = backend, bos_id, where, add_bos
        self.vocab_size: int = self._backend.get_vocab_size()

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """A folder's. Raises InputError for a missing or damaged file, and where no BOS is named."""
        path, settings = folder / FILE, read_settings(folder)
        raw, backend = read_tokenizer(path)
        return cls(backend, _find_bos(backend, raw, settings, folder), path, bool(adds_bos(raw, settings)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode(self, text: str, *, parse_special: bool = False) -> np.ndarray:
        """Token ids (int64) without any that the tokenizer adds. With `parse_special` control tokens that are spelled
        out become themselves: in a rendered chat, or a prompt that asks for it. Raises InputError where the tokenizer
        breaks down over the text."""
        self._backend.encode_special_tokens = not parse_special
        with no_panic(self._where):
            return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        with no_panic(self._where):
            text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def id_of(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def check_ids(self, ids: np.ndarray, vocabulary: int) -> None:
        """Raise InputError where token ids, or BOS, lie beyond the model's vocabulary."""
        if not 0 <= self.bos_id < vocabulary or (ids >= vocabulary).any():
            what = f"knows ids beyond the model's vocabulary of {vocabulary}"
            raise InputError(what, where=self._where, fix="use the tokenizer of this model")


class Detokenizer:
    """Text from tokens that come one by one: the pieces together are `Tokenizer.decode` of all tokens.

    A character whose bytes are spread over several tokens comes with the last of them. Tokens are decoded behind those
    of the last piece (as vLLM's detokenizer_utils.py does), because decoders may treat the first of a text apart.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []  # the tokens of the last piece
        self._held: list[int] = []  # what no piece has yet

    def add(self, token: int) -> str:
        """The text that this token completes, perhaps none."""
        self._held.append(token)
        text = self._pending()
        if not text or text.endswith("\ufffd"):  # the bytes so far end within a character, or are no UTF-8
            return ""
        self._shown, self._held = self._held, []
        return text

    def end(self) -> str:
        """What is still held back: bytes that never became a character."""
        return self._pending()

    def _pending(self) -> str:
        shown = self._tokenizer.decode(self._shown)
        return self._tokenizer.decode(self._shown + self._held)[len(shown) :]


def _find_bos(backend: Any, raw: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> int:
    bos = token_of(settings, "bos_token") or leading_token(raw)
    found = None if bos is None else backend.token_to_id(bos)
    if found is None:
        found = _configured(folder, "bos_token_id")
    if not isinstance(found, int):
        raise InputError("no BOS token is named", where=folder / SETTINGS, fix="set bos_token, as the base model does")
    return found


def _configured(folder: Path, key: str) -> Any:
    """What config.json says of the language model, or else of the multimodal one around it."""
    path = folder / "config.json"
    raw = read_json(path)
    return language_config(raw, path).get(key, raw.get(key))


def stop_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: `eos_token_id` of generation_config.json, which may list several, else the token that
    tokenizer_config.json names, else config.json's. None may be named."""
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.exists() else None
    if found is None:
        path = folder / SETTINGS
        token = token_of(read_settings(folder), "eos_token")
        found = None if token is None else tokenizer.id_of(token)
    if found is None:
        path = folder / "config.json"
        found = _configured(folder, "eos_token_id")
    return checked_stop_ids(found, path)


def checked_stop_ids(found: Any, where: object) -> frozenset[int]:
    """One id, a list of them or None, as a set. Raises InputError for what is no id."""
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(number) is int for number in ids):
        raise InputError(f"eos_token_id is {found!r:.60}", where=where, fix="it must be a token's id, or a list of ids")
    return frozenset(ids)


def check_tokenizer(folder: Path, vocabulary: int) -> None:
    """Check the tokenizer that an artifact gets, and warn where there is none: weights alone are worth converting, too.

    Raises InputError for a damaged one, and where it has ids beyond the vocabulary of the model.
    """
    path = folder / FILE
    if not path.exists() and not path.is_symlink():
        logger.warning("warning: %s has no %s, nor will the artifact: copy it from the base model", folder, FILE)
        return
    _, backend = read_tokenizer(path)
    beyond = sum(number >= vocabulary for number in backend.get_vocab(with_added_tokens=True).values())
    if beyond:
        what = f"has {beyond} ids beyond vocab_size, {vocabulary}"
        raise InputError(what, where=path, fix="use the tokenizer of this model")


@dataclass(frozen=True)
class Windows:
    """Token ids [windows, ctx]; position i predicts i + 1 for i from `first` to ctx − 2, and only those are scored."""

    ids: np.ndarray
    first: int

    @property
    def scored(self) -> int:
        """Scored tokens of each window."""
        return int(self.ids.shape[1]) - 1 - self.first


def cut(ids: np.ndarray, ctx: int, bos: int, protocol: Protocol, where: object, *, add_bos: bool = True) -> Windows:
    """Cut a token stream into windows of `ctx`; the tokens left over at the end are dropped.

    default: each window is BOS and the next ctx − 1 tokens, all of which are scored. llama.cpp: BOS before the whole
    stream, windows of ctx whose first token BOS replaces, the second half scored (tools/perplexity/perplexity.cpp);
    without `add_bos` it adds and replaces nothing.
    Raises InputError when the text is too short for a single window, or is one character over and over.
    """
    if len(ids) >= 64 and (different := len(np.unique(ids))) < FEWEST:
        what = f"only {different} different tokens among {len(ids)}"
        raise InputError(what, where=where, fix="give a text, as people write it")
    if protocol == "llama.cpp":
        stream, first = np.concatenate([[bos] * add_bos, ids]).astype(np.int64), ctx // 2
        count = len(stream) // ctx
        cut_ids = stream[: count * ctx].reshape(count, ctx).copy()
        if add_bos:
            cut_ids[:, :1] = bos
    else:
        first, count = 0, len(ids) // (ctx - 1)
        rows = ids[: count * (ctx - 1)].reshape(count, ctx - 1)
        cut_ids = np.concatenate([np.full((count, 1), bos), rows], 1)
    if not count:
        fix = "give a longer text or a smaller --ctx"
        raise InputError(f"{len(ids)} tokens don't fill one window of {ctx}", where=where, fix=fix)
    return Windows(cut_ids, first)
