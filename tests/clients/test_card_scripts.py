"""What a card says to run in Python, run as it stands there: with transformers, for a model that chats and one that
completes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
import tiny

import dsv2quant as dq
from dsv2quant.storage.card import addressed


@pytest.mark.parametrize("chats", [True, False])
def test_the_script_of_a_card_runs(chats, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny.MINI, source)
    if not chats:
        (source / "tokenizer_config.json").unlink()
    dq.convert(source, out, scheme="fp8-channel")
    card = addressed((out / "README.md").read_bytes(), str(out)).decode()
    (script,) = [code for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "AutoModel" in code]
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stderr
    begin = "User: What is attention" if chats else "An attention function can be described as"
    assert begin in ran.stdout
    assert len(ran.stdout) > len(begin) + 100
