"""The text to calibrate on: what is read, refused and rendered, the windows, and overlap with evaluation texts."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tiny

from dsv2quant.errors import InputError
from dsv2quant.text import calibration as module
from dsv2quant.text.calibration import CalibrationText, Document, fingerprint, load, overlap, windows, windows_in_order
from dsv2quant.text.text import python_topics
from dsv2quant.text.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


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


@pytest.mark.parametrize(
    "content", [b"\0" * 9000, b"a\0b\0" * 3000, "text".encode("utf-16"), "text".encode("utf-16-le")]
)
def test_what_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"a.txt: (holds NUL|can't be read).*\(give a UTF-8 text file: iconv"):
        load(str(tmp_path / "a.txt"), tiny.MINI)


@pytest.mark.parametrize("content", ["=" * 9000, "a" * 9000, "\n \n" * 999 + "."])
def test_one_character_over_and_over_is_refused(tokenizer, content):
    text = CalibrationText("a.txt", (Document(content),))
    for cut in (windows_in_order, lambda *args: windows(*args, seed=0)):
        with pytest.raises(InputError, match=r"a.txt: only \d different tokens among \d+ \(give a text"):
            cut(text, tokenizer, 4, 32)


def test_evaluation_datasets_are_refused():
    with pytest.raises(InputError, match="wikitext2: an evaluation text"):
        load("wikitext2", tiny.MINI)


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
