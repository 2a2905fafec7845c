"""Compiled code that is kept between runs: never stale, never in the way."""

from __future__ import annotations

import ast
import errno
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest

from dsv2quant.formats import compiled as module
from dsv2quant.formats.compiled import compiled

PACKAGE = Path(__file__).parent.parent / "dsv2quant"


def doubled(x):
    return 2 * x


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder where this test's functions are kept."""
    monkeypatch.setattr(module, "folder", lambda: tmp_path)
    return tmp_path


def hits(function, *args):
    """Whether a call with these arguments found its machine code."""
    function(*args)
    return sum(function.stats.cache_hits.values()) == 1


def test_a_change_of_a_function_that_is_called_from_another_file_changes_the_bytes(tmp_path):
    """`_weigh_by_importance` of kquants.py calls `weigh` of search.py."""
    shutil.copytree(PACKAGE, tmp_path / "dsv2quant", ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import numpy as np; from dsv2quant.formats.gguf.kquants import LANES, _weigh_by_importance as run;"
        "weight = np.full((1, LANES), 5, np.float32); energy = np.full(LANES, 512, np.float32);"
        "run(np.zeros((1, LANES), np.float32), weight, energy, 0);"
        "print(weight[0, 0], sum(run.stats.cache_hits.values()))"
    )

    def run() -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("NUMBA_CACHE_DIR", None)
        command = [sys.executable, "-c", program]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    assert run() == "10.0 0"
    callee = tmp_path / "dsv2quant/formats/gguf/search.py"
    was = callee.read_text()
    now = was.replace("*= np.sqrt(", "+= np.sqrt(")
    assert now != was
    callee.write_text(now)
    assert run() == "7.0 0"


def test_machine_code_is_kept_and_found(kept):
    assert not hits(compiled(doubled), 4)
    (file,) = kept.iterdir()
    assert file.name.startswith(f"{__name__}.doubled.")
    assert hits(compiled(doubled), 4)
    assert not hits(compiled(doubled), 4.0)
    assert len(list(kept.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:20],
        lambda whole: whole[:-1],
        lambda whole: whole[:900] + bytes([whole[900] ^ 1]) + whole[901:],
        lambda whole: whole + b"\0",
    ],
    ids=["empty", "no digest", "truncated", "flipped", "longer"],
)
def test_a_damaged_file_is_compiled_again_and_replaced(damage, kept):
    assert not hits(compiled(doubled), 4)
    (file,) = kept.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = compiled(doubled)
    assert not hits(again, 4)
    assert again(4) == 8
    assert list(kept.iterdir()) == [file]
    assert hits(compiled(doubled), 4)


def test_other_sources_versions_and_processors_have_other_code(kept, monkeypatch):
    def code(features: str) -> SimpleNamespace:
        return SimpleNamespace(magic_tuple=lambda: ("x86_64", "some processor", features))

    known = module.Kept("f")
    path = known._path((1,), code("+avx2"))
    assert path != known._path((1,), code("+avx512f"))
    assert path != known._path((2,), code("+avx2"))
    for changed in ("numba", "llvmlite"):
        with monkeypatch.context() as patched:
            patched.setattr(getattr(module, changed), "__version__", "0.1")
            assert path != known._path((1,), code("+avx2"))
    assert path == known._path((1,), code("+avx2"))
    seal = known._seal(b"code")
    monkeypatch.setattr(module, "sources_digest", lambda: b"other sources")
    assert module.Kept("f")._seal(b"code") != seal


@pytest.fixture
def candidates(tmp_path, monkeypatch):
    """Sets the folders that are tried, and has them looked for anew."""

    def tried(*folders: Path) -> Path | None:
        monkeypatch.setattr(module, "_candidates", lambda: iter(folders))
        module.folder.cache_clear()
        return module.folder()

    yield tried
    module.folder.cache_clear()


def test_the_first_folder_that_is_ours_to_write_is_taken(candidates, tmp_path, monkeypatch):
    nowhere, open_to_all, linked, ours = (tmp_path / name for name in ("file/folder", "open", "linked", "a/b"))
    (tmp_path / "file").touch()
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    linked.symlink_to(tmp_path)
    assert candidates(nowhere, open_to_all, linked, ours) == ours
    assert ours.stat().st_mode & 0o777 == 0o700
    assert not list(ours.iterdir())
    monkeypatch.setattr(os, "geteuid", lambda: ours.stat().st_uid + 1)
    assert candidates(ours) is None  # another user's code would be run


def test_without_a_folder_functions_compile_and_one_line_says_so(candidates, tmp_path, caplog):
    (tmp_path / "file").touch()
    module._say_that_it_compiles.cache_clear()
    with caplog.at_level(logging.INFO, "dsv2quant"):
        assert candidates(tmp_path / "file" / "a") is None
        assert compiled(doubled)(4) == 8
        assert compiled(doubled)(4.0) == 8
    assert caplog.messages == [
        "compiling for this processor, at every run, as no folder to keep it in can be written to: it can take a minute"
    ]


def test_that_it_compiles_is_said_once_and_not_where_machine_code_is_kept(kept, caplog):
    says = module._say_that_it_compiles
    says.cache_clear()
    for argument in (4, 4.0):
        assert compiled(doubled)(argument) == 8
    assert caplog.messages == ["compiling for this processor, once: it can take a minute"]
    caplog.clear()
    says.cache_clear()
    assert compiled(doubled)(4) == 8
    assert not caplog.messages


def test_a_container_without_a_home_a_package_folder_and_a_temporary_folder(candidates, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(module, "SOURCES", tmp_path / "file")
    monkeypatch.setattr(module.config, "CACHE_DIR", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nonexistent"))
    module.folder.cache_clear()
    assert module.folder() == tmp_path / f"dsv2quant-{os.geteuid()}"
    assert not (tmp_path / "nonexistent").exists()
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    module.folder.cache_clear()
    assert module.folder() == tmp_path / "home/.cache/dsv2quant"
    monkeypatch.setattr(module.config, "CACHE_DIR", str(tmp_path / "chosen"))
    module.folder.cache_clear()
    assert module.folder() == tmp_path / "chosen"
    monkeypatch.setattr(module.config, "CACHE_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path / "nonexistent"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError(errno.ENOENT, "none")))
    module.folder.cache_clear()
    assert module.folder() is None


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_a_full_disk_is_no_error_and_leaves_nothing(method, kept, monkeypatch, caplog):
    written = getattr(Path, method)

    def full(path: Path, *args: object) -> None:
        if method == "write_bytes":
            written(path, b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, method, full)
    with caplog.at_level(logging.INFO, "dsv2quant"):
        assert compiled(doubled)(4) == 8
    assert not list(kept.iterdir())
    assert f"{kept}: compiled code can't be kept: No space left on device" in caplog.text


def test_compiled_functions_read_nothing_from_outside_their_folder():
    """The digest covers the folder alone."""
    seen = set()
    for path in (PACKAGE / "formats").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        decorated = {ast.unparse(d) for node in ast.walk(tree) for d in getattr(node, "decorator_list", [])}
        if "compiled" not in decorated:
            continue
        seen.add(path.name)
        for node in ast.walk(tree):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            inside = all(n.startswith("dsv2quant.formats.") for n in names if n.partition(".")[0] == "dsv2quant")
            assert inside, (path, names)
    gguf = {"codes.py", "grids.py", "iq1.py", "kquants.py", "lattice.py", "legacy.py", "search.py", "ternary.py"}
    assert seen == {"cpu.py", "gptq.py", *gguf}
    other = [p for p in PACKAGE.rglob("*.py") if "njit" in p.read_text(encoding="utf-8") and p.name != "compiled.py"]
    assert not other  # one place keeps compiled code


def test_arrays_of_other_types_have_other_code(kept):
    readonly = np.ones(3)
    readonly.flags.writeable = False
    code = SimpleNamespace(magic_tuple=tuple)
    arrays = (np.ones(3), np.ones(3, np.float32), np.ones(6)[::2], np.ones((1, 3)), readonly)
    assert len({module.Kept("f")._path((numba.typeof(array),), code) for array in arrays}) == len(arrays)
