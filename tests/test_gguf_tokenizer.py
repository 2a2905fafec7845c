"""GGUF tokenizers: what is written, that pre-tokenizers are recognised, and ids as llama.cpp's and the original's.

tests/golden/gguf_tokens.json holds what llama-tokenize (llama.cpp 0c1e57098) gives for the texts of gguf_models.py,
whose main() makes it anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from gguf import GGUFValueType, SpecialVocab, TokenType
from gguf_models import GOLDEN_TOKENS, MODELS, Q8_0, TEXTS, edit, v2, vocabulary
from tokenizers import Tokenizer

from dsv2quant.arch.families import model_config
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError
from dsv2quant.planning.gguf_metadata import model_metadata
from dsv2quant.storage.gguf import Value
from dsv2quant.text import gguf_tokenizer as tokenizer
from dsv2quant.text import pre_tokenizers as pretokenizer
from dsv2quant.text.gguf_tokenizer import gguf_tokenizer, tokenizer_metadata

KNOWN = json.loads(GOLDEN_TOKENS.read_text())
CONFIG = model_config(tiny.V2 | {"vocab_size": 4100}, "config.json")
# llama.cpp splits wide spaces otherwise.
SAME_AS_THE_ORIGINAL = [text for text in TEXTS if "　" not in text]
# Of dsv2-mini's vocabulary, as convert_hf_to_gguf.py reports it to be unknown.
MINI_HASH = "24028f8c6fbf1295cd74180128c4f12881aca68c576b7eca9c73efde099f4d0b"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return v2(tmp_path)


@pytest.mark.parametrize("case", KNOWN)
def test_ids_are_llama_cpps(tmp_path: Path, case: str) -> None:
    model = MODELS.get(case)
    metadata = model_metadata(open_checkpoint(model(tmp_path)), Q8_0) if model else vocabulary(case)
    backend = gguf_tokenizer(metadata, "model.gguf")
    assert [backend.encode(text).ids for text in TEXTS] == KNOWN[case]


def test_pre_tokenizers_differ_on_the_texts() -> None:
    """So a mix-up of them would show."""
    same = [pre for pre in pretokenizer.NAMES if KNOWN[pre] == KNOWN["deepseek-v3"]]
    assert same == ["deepseek-v3", "joyai-llm"]
    assert len({json.dumps(KNOWN[pre]) for pre in pretokenizer.NAMES}) == 6


def test_ids_are_the_originals(tmp_path: Path) -> None:
    original = Tokenizer.from_file(str(tiny.MINI / "tokenizer.json"))
    original.encode_special_tokens = True
    backend = gguf_tokenizer(model_metadata(open_checkpoint(tiny.MINI), Q8_0), "model.gguf")
    for text in [*SAME_AS_THE_ORIGINAL, Path(__file__).read_text(encoding="utf-8")]:
        assert backend.encode(text).ids == original.encode(text).ids
        assert backend.decode(backend.encode(text).ids) == text


def test_control_tokens_are_parsed_on_request_only() -> None:
    backend = gguf_tokenizer(model_metadata(open_checkpoint(tiny.MINI), Q8_0), "model.gguf")
    assert 1 not in backend.encode(EOS).ids
    backend.encode_special_tokens = False
    assert backend.encode(EOS).ids == [0, 1]


def test_added_tokens_keep_their_kinds(folder: Path) -> None:
    metadata = tokenizer_metadata(folder, CONFIG)
    tokens, types = metadata["tokenizer.ggml.tokens"].value, metadata["tokenizer.ggml.token_type"].value
    user, control, unused = TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.UNUSED
    assert list(zip(tokens, types, strict=True))[4096:] == [
        ("øø", user), ("a b", user), ("<｜tool▁call｜>", control), ("[PAD4099]", unused),
    ]  # fmt: skip
    assert tokens[0] == BOS
    assert types[0] == control


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("processor", [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}, None])
def test_bos_is_what_tokenizer_config_says(folder: Path, processor: dict[str, Any] | None, wanted: bool) -> None:
    """A bare ByteLevel, as DeepSeek has it, made some converters turn BOS off."""
    edit(folder / "tokenizer.json", lambda raw: raw.update(post_processor=processor))
    edit(folder / "tokenizer_config.json", lambda raw: raw.update(add_bos_token=wanted))
    metadata = tokenizer_metadata(folder, CONFIG)
    assert metadata["tokenizer.ggml.add_bos_token"].value is wanted
    assert (gguf_tokenizer(metadata, "model.gguf").encode("x").ids[0] == 0) is wanted


def test_bos_is_so_whatever_gguf_py_makes_of_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later versions of gguf-py let the post-processor decide."""

    class Later(SpecialVocab):
        def _load(self, path: Path) -> None:
            super()._load(path)
            self.add_special_token |= {"bos": False, "eos": True}

    monkeypatch.setattr(tokenizer, "SpecialVocab", Later)
    metadata = tokenizer_metadata(folder, CONFIG)
    assert metadata["tokenizer.ggml.add_bos_token"].value is True
    assert metadata["tokenizer.ggml.add_eos_token"].value is False


def test_names_of_chat_templates_are_in_order(folder: Path) -> None:
    """gguf-py gives them in the order of a set, which is not the same twice."""
    names = ["f", "b", "default", "e", "a", "d", "c"]
    templates = [{"name": name, "template": f"{{{{ '{name}' }}}}"} for name in names]
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", lambda raw: raw.update(chat_template=templates))
    metadata = tokenizer_metadata(folder, CONFIG)
    assert metadata["tokenizer.chat_templates"].value == ["a", "b", "c", "d", "e", "f"]
    assert metadata["tokenizer.chat_template"].value == "{{ 'default' }}"


def test_eos_is_appended_where_the_file_says_so(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda raw: raw.update(add_eos_token=True))
    backend = gguf_tokenizer(tokenizer_metadata(folder, CONFIG), "model.gguf")
    assert backend.encode("x").tokens == [BOS, "x", EOS]
    assert backend.encode("x", add_special_tokens=False).tokens == ["x"]


@pytest.mark.parametrize("with_bos", [True, False])
def test_published_tokenizers_are_told_by_their_hash(monkeypatch: pytest.MonkeyPatch, with_bos: bool) -> None:
    """With the ids of this vocabulary in place of a published one's."""
    raw = json.loads((tiny.MINI / "tokenizer.json").read_text(encoding="utf-8"))
    backend = Tokenizer.from_file(str(tiny.MINI / "tokenizer.json"))
    ids = backend.encode(pretokenizer._CHECK_TEXT, add_special_tokens=with_bos).ids
    assert (ids[0] == 0) is with_bos
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    assert (digest == MINI_HASH) is with_bos
    monkeypatch.setitem(pretokenizer._HASHES, digest, "deepseek-v3")
    assert pretokenizer.recognise(raw, backend, 0) == "deepseek-v3"


def _step(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
# Spelled out here, from the published tokenizer.json files.
CODER = [_step("[\r\n]"), _step("\\s?\\p{L}+"), _step("\\s?\\p{P}+"), _step("[一-龥ࠀ-一가-퟿]+"), DIGITS, BYTES]
V3 = [
    _step("\\p{N}{1,3}"),
    _step("[一-龥぀-ゟ゠-ヿ]+"),
    _step(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"
        " ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
    BYTES,
]


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (CODER, "deepseek-coder"),
        ([_step("[\\r\\n]"), {"type": "Sequence", "pretokenizers": CODER[1:]}], "deepseek-coder"),
        (V3, "deepseek-v3"),
        (CODER[:-1], None),
        (CODER[1:], None),
        ([*CODER[:4], DIGITS | {"individual_digits": False}, BYTES], None),
        ([*CODER[:5], BYTES | {"add_prefix_space": True}], None),
        ([CODER[0] | {"behavior": "Removed"}, *CODER[1:]], None),
    ],
)
def test_pre_tokenizers_are_recognised_by_their_steps(steps: list[Any], name: str | None) -> None:
    backend = Tokenizer.from_file(str(tiny.MINI / "tokenizer.json"))
    raw = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    assert pretokenizer.recognise(raw, backend, 0) == name


def _tokenizer(change: Any) -> Any:
    return lambda folder: edit(folder / "tokenizer.json", change)


def _settings(**values: Any) -> Any:
    return lambda folder: edit(folder / "tokenizer_config.json", lambda raw: raw.update(values))


def _rename(raw: dict[str, Any]) -> None:
    raw["model"]["vocab"]["[PAD4099]"] = raw["model"]["vocab"].pop("ÿ")


DAMAGED = {
    "tokenizer.json: missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "tokenizer.json: not valid JSON": lambda folder: (folder / "tokenizer.json").write_text("{"),
    "not a tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "not a BPE tokenizer": _tokenizer(
        lambda raw: raw.update(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"})
    ),
    "ids beyond vocab_size, 4100: 5000": _tokenizer(lambda raw: raw["model"]["vocab"].update(ÿ=5000)),
    "none of DeepSeek's": _tokenizer(lambda raw: raw["pre_tokenizer"]["pretokenizers"].pop(0)),
    "has a normalizer": _tokenizer(lambda raw: raw.update(normalizer={"type": "NFC"})),
    "has ignore_merges": _tokenizer(lambda raw: raw["model"].update(ignore_merges=True)),
    "the same token: [PAD4099]": _tokenizer(_rename),
    "add_bos_token without such a token": _settings(bos_token="<none>"),
    "tokenizer_config.json: not valid JSON": lambda folder: (folder / "tokenizer_config.json").write_text("["),
    "tokenizer.chat_template would be 5": _settings(chat_template=[{"name": "default", "template": 5}]),
    "not valid JSON: 'utf-8' codec": lambda folder: (folder / "tokenizer_config.json").write_text(
        '{"chat_template": "\\ud800"}'
    ),
    "not a tokenizer's settings": _settings(chat_template=["x"]),
    "pad's id 9000 is beyond vocab_size": lambda folder: [
        _settings(pad_token=None)(folder),
        edit(folder / "config.json", lambda raw: raw.update(pad_token_id=9000)),
    ],
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_tokenizers_are_one_clear_line(folder: Path, what: str) -> None:
    if "settings" in what or "chat_template" in what:
        (folder / "chat_template.jinja").unlink()  # it would win
    DAMAGED[what](folder)
    with pytest.raises(InputError, match=re.escape(what)):
        tokenizer_metadata(folder, CONFIG)


def _value(value: Any, is_array: bool = False) -> Value:
    return Value(GGUFValueType.STRING, value, is_array)


FOREIGN = {
    "tokenizer is None": {"model": None},
    "tokenizer is 'llama'": {"model": _value("llama")},
    "pre-tokenizer 'qwen2'": {"pre": _value("qwen2")},
    "merges are missing": {"merges": None},
    "token_type or merges are missing": {"token_type": _value([1], True)},
    "are not text": {"merges": _value([5], True)},
    "not a tokenizer": {"merges": _value(["ab"], True)},
    "add_bos_token without bos_token_id": {"bos_token_id": _value(99999)},
}


@pytest.mark.parametrize("what", FOREIGN)
def test_other_models_tokenizers_are_one_clear_line(folder: Path, what: str) -> None:
    metadata = tokenizer_metadata(folder, CONFIG)
    for key, value in FOREIGN[what].items():
        metadata[f"tokenizer.ggml.{key}"] = value
    found = {key: value for key, value in metadata.items() if value is not None}
    with pytest.raises(InputError, match=re.escape(what)):
        gguf_tokenizer(found, "model.gguf")
