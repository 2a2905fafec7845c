"""The wheel, the repository's symlinks, and the sizes the project keeps to."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

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
        "recipes/fp8-block.yaml", "kernels/reference.py", "formats/fp8.py", "calib/tokens.py", "py.typed",
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
