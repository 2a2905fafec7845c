"""The Triton encoders of the GGUF block types, run by Triton's interpreter, give the bytes of the CPU's; tests/gpu has
the same on a device."""

from __future__ import annotations

import pytest
import torch
from triton_tools import interpreted

from dsv2quant.formats.gguf.blocks import TYPES
from dsv2quant.kernels.gguf_encode import ENCODED, encode


@pytest.fixture(scope="module")
def different() -> dict[str, list[str]]:
    """Of every type, the cases whose bytes differ."""
    return interpreted("gguf_interpreted.py")


@pytest.mark.parametrize("name", ENCODED)
def test_bytes_are_those_of_the_cpu(name: str, different: dict[str, list[str]]) -> None:
    compared = {case: names for case, names in different.items() if case.split()[0] == name}
    assert f"{name} plain" in compared
    assert not any(compared.values()), compared


@pytest.mark.parametrize("name", [name for name in ENCODED if TYPES[name].values > 1])
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    cols = TYPES[name].values * 3 // 2
    with pytest.raises(ValueError, match=f"{name} stores blocks of .* a row of {cols} is not whole blocks"):
        encode(name, torch.zeros(2, cols))
    with pytest.raises(ValueError, match=r"importance has shape \(256,\); 512 columns need \(512,\)"):
        encode(name, torch.zeros(2, 512), torch.ones(256))
