"""The house's order: what a part of the package may import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "dsv2quant"
# From the ground up: a part imports itself and those before it, be it lazily or for types alone.
ORDER = [
    "version",
    "errors",
    "progress",
    "storage",
    "arch",
    "formats",
    "text",
    "checkpoint",
    "planning",
    "kernels",
    "model",
    "calib",
    "report",
    "conversion",
    "evaluation",
    "engines",
    "bench",
    "api",
    "following",
    "allocation",
    "lm_eval",
    "publishing",
    "__init__",
    "cli",
    "__main__",
]


def imports(package: Path = PACKAGE) -> Iterator[tuple[str, str]]:
    """(module, module that it imports), names within the package."""
    modules = {".".join(path.relative_to(package).with_suffix("").parts): path for path in package.rglob("*.py")}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package.name:
                base = node.module.partition(".")[2] or "__init__"
                for alias in node.names:
                    inside = alias.name if base == "__init__" else f"{base}.{alias.name}"
                    yield name, inside if inside in modules else base
            elif isinstance(node, ast.Import) and any(alias.name == package.name for alias in node.names):
                yield name, "__init__"


def test_no_import_points_up() -> None:
    up = [(a, b) for a, b in imports() if ORDER.index(b.split(".")[0]) > ORDER.index(a.split(".")[0])]
    assert up == []


def test_no_two_files_import_each_other_in_a_ring() -> None:
    graph: dict[str, set[str]] = {}
    for a, b in imports():
        graph.setdefault(a, set()).add(b)
    TopologicalSorter(graph).prepare()  # raises CycleError naming them
