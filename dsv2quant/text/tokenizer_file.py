"""tokenizer.json as the tokenizers library runs it, with nothing of the file that transformers ignores too.

The file is a downloaded one: what makes the library abort is taken out before, what makes it panic becomes an error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dsv2quant.errors import InputError
from dsv2quant.storage.safetensors import AGAIN, read_json

logger = logging.getLogger(__name__)
FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
_LOOK = (("<|", "|>"), ("<｜", "｜>"))  # of DeepSeek's control tokens
# Of no use here: transformers sets its own padding and truncation for each call and so ignores the file's, and no
# special token is ever added to a text by the library.
_UNUSED = ("padding", "truncation", "post_processor")


def is_control(token: str, special: bool) -> bool:
    """Whether an added token means something to the model and not to a reader, by llama.cpp's rule
    (conversion/base.py, does_token_look_special): Coder-V2 and V3 don't flag theirs as special."""
    return special or token == "<pad>" or any(token.startswith(a) and token.endswith(b) for a, b in _LOOK)


def read_tokenizer(path: Path) -> tuple[dict[str, Any], Tokenizer]:
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
        return raw, Tokenizer.from_str(json.dumps(used))


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
    pending = [raw.get("post_processor")]
    while pending:
        match pending.pop(0):
            case {"type": "Sequence", "processors": [*steps]}:
                pending = [*steps, *pending]
            case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": first}}, *_]}:
                return bool(first == token_of(settings, "bos_token"))
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


def check_tokenizer(folder: Path | None, vocabulary: int) -> None:
    """Check the tokenizer that an artifact gets, unless it wasn't downloaded, and warn where there is none: weights
    alone are worth converting, too.

    Raises InputError for a damaged one, and where it has ids beyond the vocabulary of the model.
    """
    if folder is None:
        return
    path = folder / FILE
    if not path.exists() and not path.is_symlink():
        logger.warning("warning: %s has no %s, nor will the artifact: copy it from the base model", folder, FILE)
        return
    _, backend = read_tokenizer(path)
    beyond = sum(number >= vocabulary for number in backend.get_vocab(with_added_tokens=True).values())
    if beyond:
        what = f"has {beyond} ids beyond vocab_size, {vocabulary}"
        raise InputError(what, where=path, fix="use the tokenizer of this model")
