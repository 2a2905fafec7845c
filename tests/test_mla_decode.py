"""MLA decoding by Triton's interpreter and compiled for sm_90 without a device; tests/gpu runs it on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv2quant.config import ModelConfig
from dsv2quant.kernels import reference
from dsv2quant.kernels.mla_decode import Blocks, blocks_of, mla_decode

TESTS = Path(__file__).parent


def ran(script: str, **environment: str) -> dict:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    done = subprocess.run([sys.executable, TESTS / script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_interpreted_kernels_compute_what_the_twin_does() -> None:
    """Float16 weights and products of 11 bits: 2^-12 a rounding, a few of them."""
    errors = ran("mla_interpreted.py", TRITON_INTERPRET="1")
    assert len(errors) == 9
    assert max(errors.values()) < 2**-10, errors


def test_compiled_kernels_spill_nothing(tmp_path: Path) -> None:
    """Bytes of local memory and stack, and the shared memory a block may have on sm_90."""
    for name, used in ran("mla_compiled.py", TRITON_CACHE_DIR=str(tmp_path)).items():
        assert used["stack"] == used["local"] == 0, name
        assert used["shared"] <= 232448, name
        assert used["unit"] in used["ptx"], name
