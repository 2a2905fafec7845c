"""tokenizer.json as a GGUF file's tokenizer keys, and a GGUF file's tokenizer as llama.cpp runs it.

Sources: llama.cpp conversion/base.py (get_vocab_base, _set_vocab_gpt2), gguf-py's SpecialVocab, which is used as it
is, and src/llama-vocab.cpp.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, processors

from dsv2quant.arch.config import ModelConfig
from dsv2quant.errors import InputError, listing
from dsv2quant.storage.files import carried_files
from dsv2quant.storage.gguf import Metadata, Value, array, string, written
from dsv2quant.text import tokenizer as own
from dsv2quant.text.chat import template_source
from dsv2quant.text.pre_tokenizers import NAMES, ignores_merges, llama_cpp_splits, recognise
from dsv2quant.text.tokenizer import (
    FILE,
    SETTINGS,
    adds_bos,
    is_control,
    leading_token,
    no_panic,
    read_settings,
    read_tokenizer,
    token_of,
)

_TIKTOKEN = "tiktoken.model"  # Moonlight's and Kimi's
_OURS = "use the tokenizer of this model"


def tokenizer_metadata(folder: Path, config: ModelConfig) -> dict[str, Value]:
    """tokenizer.*, in the order of the file.

    Whether a text begins with BOS is what `adds_bos` says: some versions of the converter turn it off for a
    tokenizer.json without a template, which DeepSeek's are.
    Raises InputError where tokenizer.json is missing, not a byte-level BPE with a pre-tokenizer of DeepSeek's, or has
    ids beyond the vocabulary.
    """
    carried_files(folder)  # gguf-py opens them unchecked
    path, settings_path = folder / FILE, folder / SETTINGS
    raw, backend = _load(path)
    special = _special(folder, raw, backend, settings_path)
    pre = _pre_tokenizer(raw, backend, special.special_token_ids.get("bos"), path)
    for kind, token in _NAMED.get(pre, {}).items():
        special._set_special_token(kind, backend.token_to_id(token))
    for name, number in special.special_token_ids.items():
        if number >= config.vocab_size:
            what = f"{name}'s id {number} is beyond vocab_size, {config.vocab_size}"
            raise InputError(what, where=path, fix=_OURS)
    for name in ("bos", "eos"):
        if special.add_special_token.get(name) and name not in special.special_token_ids:
            fix = f"name a token of tokenizer.json as {name}_token"
            raise InputError(f"add_{name}_token without such a token", where=settings_path, fix=fix)
    tokens, types = _vocabulary(backend, config.vocab_size, path)
    return {
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string(pre),
        "tokenizer.ggml.tokens": array(tokens),
        "tokenizer.ggml.token_type": array(types),
        **_keys(special, settings_path),
    }


# Tokens that llama.cpp's converter names itself for GLM, whose files don't (conversion/base.py, _set_vocab_glm).
_NAMED = {"glm4": {"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"}}


def _load(path: Path) -> tuple[dict[str, Any], Tokenizer]:
    if not path.exists() and path.with_name(_TIKTOKEN).exists():
        fix = f"save it as {FILE}, as transformers' TikTokenConverter does"
        raise InputError(f"missing, and {_TIKTOKEN} is there, which takes code of its own", where=path, fix=fix)
    raw, backend = read_tokenizer(path)
    model = raw["model"]
    if not isinstance(backend.model, models.BPE) or not model.get("merges"):
        raise InputError("not a BPE tokenizer with merges", where=path, fix=_OURS)
    normalizer = raw.get("normalizer")
    if normalizer is not None and normalizer != {"type": "Sequence", "normalizers": []}:
        raise InputError(f"has a normalizer, {normalizer!r:.60}", where=path, fix=f"DeepSeek's have none: {_OURS}")
    return raw, backend


def _pre_tokenizer(raw: Mapping[str, Any], backend: Tokenizer, bos: int | None, path: Path) -> str:
    """What llama.cpp calls it. Raises InputError where it has none that does the same."""
    pre = recognise(raw, backend, bos)
    if pre is None:
        what = "its pre-tokenizer is none of DeepSeek's, nor of its relatives'"
        raise InputError(what, where=path, fix=f"llama.cpp would split text otherwise: it knows {', '.join(NAMES)}")
    model = raw["model"]
    for option, is_known in (("byte_fallback", False), ("ignore_merges", ignores_merges(pre))):
        if model.get(option) and not is_known:
            raise InputError(f"its BPE model has {option}", where=path, fix=f"llama.cpp has it not: {_OURS}")
    return pre


def _special(folder: Path, raw: Mapping[str, Any], backend: Tokenizer, where: Path) -> SpecialVocab:
    """Merges, ids of special tokens, chat templates, and which tokens are added to a text."""
    settings = read_settings(folder)
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of DeepSeek's templates for pairs of texts
    with _checked(where):
        special = SpecialVocab(folder, load_merges=True)
    if token_of(settings, "bos_token") is None and (bos := backend.token_to_id(leading_token(raw) or "")) is not None:
        special.special_token_ids = {"bos": bos} | special.special_token_ids | {"bos": bos}
    special.chat_template = template_source(folder, settings)
    said = {"bos": adds_bos(raw, settings), "eos": settings.get("add_eos_token")}
    special.add_special_token |= {name: value for name, value in said.items() if isinstance(value, bool)}
    return special


def _keys(special: SpecialVocab, where: Path) -> dict[str, Value]:
    writer = GGUFWriter(path=None, arch="")
    with _checked(where):
        special.add_to_gguf(writer, quiet=True)
    keys = {key: value for key, value in written(writer, where).items() if key.startswith("tokenizer.")}
    if "tokenizer.chat_templates" in keys:  # a set in gguf-py: its order is not the same twice
        keys["tokenizer.chat_templates"] = array(sorted(keys["tokenizer.chat_templates"].value))
    return keys


@contextmanager
def _checked(where: Path) -> Iterator[None]:
    """What gguf-py, which checks no type, stumbles over as InputError."""
    try:
        yield
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"not a tokenizer's settings: {error}", where=where, fix="download it again") from None


def _vocabulary(backend: Tokenizer, size: int, path: Path) -> tuple[list[str], list[int]]:
    """(token, type) of every id below `size`; ids that no token has are padding."""
    by_id = {number: token for token, number in backend.get_vocab(with_added_tokens=True).items()}
    beyond = sorted(number for number in by_id if number >= size)
    if beyond:
        what = f"has ids beyond vocab_size, {size}: {listing([str(number) for number in beyond])}"
        raise InputError(what, where=path, fix=_OURS)
    added = backend.get_added_tokens_decoder()
    tokens, types = [], []
    for number in range(size):
        token = by_id.get(number, f"[PAD{number}]")
        kind = TokenType.NORMAL if number in by_id else TokenType.UNUSED
        if number in added:
            if not added[number].normalized:  # llama.cpp compares with the text, which is never normalised
                ids = backend.encode(token, add_special_tokens=False).ids
                token = backend.decode(ids, skip_special_tokens=False)
            kind = TokenType.CONTROL if is_control(token, added[number].special) else TokenType.USER_DEFINED
            if kind == TokenType.USER_DEFINED:
                token = token.replace("▁", " ")
        tokens.append(token)
        types.append(int(kind))
    if len(set(tokens)) < size:
        twice = [token for token, count in Counter(tokens).items() if count > 1]
        what = f"two ids have the same token: {listing(twice)}"
        raise InputError(what, where=path, fix="llama.cpp refuses such a vocabulary")
    return tokens, types


def gguf_tokenizer(metadata: Metadata, where: object) -> Tokenizer:
    """A GGUF file's tokenizer, which encodes a text as llama.cpp does: BOS and EOS added where the file says so.

    Control tokens spelled out in a text are text, unless the caller sets `encode_special_tokens` to False.
    Raises InputError where a key is missing or the tokenizer is none of DeepSeek's.
    """

    def value(key: str, default: Any = None) -> Any:
        return metadata[f"tokenizer.ggml.{key}"].value if f"tokenizer.ggml.{key}" in metadata else default

    fix = "its tokenizer is not one of the family's: convert the checkpoint again"
    model, pre = value("model"), value("pre")
    tokens, types, merges = value("tokens"), value("token_type"), value("merges")
    if model != "gpt2" or pre not in NAMES:
        raise InputError(f"tokenizer is {model!r} with pre-tokenizer {pre!r}", where=where, fix=fix)
    if not all(isinstance(part, list) for part in (tokens, types, merges)) or len(tokens) != len(types):
        raise InputError("tokens, token_type or merges are missing", where=where, fix=fix)
    if not all(isinstance(text, str) for text in (*tokens, *merges)):
        raise InputError("tokens or merges are not text", where=where, fix=fix)
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    with no_panic(where):
        backend = Tokenizer(
            models.BPE({token: number for number, token in enumerate(tokens)}, pairs, ignore_merges=ignores_merges(pre))
        )
    backend.pre_tokenizer = llama_cpp_splits(pre)
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((TokenType.CONTROL, True), (TokenType.USER_DEFINED, False)):
        members = [token for token, found in zip(tokens, types, strict=True) if found == kind]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in members])
    around = {}
    for name in ("bos", "eos"):
        if value(f"add_{name}_token", False):
            number = value(f"{name}_token_id")
            if not isinstance(number, int) or not 0 <= number < len(tokens):
                raise InputError(f"add_{name}_token without {name}_token_id", where=where, fix=fix)
            around[name] = (tokens[number], number)
    template = [around[name][0] if name in around else None for name in ("bos", "eos")]
    single = [part for part in (template[0], "$A", template[1]) if part is not None]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(around.values()))
    backend.encode_special_tokens = True
    return backend


def open_tokenizer(metadata: Metadata, where: Path | str) -> own.Tokenizer:
    """What runs it, with BOS apart. Raises InputError as `gguf_tokenizer` does, and where the file names no BOS."""
    backend = gguf_tokenizer(metadata, where)
    bos, add_bos = (metadata.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "add_bos_token"))
    if bos is None or type(bos.value) is not int:
        raise InputError("no tokenizer.ggml.bos_token_id", where=where, fix="convert the model again")
    return own.Tokenizer(backend, bos.value, where, add_bos is not None and bool(add_bos.value))
