"""DeepSeek's three pre-tokenizers: which one a tokenizer.json has, and the one that llama.cpp runs under its name.

Names and patterns: llama.cpp src/llama-vocab.cpp (llm_tokenizer_bpe) and conversion/base.py (get_vocab_base_pre).

tokenizer.json as a GGUF file's tokenizer keys, and a GGUF file's tokenizer as llama.cpp runs it.

Sources: llama.cpp conversion/base.py (get_vocab_base, _set_vocab_gpt2), gguf-py's SpecialVocab, which is used as it
is, and src/llama-vocab.cpp.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from dsv2quant.arch.config import ModelConfig
from dsv2quant.errors import InputError, listing
from dsv2quant.storage.files import carried_files
from dsv2quant.storage.gguf import Metadata, Value, array, string, written
from dsv2quant.text import tokenizer as own
from dsv2quant.text.chat import template_source
from dsv2quant.text.tokenizer import FILE, SETTINGS, adds_bos, is_control, no_panic, read_settings, read_tokenizer

_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CJK = "\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff"
_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What a tokenizer.json splits at, step by step; its last step turns bytes into characters.
_PATTERNS = {
    "deepseek-llm": (
        "[\r\n]", rf"\s?[{_LETTERS}]+", rf"\s?[{_PUNCTUATION}]+", r"\s+$", f"[{_CJK}]+", r"\p{N}",
    ),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"[{_CJK}]+", r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _WORDS),
}  # fmt: skip
# llama.cpp's own: numbers stay whole for deepseek-llm, and in a class of ranges (not of categories) it never finds a
# space, because it turns all spaces beyond ASCII into one (src/unicode.cpp, unicode_regex_split).
_LLAMA_CPP = {
    "deepseek-llm": (
        "[\r\n]", rf"\s?[{_LETTERS}]+", rf"\s?[{_PUNCTUATION}&&\S]+", r"\s+$", rf"[{_CJK}&&\S]+", r"\p{N}+",
    ),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", rf"[{_CJK}&&\S]+", r"\p{N}"),
    "deepseek-v3": _PATTERNS["deepseek-v3"],
}  # fmt: skip
# llama.cpp knows published tokenizers by the ids of one text, as sha256(str(ids)).
_HASHES = {
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
}
_CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f (multiple "
    "emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "\u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785\U0001f601 ?\u6211\u60f3"
    "\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= \u043d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a"
    "\u043b\u0433\u0430\u0440\u0441\u043a\u0438 ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, '"
    "RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
NAMES = tuple(_PATTERNS)
_BYTES = "bytes"


def recognise(raw: Mapping[str, Any], backend: Tokenizer, bos: int | None) -> str | None:
    """The name of a tokenizer.json's pre-tokenizer, by llama.cpp's hash or by its steps; None if it is not DeepSeek's.

    The hash includes BOS for some versions of transformers and not for others: both count. A vocabulary that was
    trained anew has another hash but the same steps.
    """
    ids = backend.encode(_CHECK_TEXT, add_special_tokens=False).ids
    for candidate in (ids, [bos, *ids]):
        name = _HASHES.get(sha256(str(candidate).encode()).hexdigest())
        if name is not None:
            return name
    steps = tuple(_steps(raw.get("pre_tokenizer") or {}))
    known = {(*map(_spelled, patterns), _BYTES): name for name, patterns in _PATTERNS.items()}
    return known.get(steps)


def llama_cpp_splits(name: str) -> pre_tokenizers.PreTokenizer:
    """What llama.cpp does to a text before it merges bytes."""
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _LLAMA_CPP[name]]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _spelled(pattern: str) -> str:
    """A regex with its line breaks as themselves; a pair of backslashes does not escape what follows."""
    return re.sub(r"\\(.)", lambda found: {"r": "\r", "n": "\n"}.get(found[1], found[0]), pattern)


def _steps(step: Mapping[str, Any]) -> Iterator[str]:
    """Each step as its pattern, nested sequences flattened; what DeepSeek's tokenizers don't use as its JSON."""
    match step:
        case {"type": "Sequence", "pretokenizers": [*members]}:
            for member in members:
                yield from _steps(member)
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            yield _spelled(pattern)
        case {"type": "Digits", "individual_digits": True}:
            yield r"\p{N}"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            yield _BYTES
        case _:
            yield repr(step)


_OURS = "use the tokenizer of this model"


def tokenizer_metadata(folder: Path, config: ModelConfig) -> dict[str, Value]:
    """tokenizer.*, in the order of the file.

    Whether a text begins with BOS is what `adds_bos` says: some versions of the converter turn it off for a
    tokenizer.json without a template, which DeepSeek's are.
    Raises InputError where tokenizer.json is missing, not a byte-level BPE with a pre-tokenizer of DeepSeek's, or has
    ids beyond the vocabulary.
    """
    carried_files(folder)  # gguf-py opens them unchecked
    path = folder / FILE
    raw, backend = _load(path)
    settings_path, settings = folder / SETTINGS, read_settings(folder)
    special, found = _special(folder, raw, settings, settings_path)
    for name, number in special.special_token_ids.items():
        if number >= config.vocab_size:
            what = f"{name}'s id {number} is beyond vocab_size, {config.vocab_size}"
            raise InputError(what, where=path, fix=_OURS)
    for name in ("bos", "eos"):
        if special.add_special_token.get(name) and name not in special.special_token_ids:
            fix = f"name a token of tokenizer.json as {name}_token"
            raise InputError(f"add_{name}_token without such a token", where=settings_path, fix=fix)
    pre = recognise(raw, backend, special.special_token_ids.get("bos"))
    if pre is None:
        what = "its pre-tokenizer is none of DeepSeek's"
        raise InputError(what, where=path, fix=f"llama.cpp would split text otherwise: it knows {', '.join(NAMES)}")
    tokens, types = _vocabulary(backend, config.vocab_size, path)
    return {
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string(pre),
        "tokenizer.ggml.tokens": array(tokens),
        "tokenizer.ggml.token_type": array(types),
        **found,
    }


def _load(path: Path) -> tuple[dict[str, Any], Tokenizer]:
    raw, backend = read_tokenizer(path)
    model = raw["model"]
    if not isinstance(backend.model, models.BPE) or not model.get("merges"):
        raise InputError("not a BPE tokenizer with merges", where=path, fix=_OURS)
    normalizer = raw.get("normalizer")
    if normalizer is not None and normalizer != {"type": "Sequence", "normalizers": []}:
        raise InputError(f"has a normalizer, {normalizer!r:.60}", where=path, fix=f"DeepSeek's have none: {_OURS}")
    for option in ("byte_fallback", "ignore_merges"):
        if model.get(option):
            raise InputError(f"its BPE model has {option}", where=path, fix=f"llama.cpp has it not: {_OURS}")
    return raw, backend


def _special(
    folder: Path, raw: dict[str, Any], settings: dict[str, Any], where: Path
) -> tuple[SpecialVocab, dict[str, Value]]:
    """Merges, ids of special tokens, chat templates, and which tokens are added to a text; and their keys."""
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of DeepSeek's templates for pairs of texts
    writer = GGUFWriter(path=None, arch="deepseek2")
    try:
        special = SpecialVocab(folder, load_merges=True)
        special.chat_template = template_source(folder, settings)
        said = {"bos": adds_bos(raw, settings), "eos": settings.get("add_eos_token")}
        special.add_special_token |= {name: value for name, value in said.items() if isinstance(value, bool)}
        special.add_to_gguf(writer, quiet=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"not a tokenizer's settings: {error}", where=where, fix="download it again") from None
    keys = {key: value for key, value in written(writer, where).items() if key.startswith("tokenizer.")}
    if "tokenizer.chat_templates" in keys:  # a set in gguf-py: its order is not the same twice
        keys["tokenizer.chat_templates"] = array(sorted(keys["tokenizer.chat_templates"].value))
    return special, keys


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

    fix = "its tokenizer is not one of DeepSeek-V2's: convert the checkpoint again"
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
        backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, pairs))
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
