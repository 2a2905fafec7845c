"""The documentation: links and paths lead somewhere, options exist, and commands print what stands there."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import gguf_tiny
import pytest
import tiny
from test_layers import ORDER

from dsv2quant.cli.main import VERBS
from dsv2quant.text.text import python_topics

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    (path for place in ("*.md", "docs/*.md", "examples/*/*.md", "dsv2quant/*/*.md") for path in ROOT.glob(place)),
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?<![\w/.-])(?:dsv2quant|tests|tools|benchmarks|examples|docs)/[\w./*-]*[\w/*]")
# Options of programs that are not ours, and of tools/artifact_hashes.py.
OTHERS = {
    "--enable-expert-parallel", "--tensor-parallel-size", "--data-parallel-size", "--pipeline-parallel-size",
    "--tp-size", "--ep-size",
    "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint",
    "--model", "--tasks", "--apply", "--extra-index-url", "--compare", "--help", "--hf-overrides", "--cpu-moe",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    broken = []
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]*))?\)", FENCED.sub("", page.read_text())):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        is_there = path.exists() and (not anchor or anchor in anchors(path.read_text()))
        if not is_there:
            broken.append(f"{target}#{anchor}")
    assert broken == []


def anchors(text: str) -> set[str]:
    """The headings as GitHub's anchors."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", NAMES)
def test_named_files_exist(name: str) -> None:
    named = set(PATH.findall((ROOT / name).read_text()))
    assert sorted(path for path in named if not any(ROOT.glob(path))) == []


def test_the_walk_takes_nine_files_at_most_and_these_functions() -> None:
    walks = (ROOT / "docs/architecture.md").read_text().split("## The walk")[1:]
    for walk in walks:
        steps = re.findall(r"^\| `(dsv2quant/\S+)` \| `(\w+)` \|", walk.partition("\n## ")[0], re.MULTILINE)
        assert 5 <= len({file for file, _ in steps}) <= 9
        for file, function in steps:
            assert re.search(rf"def {function}\b", (ROOT / file).read_text()), f"{file} has no {function}"
    assert len(walks) == 2


def test_the_folders_are_in_the_order_of_the_layers() -> None:
    table = (ROOT / "docs/architecture.md").read_text().partition("## Folders")[2].partition("`kernels`, `formats`")[0]
    named = [name.removesuffix(".py") for name in re.findall(r"`(\w+)(?:/|\.py)`", table)]
    assert named == [
        name
        for name in ORDER
        if name not in ("__init__", "__main__")
        and (ROOT / f"dsv2quant/{name}").is_dir() | (ROOT / f"dsv2quant/{name}.py").is_file()
    ]


def test_options_exist(cli) -> None:
    verbs = re.findall(r"^  ([a-z-]+)  ", cli("--help").out.partition("Verbs:")[2], re.MULTILINE)
    calls = [(verb,) for verb in verbs if verb != "bench"] + [("bench", "kernels"), ("bench", "model")]
    known = set(re.findall(r"--[a-z0-9-]+", "".join(cli(*call, "--help").out for call in calls)))
    assert verbs == [*VERBS]
    for name in NAMES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", (ROOT / name).read_text()))
        assert named - known - OTHERS == set(), name


def test_the_readme_is_short_and_its_results_are_the_demos() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 170
    (table,) = re.findall(r"^artifact  .*?(?=^```)", readme, re.MULTILINE | re.DOTALL)
    assert table in (ROOT / "docs/benchmarks.md").read_text()


class Command(NamedTuple):
    line: str
    printed: list[str]


def commands(text: str) -> Iterator[Command]:
    """The `$ dsv2quant …` of a page, each with the lines that it is said to print."""
    for block in FENCED.findall(text):
        for part in re.split(r"^\$ ", block.removesuffix("```"), flags=re.MULTILINE)[1:]:
            line, *printed = part.rstrip("\n").split("\n")
            if line.startswith("dsv2quant "):
                yield Command(line.removeprefix("dsv2quant "), printed)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with examples/dsv2-mini and a hub's cache, in which V2-Lite is headers and holes."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(tiny.MINI, folder / "examples/dsv2-mini")
    repo = folder / "hub/models--deepseek-ai--DeepSeek-V2-Lite"
    tiny.write_headers(repo / "snapshots/0000", gguf_tiny.PUBLISHED["lite"])
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0000")
    return folder


RAN: dict[str, list[str]] = {}  # what commands printed: pages share some, and what these wrote


@pytest.mark.parametrize("name", [name for name in NAMES if any(commands((ROOT / name).read_text()))])
def test_commands_print_what_stands_there(name: str, workplace: Path, cli, monkeypatch) -> None:
    monkeypatch.chdir(workplace)
    for line, expected in commands((ROOT / name).read_text()):
        if not can_run(line, workplace):
            continue
        if line not in RAN:
            RAN[line] = run(line, cli, workplace)
        assert compare(line, expected, RAN[line]) is None, line


def can_run(line: str, folder: Path) -> bool:
    """Commands on dsv2-mini or what an earlier one wrote, and what reads headers of a hub id; not what takes a GPU."""
    verb, model, *_ = line.split()
    if verb == "bench" or "--device cuda" in line:
        return False
    return (folder / model).exists() or (verb in ("plan", "memory") and model == "deepseek-ai/DeepSeek-V2-Lite")


def run(line: str, cli: Callable, folder: Path) -> list[str]:
    words = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', line)]
    if (out := re.search(r" -o (\S+)", line)) and (folder / out[1]).exists():
        pytest.fail(f"two commands of these pages write {out[1]}: {line}")
    ran = cli(*words, *(("--cache-dir", str(folder / "hub")) if "deepseek-ai/" in line else ()))
    assert ran.code == 0, f"{line}\n{ran.err}"
    return [*ran.out.splitlines(), *(text for text in ran.err.splitlines() if not PROGRESS.search(text))]


# Lines of stderr that a page leaves out: of progress, and of what a machine has compiled already.
PROGRESS = re.compile(r"\d\d:\d\d gone|\d\d:\d\d$|^compiling for this processor|^no --calibration: using Python")
# What differs from run to run: seconds and speeds, and of a divergence the one token that differs most.
VARIES = re.compile(r"\b\d[\d.]* s\b|[\d.]+ per second|\bmax [\d.]+$")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def compare(line: str, expected: list[str], printed: list[str]) -> str | None:
    """What is wrong with `expected`, whose lines follow each other in `printed` but for those that "…" stands for."""
    place, skips = 0, False
    for text in expected:
        if text.strip() == "…":
            skips = True
            continue
        candidates = range(place, len(printed) if skips else min(place + 1, len(printed)))
        found = next((i for i in candidates if agrees(line, text, printed[i])), None)
        if found is None:
            return f"{text!r} is not printed where there is {printed[place : place + 1]}"
        place, skips = found + 1, False
    return None if skips or not expected or place == len(printed) else f"{printed[place]!r} is not in the text"


def agrees(line: str, expected: str, printed: str) -> bool:
    """Whether two lines are the same but for what varies; of what is computed in floating point, see `near`."""
    left, right = (VARIES.sub("~", text) for text in (expected, printed))
    if not (line.startswith(("eval-ppl", "calibrate")) or "--statistics" in line):
        return left == right
    if NUMBER.sub("#", squeezed(left)) != NUMBER.sub("#", squeezed(right)):
        return False
    of_this_text = python_topics().sha256.startswith("71f2ff5d99bd")  # of another Python's, figures are others
    return not of_this_text or all(map(near, NUMBER.findall(left), NUMBER.findall(right)))


def squeezed(text: str) -> str:
    """Without what a number's width does to a table."""
    return re.sub(r"[ -]{2,}", " ", text).strip()


def near(left: str, right: str) -> bool:
    """Processors differ in last places: decimals agree to 1%, those below 1 to 30%, counts to 5%, and powers of ten
    are no more than a magnitude."""
    a, b = (float(text.replace(",", "")) for text in (left, right))
    if "e" in left:
        return 0.1 <= a / b <= 10
    share = 0.05 if "." not in left else 0.3 if max(a, b) < 1 else 0.01
    return abs(a - b) <= share * max(a, b)


def test_wrong_texts_are_seen() -> None:
    printed = ["OUT: perplexity 15.0848 ± 0.5573", "KLD, nats  0.01309 ± 0.00026", "in 0.4 s"]
    line = "eval-ppl OUT"
    assert compare(line, printed, printed) is None
    assert compare(line, ["OUT: perplexity 15.1 ± 0.6", "…"], printed) is None
    assert compare(line, ["OUT: perplexity 15.3 ± 0.6", "…"], printed) is not None
    assert compare(line, ["…", "KLD, nats            0.0200 ± 0.00026", "…"], printed) is not None
    assert compare(line, ["…", "in 10 s"], printed) is None
    assert compare(line, printed[:2], printed) is not None
    assert compare("plan", ["3 files"], ["4 files"]) is not None
    assert anchors("# A `b`, c?\n```\n# d\n```\n") == {"a-b-c"}
