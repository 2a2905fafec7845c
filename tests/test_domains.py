"""The texts that benchmarks measure on: enough of each, and nothing that was calibrated on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny

from dsv2quant.text.calibration import LINE, standard_library
from dsv2quant.text.text import python_topics
from dsv2quant.text.tokenizer import Tokenizer

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import domains

BOS, EOS = 0, 1


def long_lines(text: str) -> set[str]:
    """Those that are long enough to be nobody else's, whitespace normalised."""
    return {line for line in (" ".join(line.split()) for line in text.splitlines()) if len(line) >= LINE}


@pytest.fixture(scope="module")
def calibrated_on() -> set[str]:
    return long_lines("\n".join(document.text for document in standard_library().documents))


@pytest.mark.parametrize("name", domains.DOMAINS)
def test_windows(name: str) -> None:
    ids = domains.DOMAINS[name](tiny.MINI)
    assert ids.shape == (domains.EVALUATED, domains.CTX)
    assert (ids[:, 0] == BOS).all()
    assert len({row.tobytes() for row in ids}) == len(ids)
    assert (EOS in ids[:, 1:]) == (name == "chat")  # which the template closes answers with


def test_no_line_of_the_topics_was_calibrated_on(calibrated_on: set[str]) -> None:
    lines = long_lines(python_topics().content)
    assert len(lines) > 3000
    assert not lines & calibrated_on


def test_few_lines_of_code_were_calibrated_on(calibrated_on: set[str]) -> None:
    """Signatures and imports that many have. Of click, which holds a copy of optparse's parser, 1 in 200 are."""
    lines = long_lines("".join(document.text for document in domains.sources().documents))
    assert len(lines) > 20_000
    assert len(lines & calibrated_on) < len(lines) / 1000


def test_chats_say_nothing_that_prose_says() -> None:
    answers = [answer for _, answer in domains.answers()]
    told = [paragraph for answer in answers for paragraph in answer.split("\n\n")]
    assert len(told) == len(set(told)) > 500
    assert not set(told) & set(python_topics().content[: domains.PROSE].split("\n\n"))
    tokenizer = Tokenizer.open(tiny.MINI)
    assert len(tokenizer.encode(python_topics().content[: domains.PROSE])) > domains.EVALUATED * domains.CTX


def test_chats_ask_and_answer() -> None:
    chats = list(domains.dialogues())
    for chat in chats:
        roles = [message["role"] for message in chat.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert chat.messages[0]["content"].startswith("Tell me about ")
    assert all(message["content"].strip() for chat in chats for message in chat.messages)
