"""Token windows of three kinds of text, to measure on. No calibration text and no training text of dsv2-mini has them.

- prose: Python's help topics from the beginning, as eval-ppl scores by default.
- code: sources of packages that dsv2quant needs, in pieces from all over, at the versions that are installed: those of
  constraints.txt give the same text with every Python. click is left out: parts of it were copied from optparse.
- chat: what the help topics say further on, each paragraph once and none of `prose`, asked for and told in turns by
  the checkpoint's own chat template.

The help topics are those of the running Python; they grow a little from version to version.
"""

from __future__ import annotations

import importlib.metadata
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dsv2quant.text.calibration import CalibrationText, Document, windows
from dsv2quant.text.chat import Chat, Templates
from dsv2quant.text.text import python_topics
from dsv2quant.text.tokenizer import Tokenizer, cut

CTX, EVALUATED = 512, 60
PACKAGES = ("gguf", "huggingface_hub", "tqdm")
PIECE = 2_000  # characters of code that come from one place, some 600 tokens
PROSE = 150_000  # characters of the topics that are prose alone: more than the windows take of any tokenizer
ANSWER = 600  # characters of an answer, and the rest of a paragraph
TURNS = 4  # questions of a chat
HEADING = re.compile(r"(.+)\n([*=~^-])\2+")


def prose(model: Path) -> np.ndarray:
    tokenizer = Tokenizer.open(model)
    return cut(tokenizer.encode(python_topics().content), CTX, tokenizer.bos_id, "default", "topics").ids[:EVALUATED]


def code(model: Path) -> np.ndarray:
    return windows(sources(), Tokenizer.open(model), EVALUATED, CTX, seed=0)


def chat(model: Path) -> np.ndarray:
    texts = Templates.of_folder(model).render(list(dialogues()))
    documents = tuple(Document(text, is_chat=True) for text in texts)
    return windows(CalibrationText("topics as chats", documents), Tokenizer.open(model), EVALUATED, CTX, seed=0)


# Token ids (int64) [EVALUATED, CTX] for a checkpoint's folder.
DOMAINS: dict[str, Callable[[Path], np.ndarray]] = {"prose": prose, "code": code, "chat": chat}


def sources() -> CalibrationText:
    """Of PACKAGES, file by file in the order of their paths, cut behind a line."""
    library = Path(sysconfig.get_paths()["purelib"])
    files = [file for package in PACKAGES for file in sorted((library / package).rglob("*.py"))]
    pieces = (piece for file in files for piece in re.findall(rf"(?s).{{{PIECE}}}.*?\n|.+", file.read_text("utf-8")))
    named = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    return CalibrationText(named, tuple(map(Document, pieces)))


def dialogues() -> Iterator[Chat]:
    """Chats about the help topics behind the first PROSE characters."""
    told = list(answers())
    for first in range(0, len(told), TURNS):
        messages, before = [], ""
        for about, answer in told[first : first + TURNS]:
            question = f"Tell me about {about}." if about != before else "What else?"
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            before = about
        yield Chat(messages, f"chat {first // TURNS}")


def answers() -> Iterator[tuple[str, str]]:
    """(heading, paragraphs below it), in order."""
    content = python_topics().content
    seen, about, answer = set(content[:PROSE].split("\n\n")), "", list[str]()
    for paragraph in [*content[PROSE:].split("\n\n")[1:], ""]:
        heading = HEADING.fullmatch(paragraph.strip("\n"))
        if about and answer and (heading or not paragraph or sum(map(len, answer)) >= ANSWER):
            yield about, "\n\n".join(answer)
            answer = []
        if heading:
            about, answer = heading[1], []
        elif paragraph not in seen:
            seen.add(paragraph)
            answer.append(paragraph.strip("\n"))
