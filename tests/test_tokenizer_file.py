"""tokenizer.json of others: what is ignored, refused and noted; a folder and its GGUF file have the same tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from dsv2quant.arch.families import model_config
from dsv2quant.checkpoint.checkpoint import HfCheckpoint
from dsv2quant.checkpoint.gguf import GgufCheckpoint
from dsv2quant.errors import InputError
from dsv2quant.text.chat import Templates
from dsv2quant.text.gguf_tokenizer import tokenizer_metadata
from dsv2quant.text.tokenizer import Tokenizer, adds_bos, bos_note, check_tokenizer

CONFIG = model_config(tiny.WORDY, "config.json")
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(tiny.MINI / name, tmp_path)
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))
    change(raw)
    path.write_text(json.dumps(raw), encoding="utf-8")


def of_gguf(folder: Path) -> Tokenizer:
    """The tokenizer of the GGUF file that the folder would become."""
    empty = GgufCheckpoint("m.gguf", {}, CONFIG, [], [], {}, metadata=tokenizer_metadata(folder, CONFIG))
    return empty.tokenizer()


# Padding and truncation, which transformers ignores


def _fixed(size: int) -> dict[str, Any]:
    return {"padding": {"strategy": {"Fixed": size}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
                        "pad_type_id": 0, "pad_token": EOS}}  # fmt: skip


def _cut(length: int, stride: int) -> dict[str, Any]:
    cut = {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": stride}
    return {"truncation": cut}


@pytest.mark.parametrize("section", [_fixed(512), _fixed(2**44), _cut(4, 0), _cut(4, 9), {"padding": "BatchLongest"}])
def test_padding_and_truncation_are_ignored(folder: Path, section: dict[str, Any]) -> None:
    from transformers import PreTrainedTokenizerFast

    want, metadata = Tokenizer.open(folder).encode(TEXT).tolist(), tokenizer_metadata(folder, CONFIG)
    assert len(want) > 20
    edit(folder / "tokenizer.json", lambda raw: raw.update(section))
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.encode(TEXT).tolist() == want
    assert tokenizer.encode(BOS + "a", parse_special=True).tolist()[0] == 0
    assert tokenizer_metadata(folder, CONFIG) == metadata
    if section in (_fixed(512), _cut(4, 0)):
        peer = PreTrainedTokenizerFast.from_pretrained(folder)
        assert peer(TEXT, add_special_tokens=False).input_ids == want


# What makes the library panic, which is no Exception


PANICS: dict[str, Callable[[dict[str, Any]], object]] = {
    "continuing_subword_prefix": lambda raw: raw["model"].update(continuing_subword_prefix="######"),
    "charsmap": lambda raw: raw.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "chunk size": lambda raw: raw.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "retry-limit-in-match": lambda raw: raw["pre_tokenizer"]["pretokenizers"].insert(
        0, {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    ),
    "out of vocabulary": lambda raw: raw["model"]["merges"].append(["zzzz", "q"]),
    "any variant": lambda raw: raw["model"]["merges"].append("odd"),
    "Oniguruma": lambda raw: raw["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(["}),
}


@pytest.mark.parametrize("what", PANICS)
def test_a_panic_of_the_library_is_one_clear_line(folder: Path, what: str) -> None:
    edit(folder / "tokenizer.json", PANICS[what])
    with pytest.raises(InputError, match=f"tokenizer.json: .*{what}"):
        Tokenizer.open(folder).encode("a" * 40 + "b")


def test_a_decoder_that_panics(folder: Path) -> None:
    strip = {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}
    edit(folder / "tokenizer.json", lambda raw: raw.update(decoder=strip))
    tokenizer = Tokenizer.open(folder)
    with pytest.raises(InputError, match=r"tokenizer.json: not a tokenizer: index out of bounds"):
        tokenizer.decode(tokenizer.encode("hello aaaaaaaaaaaaaaaaaaaaab world z q"))


# One text, the same tokens in a folder and its GGUF file


def _unflagged(raw: dict[str, Any]) -> None:
    """As Coder-V2 and V3 have them: control tokens that aren't flagged as special; and tokens that are for readers."""
    for token in raw["added_tokens"][2:]:
        token["special"] = False
    for number, content in ((4096, "<think>"), (4097, "<answer>")):
        raw["added_tokens"].append(raw["added_tokens"][2] | {"id": number, "content": content})


@pytest.mark.parametrize(
    "text", ["<｜fim▁begin｜>def f():<｜fim▁hole｜><｜fim▁end｜>", "<|EOT|><｜User｜>hi", f"{BOS}<think><answer>x"]
)
def test_a_folder_and_its_gguf_file_give_the_same_tokens(folder: Path, text: str) -> None:
    config = model_config(tiny.WORDY | {"vocab_size": 4098}, "config.json")
    flagged = Tokenizer.open(folder).encode(text, parse_special=True).tolist()
    edit(folder / "tokenizer.json", _unflagged)
    ours = Tokenizer.open(folder)
    metadata = tokenizer_metadata(folder, config)
    theirs = GgufCheckpoint("m.gguf", {}, config, [], [], {}, metadata=metadata).tokenizer()
    for parse_special in (False, True):
        ids = ours.encode(text, parse_special=parse_special).tolist()
        assert ids == theirs.encode(text, parse_special=parse_special).tolist()
        assert ours.decode(ids) == theirs.decode(ids)
        control = [number for number in ids if number < 8]
        assert bool(control) is parse_special
        assert (4096 in ids) is ("<think>" in text)  # a token for readers is always itself, as in llama.cpp
    if "<think>" not in text:
        assert ours.encode(text, parse_special=True).tolist() == flagged


# BOS


def _template(first: str | None) -> dict[str, Any]:
    begin = [{"SpecialToken": {"id": first, "type_id": 0}}] if first else []
    single = [*begin, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {first: {"id": first, "ids": [0], "tokens": [first]}} if first else {}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


@pytest.mark.parametrize(
    ("said", "processor", "want"),
    [
        (True, BYTE_LEVEL, True),
        (False, _template(BOS), False),
        (None, _template(BOS), True),
        (None, {"type": "Sequence", "processors": [BYTE_LEVEL, _template(BOS)]}, True),
        (None, _template(EOS), False),
        (None, _template(None), None),
        (None, BYTE_LEVEL, None),
        (None, None, None),
    ],
)
def test_whether_a_text_begins_with_bos(folder: Path, said: bool | None, processor: object, want: bool | None) -> None:
    """transformers 5 drops add_bos_token when it saves a tokenizer, and has the post-processor add BOS or not."""
    edit(folder / "tokenizer.json", lambda raw: raw.update(post_processor=processor))
    edit(folder / "tokenizer_config.json", lambda raw: raw.update(add_bos_token=said))
    raw, settings = (json.loads((folder / f"{n}.json").read_text()) for n in ("tokenizer", "tokenizer_config"))
    assert adds_bos(raw, settings) is want
    assert Tokenizer.open(folder).add_bos is of_gguf(folder).add_bos is bool(want)
    assert bool(bos_note(folder)) is (want is None)


def test_a_tokenizer_that_transformers_5_saved(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    saved = tmp_path / "saved"
    AutoTokenizer.from_pretrained(folder).save_pretrained(saved)
    shutil.copy(folder / "config.json", saved)
    assert "add_bos_token" not in json.loads((saved / "tokenizer_config.json").read_text())
    assert Tokenizer.open(saved).add_bos
    assert of_gguf(saved).add_bos


# What an artifact would carry along


def test_the_tokenizer_is_checked(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "dsv2quant")
    check_tokenizer(folder, 4096)
    HfCheckpoint("m", {}, CONFIG, [], [], {}).check_tokenizer()
    assert not caplog.messages
    with pytest.raises(InputError, match=r"tokenizer.json: has 96 ids beyond vocab_size, 4000 \(use the tokenizer"):
        check_tokenizer(folder, 4000)
    path = folder / "tokenizer.json"
    path.unlink()
    check_tokenizer(folder, 4096)
    (note,) = caplog.messages
    assert "has no tokenizer.json" in note
    path.symlink_to(folder / "blob")
    with pytest.raises(InputError, match=r"tokenizer.json: is a link to .*, which is not there"):
        check_tokenizer(folder, 4096)
    (folder / "blob").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4610602\n")
    with pytest.raises(InputError, match=r"tokenizer.json: is a git-lfs pointer, not the file"):
        check_tokenizer(folder, 4096)
    with pytest.raises(InputError, match="git-lfs"):
        Tokenizer.open(folder)
    (folder / "blob").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json: not a tokenizer: Model missing"):
        check_tokenizer(folder, 4096)


def _beyond(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda raw: raw["model"]["vocab"].update({"ÿ": 5000}))


def _pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 46\n")


@pytest.mark.parametrize(
    ("change", "what"), [(_pointer, "is a git-lfs pointer"), (_beyond, "has 1 ids beyond vocab_size, 4096")]
)
@pytest.mark.parametrize("options", [("--fp8=channel",), ("--int4", "--method", "rtn")])
def test_nothing_is_converted_with_a_broken_tokenizer(cli, wordy, tmp_path, change, what, options) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(wordy, model)
    change(model)
    for command in (("convert", model, *options, "-o", out), ("plan", model, *options)):
        ran = cli(*command)
        assert ran.code == 3
        assert ran.err.startswith("error: ")
        assert f"tokenizer.json: {what}" in ran.err
        assert ran.err.count("\n") == 1
    assert not out.exists()


def test_weights_without_a_tokenizer_are_converted(cli, lite, tmp_path, caplog) -> None:
    model = tmp_path / "model"
    shutil.copytree(lite, model)
    (model / "tokenizer.json").unlink()
    for command in (("convert", model, "--fp8=channel", "-o", tmp_path / "out"), ("plan", model, "--fp8=channel")):
        ran = cli(*command)
        assert ran.code == 0, ran.err
        assert f"warning: {model} has no tokenizer.json" in caplog.messages.pop()
        caplog.clear()


# Chat templates: the GGUF file gets the one that `generate` takes


def test_a_gguf_file_gets_the_folders_chat_templates(folder: Path) -> None:
    def keys() -> dict[str, object]:
        found = tokenizer_metadata(folder, CONFIG)
        return {key.removeprefix("tokenizer."): found[key].value for key in found if "chat_template" in key}

    edit(folder / "tokenizer_config.json", lambda raw: raw.update(chat_template="settings"))
    assert keys() == {"chat_template": "settings"}
    (folder / "chat_template.json").write_text('{"chat_template": "legacy"}')
    assert keys() == {"chat_template": "settings"}
    (folder / "chat_template.jinja").write_text("file")
    assert keys() == {"chat_template": "file"}
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    named = {"chat_template.tool_use": "tools", "chat_templates": ["tool_use"], "chat_template": "file"}
    assert keys() == named
    empty = GgufCheckpoint("m.gguf", {}, CONFIG, [], [], {}, metadata=tokenizer_metadata(folder, CONFIG))
    ours, theirs = Templates.of_folder(folder), empty.templates()
    assert ours.named == theirs.named == {"default": "file", "tool_use": "tools"}
    assert ours.tokens == theirs.tokens
    (folder / "chat_template.jinja").unlink()
    shutil.rmtree(folder / "additional_chat_templates")
    edit(folder / "tokenizer_config.json", lambda raw: raw.pop("chat_template"))
    assert keys() == {"chat_template": "legacy"}
    edit(folder / "tokenizer_config.json", lambda raw: raw.update(chat_template=7))
    with pytest.raises(InputError, match=r"tokenizer_config.json: not a tokenizer's settings"):
        keys()


def test_tokenizers_are_equal_that_give_the_same_tokens(folder):
    mini, copied = Tokenizer.open(tiny.MINI), Tokenizer.open(folder)
    assert (mini, hash(mini)) == (copied, hash(copied))
    edit(folder / "tokenizer.json", lambda raw: raw["model"]["merges"].pop())
    assert Tokenizer.open(folder) != mini
    assert mini != "a tokenizer"
