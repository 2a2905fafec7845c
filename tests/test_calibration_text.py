"""The text to calibrate on: what is read, refused and rendered, the windows, and overlap with evaluation texts."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tiny

from dsv2quant.calib import text as module
from dsv2quant.calib.text import CalibrationText, Document, fingerprint, load, overlap, windows
from dsv2quant.calib.tokens import Tokenizer
from dsv2quant.errors import InputError
from dsv2quant.evaluate.text import python_topics

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
CHAT = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Größe?\nIn cm."},
    {"role": "assistant", "content": "180"},
]
CHATML = """\
{% for message in messages %}
    {% if loop.index > 9 %}
        {% break %}
    {% endif %}
    {{ '<|im_start|>' + message['role'] + '\n' + (message['content'] | tojson) + '<|im_end|>' + '\n' }}
{% endfor %}
{% if tools is not none %}never{% endif %}
"""


@pytest.fixture(scope="module")
def docstrings():
    """The docstrings of each file of the default text, filled in when it is loaded."""
    return []


@pytest.fixture(scope="module")
def default(docstrings):
    extract = module._docstrings

    def record(source: str) -> str:
        docstrings.append(extract(source))
        return docstrings[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_docstrings", record)
        return load(None, tiny.MINI)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.open(tiny.MINI)


def content(text: CalibrationText) -> str:
    return "\n".join(document.text for document in text.documents)


def write_lines(path: Path, *records: object) -> str:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return str(path)


def with_template(folder: Path, template: object) -> Path:
    """A folder with dsv2-mini's tokenizer and another chat template."""
    folder.mkdir(exist_ok=True)
    shutil.copy(tiny.MINI / "tokenizer.json", folder)
    config = json.loads((tiny.MINI / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = config | {"chat_template": template} if template is not None else config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def rendered(tmp_path: Path, folder: Path, messages: object = CHAT) -> str:
    (document,) = load(write_lines(tmp_path / "chat.jsonl", {"messages": messages}), folder).documents
    assert document.is_chat
    return document.text


# The default text


def test_the_default_text_is_the_same_each_time(default):
    again = load(None, tiny.MINI)
    assert again == default
    assert again.sha256 == default.sha256
    assert default.source.startswith("Python 3.")
    assert not any(document.is_chat for document in default.documents)


def test_the_default_text_holds_sources_and_docstrings(default):
    from json import decoder

    joined = "".join(document.text for document in default.documents)
    assert Path(decoder.__file__).read_text(encoding="utf-8") in joined
    # A method's docstring, dedented: in the source it is indented.
    assert "\n\nDecode a JSON document from ``s`` (a ``str`` beginning with\na JSON document) and return" in joined
    order = [joined.index(words) for words in ("JSON token scanner\n", "Implementation of JSONEncoder\n")]
    assert order[1] < order[0]  # json/encoder.py, json/scanner.py


def test_docstrings_come_in_the_order_of_their_lines():
    source = '"""One."""\nclass A:\n  """Two."""\n  async def f(self):\n    """Three.\n\n      x\n    y"""\n'
    source += "def g():\n  'Four.'\ndef h():\n  return 'no docstring'\n"
    assert module._docstrings(source) == "One.\n\nTwo.\n\nThree.\n\n  x\ny\n\nFour."


def test_the_default_text_has_tokens_enough(default, docstrings, tokenizer):
    """600,000, and 150,000 of docstrings, by every tenth section: 2.1 M and 345,000 when counted in full on 3.11."""

    def tokens(sections: list[str]) -> int:
        return 10 * sum(len(tokenizer.encode(section)) for section in sections[::10])

    joined = "".join(docstrings)
    assert tokens([document.text for document in default.documents]) > 1_500_000
    assert tokens([joined[i : i + 4000] for i in range(0, len(joined), 4000)]) > 250_000


def test_every_module_is_found_and_none_is_the_evaluation_text():
    library = Path(sysconfig.get_paths()["stdlib"])
    absent = [n for n in module.MODULES if not list(library.glob(f"{n.replace('.', '/')}.py"))
              and not list(library.glob(f"{n.replace('.', '/')}/*.py"))]  # fmt: skip
    assert set(absent) <= {"_pydatetime"}
    assert not any(name.startswith("pydoc") for name in module.MODULES)


def test_python_without_sources_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(InputError, match=r"no sources of Python's standard library \(give a text file\)"):
        load(None, tiny.MINI)


# Files


def test_a_plain_text_is_cut_into_sections_that_end_with_a_line(tmp_path):
    path = tmp_path / "text.txt"
    lines = [f"{i} {'naïve ' * 30}\n" for i in range(300)]
    path.write_text("".join(lines) + "the rest", encoding="utf-8")
    text = load(str(path), tiny.MINI)
    assert text.source == "text.txt"
    assert "".join(document.text for document in text.documents) == path.read_text(encoding="utf-8")
    assert all(document.text.endswith("\n") for document in text.documents[:-1])
    assert [len(d.text) // 1000 for d in text.documents[:-1]] == [8] * (len(text.documents) - 1)
    assert len(text.documents) > 5


def test_records_of_text(tmp_path):
    path = tmp_path / "text.JSONL"
    # U+2028 may stand in a JSON string as it is; blank lines and blank texts are nothing to calibrate on.
    path.write_text('{"text": "a\u2028b", "id": 7}\n\n{"text": " \\n"}\r\n{"text": "ü\\nc"}', encoding="utf-8")
    assert load(str(path), tiny.MINI).documents == (Document("a\u2028b"), Document("ü\nc"))


def test_the_hash_tells_documents_apart():
    texts = [("ab",), ("a", "b"), ("b", "a"), ("a", "b", ""), ("aFalseb",), ('a", "b',)]
    hashes = {CalibrationText("x", tuple(map(Document, t))).sha256 for t in texts}
    hashes.add(CalibrationText("x", (Document("ab", is_chat=True),)).sha256)
    assert len(hashes) == 7
    assert CalibrationText("y", (Document("ab"),)).sha256 in hashes  # the source's name is no part of it


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": "a"', "not valid JSON: Expecting ',' delimiter: column 13"),
        ("plain", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"text": "\\ud800"}', "not valid Unicode"),
        ('["a"]', "not an object with either a 'text' string or a list of 'messages'"),
        ('{"text": null}', "not an object with either"),
        ('{"content": "a"}', "not an object with either"),
        ('{"messages": []}', "not an object with either"),
        ('{"messages": "a"}', "not an object with either"),
        ('{"messages": ["a"]}', "not an object with either"),
        ('{"messages": [{"role": "user"}]}', "not an object with either"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "not an object with either"),
        ('{"text": "a", "messages": [{"role": "user", "content": "a"}]}', "not an object with either"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, what):
    path = tmp_path / "records.jsonl"
    path.write_text(f'{{"text": "good"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(InputError) as error:
        load(str(path), tiny.MINI)
    assert str(error.value).startswith(f"{path}, line 3: {what}")


@pytest.mark.parametrize("name", ["text.txt", "records.jsonl"])
def test_files_that_hold_no_utf8_text(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(InputError, match=f"{name}: can't be read"):
        load(str(path), tiny.MINI)
    path.write_bytes("Größe".encode("latin-1"))
    with pytest.raises(InputError, match=f"{name}: can't be read.*give a UTF-8 text file"):
        load(str(path), tiny.MINI)
    for nothing in ("", " \n\n\t\n"):
        path.write_text(nothing)
        with pytest.raises(InputError, match=f"{name}: holds no text"):
            load(str(path), tiny.MINI)
    with pytest.raises(InputError, match="can't be read"):
        load(str(tmp_path), tiny.MINI)


def test_evaluation_datasets_are_refused():
    with pytest.raises(InputError, match="wikitext2: an evaluation text"):
        load("wikitext2", tiny.MINI)


# Chats


def test_deepseek_v2s_own_template(tmp_path):
    assert rendered(tmp_path, tiny.MINI) == (f"{BOS}Be <brief> & kind.\n\nUser: Größe?\nIn cm.\n\nAssistant: 180{EOS}")


def test_chats_are_rendered_and_tokenized_as_transformers_does(tmp_path, tokenizer):
    from transformers import PreTrainedTokenizerFast

    for name, template in (("own", None), ("chatml", CHATML)):
        folder = with_template(tmp_path / name, template)
        peer = PreTrainedTokenizerFast.from_pretrained(folder)
        text = rendered(tmp_path, folder)
        assert text == peer.apply_chat_template(CHAT, tokenize=False)
        ids = peer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
        assert tokenizer.encode(text, parse_special=True).tolist() == ids
    assert '    <|im_start|>system\n"Be <brief> & kind."<|im_end|>\n\n    <|im_start|>user\n"Größe' in text


def test_forms_of_a_template(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}list"}]
    folder = with_template(tmp_path / "m", named)
    assert rendered(tmp_path, folder) == f"{EOS}list"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}file", encoding="utf-8")  # wins over the config's
    assert rendered(tmp_path, folder) == f"{BOS}file"
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}[{{ eos_token }}]")
    assert rendered(tmp_path, folder) == "<s>[]"


@pytest.mark.parametrize(
    "template", [[{"name": "tool_use", "template": "x"}], [{"name": "default"}], ["x"], 7, "absent"]
)
def test_messages_need_a_template(tmp_path, template):
    folder = with_template(tmp_path / "m", template)
    if template == "absent":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer_config.json: no chat template \(give plain text"):
        rendered(tmp_path, folder)
    path = write_lines(tmp_path / "text.jsonl", {"text": "a"})
    assert load(path, folder).documents == (Document("a"),)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError: "),
        ("{{ raise_exception('Roles must alternate!') }}", "TemplateError: Roles must alternate!"),
        ("{{ messages[0]['content'] + none }}", "TypeError: "),
        ("{{ missing.field }}", "UndefinedError: 'missing' is undefined"),
        ("{{ 1 // 0 }}", "ZeroDivisionError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
    ],
)
def test_a_template_that_fails_or_breaks_out(tmp_path, template, what):
    folder = with_template(tmp_path / "m", template)
    with pytest.raises(InputError) as error:
        rendered(tmp_path, folder)
    assert str(error.value).startswith(f"{tmp_path / 'chat.jsonl'}, line 1: the chat template fails: {what}")


@pytest.mark.parametrize("template", ["{% if %}", "{{ 'open", "{{ " + "(" * 10_000 + " }}"])
def test_a_template_that_is_no_template(tmp_path, template):
    folder = with_template(tmp_path / "m", template)
    with pytest.raises(InputError, match=r"tokenizer_config.json: broken chat template: .*download it again"):
        rendered(tmp_path, folder)


# Windows


def numbered(count: int) -> CalibrationText:
    return CalibrationText("numbered", tuple(Document(f"Document {i} of {count}.") for i in range(count)))


def test_windows_are_bos_and_shuffled_documents(tokenizer):
    text = numbered(40)
    ids = windows(text, tokenizer, 7, 16, seed=3)
    assert (ids.shape, ids.dtype) == ((7, 16), np.int64)
    assert (ids[:, 0] == tokenizer.bos_id).all()
    order = np.random.default_rng(3).permutation(40)
    stream = np.concatenate([tokenizer.encode(f"{text.documents[i].text}\n\n") for i in order])
    np.testing.assert_array_equal(ids[:, 1:].ravel(), stream[: 7 * 15])
    np.testing.assert_array_equal(ids, windows(text, tokenizer, 7, 16, seed=3))
    assert (ids != windows(text, tokenizer, 7, 16, seed=4)).any()


def test_only_the_documents_that_are_needed_are_tokenized(tokenizer, monkeypatch):
    encoded = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encoded.append(text) or encode(text))
    windows(numbered(1000), tokenizer, 2, 16, seed=0)
    assert 2 <= len(encoded) <= 5


def test_a_short_text_gives_the_windows_there_are(tokenizer):
    text = numbered(5)
    tokens = sum(len(tokenizer.encode(f"{document.text}\n\n")) for document in text.documents)
    assert windows(text, tokenizer, 100, 11, seed=0).shape == (tokens // 10, 11)
    assert windows(text, tokenizer, 100, tokens + 1, seed=0).shape == (1, tokens + 1)
    with pytest.raises(InputError, match=rf"of {tokens + 2} \(give a longer text or make windows"):
        windows(text, tokenizer, 100, tokens + 2, seed=0)


def test_special_tokens_in_plain_text_stay_text_and_in_chats_are_meant(tokenizer):
    text = f"{BOS}User: hi{EOS}{BOS}"
    bos, eos = tokenizer.bos_id, 1
    special = tokenizer.encode(text, parse_special=True)
    assert special[0] == special[-1] == bos
    assert (special == eos).sum() == 1
    assert not np.isin(tokenizer.encode(text), (bos, eos)).any()  # also after that
    plain = windows(CalibrationText("x", (Document(text),)), tokenizer, 1, 8, seed=0)
    assert not np.isin(plain[:, 1:], (bos, eos)).any()


def test_a_chats_own_bos_is_left_out_once(tokenizer):
    chats = tuple(Document(f"{BOS}{BOS}User: {i}{EOS}", is_chat=True) for i in range(6))
    each = tokenizer.encode(chats[0].text, parse_special=True)
    assert each[:2].tolist() == [tokenizer.bos_id] * 2
    ids = windows(CalibrationText("x", chats), tokenizer, 6, len(each), seed=0)
    assert (ids == tokenizer.bos_id).sum() == 12  # a window's own, and the one that is left of two
    assert (ids[:, :2] == tokenizer.bos_id).all()
    assert (ids[:, -1] == 1).all()
    without = (Document("User: 1", is_chat=True),)  # has none to lose
    count = len(tokenizer.encode("User: 1", parse_special=True))
    assert windows(CalibrationText("x", without), tokenizer, 1, count + 1, seed=0).shape == (1, count + 1)


# Overlap


def lines(first: int, last: int) -> str:
    return "\n".join(f"line {i} is one of many, as long as it must be to count" for i in range(first, last))


def test_the_default_text_shares_nothing_with_the_evaluation_text(default):
    calibrated, topics = fingerprint(content(default)), fingerprint(python_topics().content)
    assert min(len(calibrated), len(topics)) > 300
    assert overlap(topics, calibrated) < 0.01
    assert overlap(calibrated, topics) < 0.01
    assert overlap(calibrated, calibrated) == overlap(topics, topics) == 1
    leaked = fingerprint(content(default) + python_topics().content)
    assert overlap(topics, leaked) > 0.99


def test_overlap_is_the_share_of_the_first_text(tmp_path):
    a, half = fingerprint(lines(0, 4000)), fingerprint(lines(2000, 20_000))
    assert overlap(a, half) == pytest.approx(0.5, abs=0.05)
    assert overlap(half, a) == pytest.approx(2 / 18, abs=0.03)
    assert json.loads(json.dumps(a)) == a == sorted(set(a))


def test_full_fingerprints_are_compared_where_both_are_complete():
    a, b, small = lines(0, 60_000), lines(30_000, 200_000), lines(28_000, 32_000)
    full, fuller, part = map(fingerprint, (a, b, small))
    assert len(full) == len(fuller) == module.SKETCH
    assert overlap(full, full) == 1
    assert overlap(full, fuller) == pytest.approx(0.5, abs=0.05)
    assert overlap(fuller, full) == pytest.approx(3 / 17, abs=0.03)
    assert overlap(part, fuller) == pytest.approx(0.5, abs=0.1)  # a small text in a large one
    assert overlap(full, part) == pytest.approx(1 / 15, abs=0.02)


def test_lines_count_whatever_their_whitespace_and_short_ones_do_not():
    text = lines(0, 400)
    indented = text.replace("\n", "  \n\t  ").replace(" one of", "  one\tof") + "\nshort\n" * 10
    assert fingerprint(indented) == fingerprint(text) != []
    assert all(value % 8 == 0 and value < 2**64 for value in fingerprint(text))
    short = "\n".join(f"{i:>08} {'x' * 30}" for i in range(1000))
    assert fingerprint(short) == []  # 39 characters
    assert len(fingerprint(short.replace("x ", "xx").replace("x\n", "xx\n"))) > 50
    assert overlap([], fingerprint(text)) == overlap(fingerprint(text), []) == 0
