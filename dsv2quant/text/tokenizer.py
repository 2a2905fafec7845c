"""Token streams: text through a checkpoint's own tokenizer, cut into equal windows; and tokens as text again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dsv2quant.errors import InputError
from dsv2quant.storage.safetensors import read_json
from dsv2quant.text.tokenizer_file import FILE, SETTINGS, adds_bos, no_panic, read_settings, read_tokenizer, token_of

if TYPE_CHECKING:
    from dsv2quant.checkpoint.checkpoint import Checkpoint

Protocol = Literal["default", "llama.cpp"]
FEWEST = 4  # different tokens of a text


@dataclass(frozen=True)
class Windows:
    """Token ids [windows, ctx]; position i predicts i + 1 for i from `first` to ctx − 2, and only those are scored."""

    ids: np.ndarray
    first: int

    @property
    def scored(self) -> int:
        """Scored tokens of each window."""
        return int(self.ids.shape[1]) - 1 - self.first


class Tokenizer:
    """A checkpoint's own tokenizer: tokenizer.json with the BOS that tokenizer_config.json or config.json names, or
    what the metadata of a GGUF file holds. `add_bos` says whether llama.cpp puts BOS before a text.

    A folder and its GGUF file give a text the same tokens: control tokens that are spelled out in it are text, other
    added tokens are themselves.
    """

    def __init__(self, backend: Any, bos_id: int, where: Path | str, add_bos: bool = True) -> None:
        self._backend, self.bos_id, self._where, self.add_bos = backend, bos_id, where, add_bos
        self.vocab_size: int = self._backend.get_vocab_size()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Tokenizer:
        """A checkpoint's. Raises InputError where it has none, or a damaged one."""
        if checkpoint.metadata is None:
            assert checkpoint.folder is not None
            return cls.open(checkpoint.folder)
        from dsv2quant.text.gguf_tokenizer import gguf_tokenizer

        where = checkpoint.model
        backend = gguf_tokenizer(checkpoint.metadata, where)
        bos, add_bos = (checkpoint.metadata.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "add_bos_token"))
        if bos is None or type(bos.value) is not int:
            raise InputError("no tokenizer.ggml.bos_token_id", where=where, fix="convert the model again")
        return cls(backend, bos.value, where, add_bos is not None and bool(add_bos.value))

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """A folder's. Raises InputError for a missing or damaged file, and where no BOS is named."""
        path, settings = folder / FILE, read_settings(folder)
        raw, backend = read_tokenizer(path)
        return cls(backend, _find_bos(backend, settings, folder), path, bool(adds_bos(raw, settings)))

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


def _find_bos(backend: Any, settings: Mapping[str, Any], folder: Path) -> int:
    bos = token_of(settings, "bos_token")
    found = None if bos is None else backend.token_to_id(bos)
    if found is None:
        found = read_json(folder / "config.json").get("bos_token_id")
    if not isinstance(found, int):
        raise InputError("no BOS token is named", where=folder / SETTINGS, fix="set bos_token, as the base model does")
    return found


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
