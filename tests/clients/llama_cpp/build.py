"""Build llama.cpp's tools in build/llama.cpp, from the source that llama-cpp-python's release carries.

It takes the package index that pip is set up with, cmake and a C++ compiler; some 15 minutes on two cores.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[3] / "build"
RELEASE = "llama-cpp-python==0.3.36"  # holds ggml-org/llama.cpp@0c1e57098
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TOOLS = ("quantize", "imatrix", "perplexity", "completion", "gguf-split", "tokenize", "server")
# Without examples and tests, and a server without web pages and HTTPS, which need more than a compiler. ggml-base keeps
# its own flags: there is no -march on it, so that the quantizers round as on any x86-64.
OPTIONS = ("CMAKE_BUILD_TYPE=Release", "LLAMA_CURL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF",
           "LLAMA_BUILD_SERVER=ON", "LLAMA_USE_PREBUILT_UI=OFF", "LLAMA_OPENSSL=OFF")  # fmt: skip


def fetch(folder: Path) -> None:
    """Unpack llama.cpp into `folder`, through a download that is checked against its hash."""
    downloads = folder.with_name("llama.cpp.download")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*pip, "--dest", downloads, RELEASE], check=True)
    archive = next(downloads.glob("llama_cpp_python-*.tar.gz"))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{archive}: sha256 {found}, not {SHA256}: it is not the release that this was tested with")
    with tarfile.open(archive) as file:
        file.extractall(downloads, filter="data")
    next(downloads.glob("llama_cpp_python-*/vendor/llama.cpp")).rename(folder)
    shutil.rmtree(downloads)


def main() -> None:
    folder = ROOT / "llama.cpp"
    made = [folder / "build" / "bin" / f"llama-{tool}" for tool in TOOLS]
    if all(path.exists() for path in made):
        return
    if shutil.which("cmake") is None:
        raise SystemExit("cmake is missing: install it")
    if not folder.exists():
        fetch(folder)
    options = [f"-D{option}" for option in OPTIONS]
    subprocess.run(["cmake", "-S", folder, "-B", folder / "build", *options], check=True)
    targets = [f"llama-{tool}" for tool in TOOLS]
    subprocess.run(["cmake", "--build", folder / "build", "--parallel", "--target", *targets], check=True)


if __name__ == "__main__":
    main()
