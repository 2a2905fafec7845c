"""Does pip find, on a package index alone, versions that constraints.txt and pyproject.toml allow together?

    python tools/check_install.py [EXTRA_INDEX_URL]

Run by `make check-install`. A dry run: nothing is installed, and where the index serves metadata (or ranges of a
wheel), no package is downloaded. The machine's own pip configuration, local wheels and installed packages don't count,
because a user has none of them. Prints how much an install downloads; exits with 1 and one line where none is possible.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
PYPI = "https://pypi.org/simple"
FILES_OF = {"pypi.org": "files.pythonhosted.org"}  # where an index keeps its files, if not on its own host
REACHING = {"PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY", "PIP_DEFAULT_TIMEOUT", "PIP_CACHE_DIR"}  # how, not what


def main() -> int:
    try:
        report = resolve([f"{ROOT}[test]"], ROOT / "constraints.txt", [PYPI, *sys.argv[1:]])
    except ValueError as error:
        print(f"check-install: {error}", file=sys.stderr)
        return 1
    print(f"check-install: {summary(report)}")
    return 0


def resolve(requirements: Sequence[str], constraints: Path, indexes: Sequence[str]) -> dict[str, str]:
    """`taken` of an install into an empty environment. Raises ValueError where pip finds no versions that go
    together, or takes a file from elsewhere than these indexes."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--use-feature=fast-deps"]
    command += ["--disable-pip-version-check", "--no-input", "-c", str(constraints), "--index-url", indexes[0]]
    command += [part for extra in indexes[1:] for part in ("--extra-index-url", extra)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        command += ["--report", str(path), *requirements]
        ran = subprocess.run(command, env=environment(os.environ), capture_output=True, text=True, check=False)
        if ran.returncode:
            raise ValueError(reason(ran.stdout, ran.stderr))
        installed = json.loads(path.read_text(encoding="utf-8"))["install"]
    return taken(installed, indexes)


def taken(installed: Sequence[Mapping[str, Any]], indexes: Sequence[str]) -> dict[str, str]:
    """{package and version: URL} of the packages of pip's report, each from one of these indexes."""
    hosts = {host for index in indexes for host in (urlsplit(index).netloc, FILES_OF.get(urlsplit(index).netloc))}
    found = {}
    for package in installed:
        if "dir_info" in (source := package["download_info"]):  # the project itself
            continue
        name = f"{package['metadata']['name']} {package['metadata']['version']}"
        if urlsplit(source["url"]).netloc not in hosts:
            raise ValueError(f"{name} would come from {source['url']}, which is not of {' or '.join(indexes)}")
        found[name] = source["url"]
    return found


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """Without pip's settings, but for how a network is reached."""
    kept = {name: value for name, value in own.items() if not name.startswith("PIP_") or name in REACHING}
    return kept | {"PIP_CONFIG_FILE": os.devnull}


def reason(output: str, errors: str) -> str:
    """What pip said in many lines, in one: its first error, and for a conflict the two sides of it."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    said = next((line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")), "pip failed")
    _, _, conflict = output.partition("The conflict is caused by:")
    sides = conflict.split("To fix this")[0].split("\n\n")[0].splitlines()
    return "; ".join([said.rstrip("."), *(side.strip() for side in sides if side.strip())])


def summary(packages: Mapping[str, str]) -> str:
    """How many packages, and bytes where the index tells: '87 packages, 2.70 GB: torch 2.13.0 526 MB, …'."""
    with ThreadPoolExecutor(8) as pool:
        sizes = dict(zip(packages, pool.map(size_of, packages.values()), strict=True))
    if any(size is None for size in sizes.values()):
        return f"{len(packages)} packages"
    largest = sorted(sizes, key=lambda name: -sizes[name])
    shown = [f"{name} {sizes[name] / 1e6:.0f} MB" for name in largest[:4]]
    return f"{len(packages)} packages, {sum(sizes.values()) / 1e9:.2f} GB to download: {', '.join(shown)}, …"


def size_of(url: str) -> Any:
    """Bytes of a file, None where its server doesn't say."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
            length = answer.headers["Content-Length"]
    except OSError:
        return None
    return int(length) if length else None


if __name__ == "__main__":
    sys.exit(main())
