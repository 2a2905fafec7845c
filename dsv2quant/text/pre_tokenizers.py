"""The pre-tokenizers of the family: which one a tokenizer.json has, and the one that llama.cpp runs under its name.

Names, hashes and patterns: llama.cpp conversion/base.py (get_vocab_base_pre) and src/llama-vocab.cpp
(llm_tokenizer_bpe, and load for `ignore_merges`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

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
_V3 = (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _WORDS)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA_CPP_ENDINGS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GLM = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA_CPP_UPPER, _LLAMA_CPP_LOWER = r"((?=\p{L})[^a-z])", r"((?=\p{L})[^A-Z])"
_CASES = (
    r"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{endings}?|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{endings}?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Rules:
    """`splits` are the patterns that a tokenizer.json splits at, one step each, before bytes become characters; none
    where another name has the same. `llama_cpp` is what llama.cpp runs, where that is something else. `hashes` are the
    published vocabularies', of `_CHECK_TEXT`. `ignores_merges`: a word that is a token is one, whatever the merges."""

    splits: tuple[str, ...]
    hashes: tuple[str, ...]
    llama_cpp: tuple[str, ...] = ()
    ignores_merges: bool = False


# llama.cpp's own: numbers stay whole for deepseek-llm, and in a class of ranges (not of categories) it never finds a
# space, because it turns all spaces beyond ASCII into one (src/unicode.cpp, unicode_regex_split).
_RULES = {
    "deepseek-llm": _Rules(
        ("[\r\n]", rf"\s?[{_LETTERS}]+", rf"\s?[{_PUNCTUATION}]+", r"\s+$", f"[{_CJK}]+", r"\p{N}"),
        ("049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754",),
        ("[\r\n]", rf"\s?[{_LETTERS}]+", rf"\s?[{_PUNCTUATION}&&\S]+", r"\s+$", rf"[{_CJK}&&\S]+", r"\p{N}+"),
    ),
    "deepseek-coder": _Rules(
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", f"[{_CJK}]+", r"\p{N}"),
        ("347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821",),
        ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", rf"[{_CJK}&&\S]+", r"\p{N}"),
    ),
    "deepseek-v3": _Rules(_V3, ("877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5",)),
    "joyai-llm": _Rules((), ("b4b8ca1f9769494fbd956ebc4c249de6131fb277a4a3345a7a92c7dd7a55808d",), _V3),
    "gigachat": _Rules((_GPT2,), ("ad851be1dba641f2e3711822f816db2c265f788b37c63b4e1aeacb9ee92de8eb",)),
    "kanana2": _Rules(
        (_CASES.format(upper=_UPPER, lower=_LOWER, endings=_ENDINGS),),
        ("e4d54df1ebc1f2b91acd986c5b51aa50837d5faf7c7398e73c1f9e9ee5d19869",),
        (_CASES.format(upper=_LLAMA_CPP_UPPER, lower=_LLAMA_CPP_LOWER, endings=_LLAMA_CPP_ENDINGS),),
    ),
    "glm4": _Rules(
        (_ENDINGS + _GLM,),
        (
            "a1336059768a55c99a734006ffb02203cd450fed003e9a71886c88acf24fdbc2",
            "9ca2dd618e8afaf09731a7cf6e2105b373ba6a1821559f258b272fe83e6eb902",
            "cdf5f35325780597efd76153d4d1c16778f766173908894c04afc20108536267",
        ),
        (_LLAMA_CPP_ENDINGS + _GLM,),
        ignores_merges=True,
    ),
}  # fmt: skip
NAMES = tuple(_RULES)
_HASHES = {digest: name for name, rules in _RULES.items() for digest in rules.hashes}
# llama.cpp knows published tokenizers by the ids of this text, as sha256(str(ids)).
_CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f (multiple "
    "emojis concatenated) \u2705 \U0001f999\U0001f999 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "\u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f\u17a2\u17b6\u1785\U0001f601 ?\u6211\u60f3"
    "\u5728apple\u5de5\u4f5c1314151\u5929\uff5e ------======= \u043d\u0435\u0449\u043e \u043d\u0430 \u0411\u044a"
    "\u043b\u0433\u0430\u0440\u0441\u043a\u0438 ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, '"
    "RE you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
_BYTES = "bytes"


def recognise(raw: Mapping[str, Any], backend: Tokenizer, bos: int | None) -> str | None:
    """The name of a tokenizer.json's pre-tokenizer, by llama.cpp's hash or by its steps; None: it is not the family's.

    The hash includes BOS for some versions of transformers and not for others: both count. A vocabulary that was
    trained anew has another hash but the same steps.
    """
    ids = backend.encode(_CHECK_TEXT, add_special_tokens=False).ids
    for candidate in (ids, [bos, *ids]):
        name = _HASHES.get(sha256(str(candidate).encode()).hexdigest())
        if name is not None:
            return name
    steps = tuple(_steps(raw.get("pre_tokenizer") or {}))
    known = {(*map(_spelled, rules.splits), _BYTES): name for name, rules in _RULES.items() if rules.splits}
    return known.get(steps)


def ignores_merges(name: str) -> bool:
    """Whether llama.cpp takes a word that is a token for that token, whatever the merges make of it."""
    return _RULES[name].ignores_merges


def llama_cpp_splits(name: str) -> pre_tokenizers.PreTokenizer:
    """What llama.cpp does to a text before it merges bytes."""
    patterns = _RULES[name].llama_cpp or _RULES[name].splits
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _spelled(pattern: str) -> str:
    """A regex with its line breaks as themselves; a pair of backslashes does not escape what follows."""
    return re.sub(r"\\(.)", lambda found: {"r": "\r", "n": "\n"}.get(found[1], found[0]), pattern)


def _steps(step: Mapping[str, Any]) -> Iterator[str]:
    """Each step as its pattern, nested sequences flattened; what the family doesn't use as its JSON."""
    match step:
        case {"type": "Sequence", "pretokenizers": [*members]}:
            for member in members:
                yield from _steps(member)
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            yield _spelled(pattern)
        case {"type": "Digits", "individual_digits": True}:
            yield r"\p{N}"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(is_split)}:
            if is_split:
                yield _GPT2
            yield _BYTES
        case _:
            yield repr(step)
