"""Token streams: text through a checkpoint's own tokenizer, cut into equal windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsv2quant.errors import InputError
from dsv2quant.headers import read_json

Protocol = Literal["default", "llama.cpp"]


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
    """tokenizer.json, with the BOS that tokenizer_config.json or config.json names."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer as Backend

        path = folder / "tokenizer.json"
        read_json(path)  # one clear line for a missing or damaged file
        try:
            self._backend: Any = Backend.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
            raise InputError(f"not a tokenizer: {error}", where=path, fix="download it again") from None
        # Special tokens spelled out in a text are text: it must not be able to end a window's document.
        self._backend.encode_special_tokens = True
        self._path = path
        self.bos_id = self._find_bos(folder)
        self.vocab_size: int = self._backend.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        """Token ids (int64) without any special token."""
        return np.array(self._backend.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_chat(self, text: str) -> np.ndarray:
        """Token ids (int64) of a rendered chat: special tokens spelled out in it become themselves, none is added."""
        self._backend.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._backend.encode_special_tokens = True

    def check_ids(self, ids: np.ndarray, vocabulary: int) -> None:
        """Raise InputError where token ids, or BOS, lie beyond the model's vocabulary."""
        if not 0 <= self.bos_id < vocabulary or (ids >= vocabulary).any():
            what = f"knows ids beyond the model's vocabulary of {vocabulary}"
            raise InputError(what, where=self._path, fix="use the tokenizer of this model")

    def _find_bos(self, folder: Path) -> int:
        config_path = folder / "tokenizer_config.json"
        bos = read_json(config_path).get("bos_token") if config_path.exists() else None
        if isinstance(bos, dict):
            bos = bos.get("content")
        found = self._backend.token_to_id(bos) if isinstance(bos, str) else None
        if found is None:
            found = read_json(folder / "config.json").get("bos_token_id")
        if not isinstance(found, int):
            raise InputError("no BOS token is named", where=config_path, fix="set bos_token, as the base model does")
        return found


def cut(ids: np.ndarray, ctx: int, bos: int, protocol: Protocol, where: object) -> Windows:
    """Cut a token stream into windows of `ctx`; the tokens left over at the end are dropped.

    default: each window is BOS and the next ctx − 1 tokens, all of which are scored. llama.cpp: BOS before the whole
    stream, windows of ctx whose first token BOS replaces, the second half scored (tools/perplexity/perplexity.cpp).
    Raises InputError when the text is too short for a single window.
    """
    if protocol == "llama.cpp":
        stream, first = np.concatenate([[bos], ids]), ctx // 2
        count = len(stream) // ctx
        cut_ids = stream[: count * ctx].reshape(count, ctx).copy()
        if count:
            cut_ids[:, 0] = bos
    else:
        first, count = 0, len(ids) // (ctx - 1)
        rows = ids[: count * (ctx - 1)].reshape(count, ctx - 1)
        cut_ids = np.concatenate([np.full((count, 1), bos), rows], 1)
    if not count:
        fix = "give a longer text or a smaller --ctx"
        raise InputError(f"{len(ids)} tokens don't fill one window of {ctx}", where=where, fix=fix)
    return Windows(cut_ids, first)
