"""The wheel, the repository's symlinks, and the sizes the project keeps to."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_one_package(tmp_path):
    """The root's `kernels`, `formats` and `calib` are symlinks: installed, they would shadow other packages."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(tmp_path),
    ]
    built = subprocess.run([*command, str(copy_of_the_project(tmp_path))], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"dsv2quant", f"dsv2quant-{version()}.dist-info"}
    tables = [f"kernels/tuned/{path.name}" for path in (ROOT / "dsv2quant/kernels/tuned").glob("*.json")]
    for needed in (
        "recipes/fp8-block.yaml", "kernels/reference.py", "formats/fp8.py", "text/tokenizer.py", "py.typed",
        "bench/configs/v2.json", *tables,
    ):  # fmt: skip
        assert f"dsv2quant/{needed}" in names


def version() -> str:
    from dsv2quant import __version__

    return __version__


def copy_of_the_project(folder: Path) -> Path:
    """The tracked files alone, so that building leaves nothing behind in the checkout."""
    import shutil

    target = folder / "project"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", "examples", ".*_cache")
    shutil.copytree(ROOT, target, symlinks=True, ignore=ignored)
    return target


def test_the_root_shows_three_symlinks():
    for name in ("kernels", "formats", "calib"):
        assert (ROOT / name).is_symlink()
        assert (ROOT / name).resolve() == ROOT / "dsv2quant" / name
        assert not (ROOT / name / "__init__.py").exists()


def test_no_module_is_long():
    long = {p.name: n for p in (ROOT / "dsv2quant").rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_a_users_pip_resolves_from_an_index_alone(tmp_path, monkeypatch):
    """The dry run of tools/check_install.py, on an index of our own: no wheels elsewhere, no settings of pip's."""
    check = check_install()
    index, elsewhere = tmp_path / "index", tmp_path / "elsewhere"
    wheel(index / "tool", "tool", "1.0", "Requires-Dist: part==1.0")
    wheel(index / "part", "part", "1.0")
    wheel(elsewhere, "part", "2.0")
    constraints = tmp_path / "constraints.txt"
    monkeypatch.setenv("PIP_FIND_LINKS", str(elsewhere))
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "absent"))
    constraints.write_text("part==1.0\n")
    found = check.resolve(["tool"], constraints, [index.as_uri()])
    assert set(found) == {"tool 1.0", "part 1.0"}
    assert check.summary(found).startswith("2 packages, 0.00 GB to download: ")
    constraints.write_text("part==2.0\n")
    with pytest.raises(
        ValueError, match=r"tool 1\.0 depends on part==1\.0; The user requested \(constraint\) part==2\.0"
    ):
        check.resolve(["tool"], constraints, [index.as_uri()])


def test_a_file_from_elsewhere_is_named(tmp_path, monkeypatch):
    check = check_install()
    wheel(tmp_path / "part", "part", "1.0")
    (tmp_path / "constraints.txt").touch()
    with pytest.raises(
        ValueError, match=r"part 1\.0 would come from file:.*, which is not of https://pypi\.org/simple"
    ):
        check.taken([described("part", (tmp_path / "part/part-1.0-py3-none-any.whl").as_uri())], [check.PYPI])
    there = "https://files.pythonhosted.org/packages/part.whl"
    assert check.taken([described("part", there)], [check.PYPI]) == {"part 1.0": there}


@pytest.mark.parametrize(
    ("variables", "said", "unsaid"),
    [
        ((), "-m venv --clear  .venv", "extra-index-url"),
        (
            ("TORCH_INDEX=https://torch.example/whl/cpu",),
            "--extra-index-url https://torch.example/whl/cpu",
            "system-site",
        ),
        (("SYSTEM_TORCH=1",), "--system-site-packages", "extra-index-url"),
    ],
)
def test_makes_variables_choose_where_torch_comes_from(variables, said, unsaid, tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    plan = subprocess.run(["make", "-n", "demo", *variables], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said in plan.stdout
    assert unsaid not in plan.stdout


def test_another_variable_makes_the_environment_anew(tmp_path):
    """.venv remembers what it was made with."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / "python").write_text("#!/bin/sh\necho torch==2.11.0+cu130\n")
    (tmp_path / ".venv/bin/python").write_text("#!/bin/sh\n")
    for program in (tmp_path / "python", tmp_path / ".venv/bin/python"):
        program.chmod(0o755)

    def made(*variables: str) -> str:
        command = ["make", "demo", "PYTHON=./python", *variables]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "venv" in made("SYSTEM_TORCH=1")
    pins = (tmp_path / ".venv/constraints.txt").read_text()
    assert "torch==2.11.0+cu130\n" in pins
    assert "torch==2.13.0" not in pins
    assert "triton==" not in pins
    assert "venv" not in made("SYSTEM_TORCH=1")
    assert "venv" not in made()
    assert "venv --clear" in made("SYSTEM_TORCH=", "TORCH_INDEX=https://torch.example/whl/cpu")
    assert "venv" not in made()


def check_install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_install", ROOT / "tools/check_install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def described(name: str, url: str) -> dict[str, object]:
    """As pip's report has a package."""
    return {"metadata": {"name": name, "version": "1.0"}, "download_info": {"url": url, "archive_info": {}}}


def wheel(folder: Path, name: str, version: str, *fields: str) -> None:
    """An empty package, with the page of an index that links to it."""
    folder.mkdir(parents=True)
    file, info = f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    metadata = "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *fields, ""])
    with zipfile.ZipFile(folder / file, "w") as archive:
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{file}">{file}</a>')
