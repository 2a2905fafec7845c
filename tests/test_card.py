"""What a source's own card says of its licence is carried along, whatever else stands in it."""

from __future__ import annotations

import os
import tracemalloc

import pytest
import tiny

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.report.plans import _licence

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
def test_the_licence_of_a_card(name):
    content, expected = CARDS[name]
    assert _licence(content) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda card: os.truncate(os.open(card, os.O_CREAT | os.O_WRONLY), 3 << 30), "larger than 16,777,216 bytes"),
        (lambda card: card.symlink_to("/dev/zero"), "is a link out of its folder"),
        (os.mkfifo, "is a device, a pipe or a socket"),
    ],
)
def test_a_card_that_is_none_is_not_read(make, message, tmp_path):
    checkpoint = open_checkpoint(tiny.write_checkpoint(tmp_path / "model", tiny.LITE | {"num_hidden_layers": 2}))
    make(tmp_path / "model" / "README.md")
    plan = make_plan(checkpoint, recipe.builtin("fp8-channel"))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            convert(plan, tmp_path / "out", command="")
        assert tracemalloc.get_traced_memory()[1] < 1 << 30
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "out").exists()
