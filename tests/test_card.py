"""What a source's own card says of its licence is carried along, whatever else stands in it."""

from __future__ import annotations

import pytest

from dsv2quant.report.card import _licence

MIT = {"license": "mit", "language": ["en", "no"]}
BODY = "---\nlicense: mit\nlanguage:\n- en\n- no\n{}---\n# Model\n"
CARDS = {
    "plain": (BODY.format("").encode(), MIT),
    "byte order mark": (b"\xef\xbb\xbf" + BODY.format("").encode(), MIT),
    "CRLF": (BODY.format("").replace("\n", "\r\n").encode(), MIT),
    "a date that is none": (BODY.format("date: 2024-02-30\n").encode(), MIT),
    "not UTF-8": (BODY.format("author: ").encode()[:-12] + b"\xff\n---\n", MIT),
    "explicit types": (b"---\nlicense: !!bool x\n---\n", {"license": "x"}),
    "a number of 5,000 digits": (b"---\nlicense: mit\nn: !!int " + b"9" * 5000 + b"\n---\n", {"license": "mit"}),
    "no mapping": (b"---\n- license: mit\n---\n", {}),
    "a licence that is no text": (b"---\nlicense: {a: b}\n---\n", {}),
    "nested": (b"---\nlicense: mit\nx: " + b"[" * 20_000 + b"\n---\n", {}),
    "aliases": (b"---\nlicense: mit\na: &a [x, x]\nb: &b [*a, *a]\nlanguage: [*b, *b]\n---\n", {"license": "mit"}),
    "no front matter": (b"# Model\n---\nlicense: mit\n---\n", {}),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_licence_of_a_card(name, tmp_path):
    content, expected = CARDS[name]
    (tmp_path / "README.md").write_bytes(content)
    assert _licence(tmp_path) == expected
