"""`reference.product`: right to float32's last bits, and of no row that depends on others or on threads."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from dsv2quant.kernels.reference import product

SHAPES = [(m, k, n) for m, k, n in itertools.product((1, 5, 64, 300), (64, 144, 704), (16, 96, 1408))]


@pytest.fixture
def threads():
    """Sets how many torch may use, and puts them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("tokens", "columns", "rows"), SHAPES)
@torch.inference_mode()
def test_it_is_the_product(tokens, columns, rows, threads) -> None:
    """A sum of K products in any order is within K · eps of it, relative to the sum of their magnitudes (Higham 2002,
    section 3.1)."""
    torch.manual_seed(columns)
    x, weight, bias = torch.randn(tokens, columns), torch.randn(rows, columns), torch.randn(rows)
    exact = F.linear(x.double(), weight.double(), bias.double())
    room = F.linear(x.abs().double(), weight.abs().double(), bias.abs().double())
    found = product(x, weight, bias)
    assert ((found - exact).abs() <= (columns + 1) * torch.finfo(torch.float32).eps * room).all()
    for count in (1, 3):
        threads(count)
        assert torch.equal(product(x, weight, bias), found)
    assert torch.equal(product(x[: tokens // 2 + 1], weight, bias), found[: tokens // 2 + 1])


@torch.inference_mode()
def test_any_strides_no_rows_and_no_columns() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96).T  # [96, 64]
    for x in (
        torch.randn(2, 5, 64),
        torch.randn(7, 128)[:, ::2],
        torch.randn(64, 7).T,
        torch.randn(0, 64),
        torch.randn(64),
    ):
        torch.testing.assert_close(product(x, weight, None), F.linear(x, weight), rtol=1e-5, atol=1e-4)
    assert torch.equal(product(torch.randn(5, 0), torch.randn(3, 0), None), torch.zeros(5, 3))


def test_it_has_a_gradient() -> None:
    x, weight = torch.randn(3, 64), torch.randn(8, 64, requires_grad=True)
    product(x, weight, None).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(8, -1))
