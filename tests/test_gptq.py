"""GPTQ against a textbook implementation, its algebra against least squares, and the moments it works on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv2quant.calib import gptq
from dsv2quant.calib.gptq import BLOCK, DAMPING, Moments
from dsv2quant.formats.cpu import search_scales

F64 = torch.float64
# (batch, rows, columns, group): less than one block of columns, exactly one, several, and a ragged last one.
SHAPES = [
    (1, 3, BLOCK // 2 + 8, BLOCK // 2 + 8),
    (1, 5, BLOCK, 32),
    (3, 7, 2 * BLOCK + 32, 32),
    (2, 16, 3 * BLOCK + 8, 8),
    (2, 4, 4 * BLOCK, 128),
]


def searched(w: torch.Tensor, h: torch.Tensor, factored: gptq.Factor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) with the scales that h's diagonal finds, as a calibration quantizes."""
    scales = gptq.best_scales(w, h.diagonal(dim1=-2, dim2=-1), group)
    return gptq.quantize(w, scales, factored), scales


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(batch: int, tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Correlated tokens [batch, tokens, K] of unequal columns, as float32 values in float64."""
    g = generator(seed)
    mix = torch.randn(batch, columns, columns, generator=g) * columns**-0.5
    sizes = torch.exp(torch.randn(batch, 1, columns, generator=g))
    latent = torch.randn(batch, tokens, columns, generator=g) @ mix @ mix
    return (sizes * (latent + 0.1 * torch.randn(batch, tokens, columns, generator=g))).double()


def weights(batch: int, rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, rows, columns, generator=generator(seed)).double()


def moments_of(x: torch.Tensor, ideal: torch.Tensor | None = None) -> Moments:
    """Moments of tokens [batch, tokens, K], in float64."""
    batch, tokens, _ = x.shape
    ideal = x if ideal is None else ideal
    return Moments(x.mT @ x, (ideal - x).mT @ x, torch.full((batch,), float(tokens)))


def problem(batch: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and H of half as many tokens again as columns."""
    return weights(batch, rows, columns), moments_of(inputs(batch, 3 * columns // 2, columns)).h


def damped(h: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def textbook(
    w: torch.Tensor, h: torch.Tensor, scales: torch.Tensor, forced: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """GPTQ of one matrix [R, K], column by column: (codes, weights before rounding, errors, order of columns).

    With `forced` codes, these are taken instead, and their errors passed on.
    """
    order = h.diagonal().argsort(descending=True, stable=True)
    u = torch.linalg.cholesky(torch.linalg.inv(damped(h)[order][:, order]), upper=True)
    w, step = w.clone()[:, order], scales.to(w.dtype).repeat_interleave(w.shape[1] // scales.shape[1], 1)[:, order]
    codes, before, errors = torch.empty_like(w), torch.empty_like(w), torch.empty_like(w)
    for j in range(w.shape[1]):
        before[:, j] = w[:, j]
        codes[:, j] = (w[:, j] / step[:, j]).round().clamp(-8, 7) if forced is None else forced[:, order[j]]
        errors[:, j] = (w[:, j] - codes[:, j] * step[:, j]) / u[j, j]
        w[:, j:] -= errors[:, j, None] * u[j, j:]
    return codes[:, order.argsort()], before, errors, order


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_equal_a_textbook_gptq_in_float64(shape):
    batch, rows, columns, group = shape
    w, h = problem(batch, rows, columns)
    codes, scales = searched(w, h, gptq.factor(h), group)
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, (batch, rows, columns // group))
    for i in range(batch):
        assert torch.equal(codes[i].double(), textbook(w[i], h[i], scales[i])[0])
    assert not torch.equal(codes, gptq.nearest(w, scales))


TIES = [(BLOCK, 32), (3 * BLOCK + 8, 40), (4 * BLOCK, 128)]  # columns and group


@pytest.mark.parametrize(("columns", "group"), TIES)
def test_in_float32_codes_differ_only_at_ties(columns, group):
    differ_only_at_ties(columns, group, "cpu")


def differ_only_at_ties(columns: int, group: int, device: str) -> None:
    """Each float32 code is float64's, or its neighbour where float64 stands near the tie between them.

    With the codes given, the errors E solve E U = W - Q S by substitution. In float32 they solve it for a U off by
    ΔU with |ΔU| ≤ γ |U| (Higham, Accuracy and Stability of Numerical Algorithms, theorem 8.5): γ = (K + 3) u, of K
    operations a sum, U's own rounding, and two for the division by its diagonal. To first order E is then off by at
    most γ |E| |U| |U⁻¹|, and a column before rounding by that times its diagonal; twice that covers the rest. The
    quotient that is rounded is off by u more.
    """
    w, h = (part.float().to(device) for part in problem(1, 2000, columns))
    codes, scales = (part[0].cpu() for part in searched(w, h, gptq.factor(h), group))
    w, h = w.cpu(), h.cpu()
    _, before, errors, order = textbook(w[0].double(), h[0].double(), scales, forced=codes.double())
    u = gptq.factor(h.double()).u[0]
    step = scales.double().repeat_interleave(group, 1)[:, order]
    quotient, got = before / step, codes.double()[:, order]
    off = 2 * (columns + 3) * 2.0**-24 * (errors.abs() @ (u.abs() @ u.inverse().abs())) * u.diagonal() / step
    off += quotient.abs() * 2.0**-24
    assert off.max() < 0.02  # so that the bound says something
    want = quotient.round().clamp(-8, 7)
    other = want != got
    assert (quotient - (want + got) / 2).abs()[other].le(off[other]).all()
    # Roundings mostly cancel: quotients are off by some 1e-6, and so are as many codes.
    assert other.sum() <= 1e-4 * codes.numel()


def test_matrices_and_rows_do_not_influence_each_other():
    w, h = problem(3, 20, 96)
    factored = gptq.factor(h)
    codes, scales = searched(w, h, factored, 32)
    for i in range(3):
        alone = gptq.factor(h[i : i + 1])
        assert torch.equal(alone.order, factored.order[i : i + 1])
        got = searched(w[i : i + 1], h[i : i + 1], alone, 32)
        assert torch.equal(got[0][0], codes[i])
        assert torch.equal(got[1][0], scales[i])
    for part in (slice(0, 1), slice(1, 20)):
        got = searched(w[:, part], h, factored, 32)
        assert torch.equal(got[0], codes[:, part])
        assert torch.equal(got[1], scales[:, part])


def test_columns_come_back_in_their_own_order():
    w, h = problem(1, 6, 64)
    shuffle = torch.randperm(64, generator=generator(2))
    codes, _ = searched(w, h, gptq.factor(h), 64)  # one group, so that shuffling leaves the scales alone
    shuffled = h[:, shuffle][:, :, shuffle]
    got, _ = searched(w[:, :, shuffle], shuffled, gptq.factor(shuffled), 64)
    assert torch.equal(got, codes[:, :, shuffle])


def test_scales_are_searched_with_the_diagonal_as_weights():
    w, h = problem(2, 5, 128)
    _, scales = searched(w, h, gptq.factor(h), 32)
    for i in range(2):
        found = search_scales(w[i].float().numpy(), h[i].diagonal().float().numpy()[None], 32)
        assert torch.equal(scales[i], torch.from_numpy(found))
    assert not torch.equal(scales, gptq.best_scales(w, torch.ones(2, 128), 32))


def test_nearest_and_dequantize_are_the_codecs():
    from dsv2quant.formats.codec import Inputs
    from dsv2quant.formats.schemes import CODECS

    w = weights(1, 9, 128).float()[0]
    scales = gptq.best_scales(w[None], torch.ones(1, 128), 32)[0]
    codes = gptq.nearest(w, scales)
    codec = CODECS["int4-g32"]
    (encoded,) = codec.encode([w.numpy()], method="mse", inputs=[Inputs(np.ones(128, np.float32), 1.0)])
    ours = codec.pack(codes.numpy(), scales.numpy())
    assert all((ours[name] == array).all() for name, array in encoded.items())
    parts = {name: torch.from_numpy(array) for name, array in ours.items()}
    parts["weight_scale"] = parts["weight_scale"].view(torch.bfloat16)
    assert torch.equal(gptq.dequantize(codes, scales), codec.decode(parts, torch.float32))


@pytest.mark.parametrize("columns", [1, 40, 160])
def test_the_factor_is_that_of_the_damped_inverse(columns):
    h = moments_of(inputs(3, 2 * columns, columns)).h
    factored = gptq.factor(h)
    assert factored.u.dtype == F64
    assert gptq.factor(h.float()).u.dtype == torch.float32
    eye = torch.eye(columns, dtype=F64)
    for u, order, one in zip(factored.u, factored.order, h, strict=True):
        assert (one.diagonal()[order].diff() <= 0).all()
        permuted = damped(one)[order][:, order]
        assert torch.equal(u, u.triu())
        # The largest eigenvalue is at most K times the mean of the diagonal, the least 5% of it: the condition is at
        # most 21 K, by which the roundings of K-term sums are multiplied.
        assert (u.T @ u @ permuted - eye).norm() < columns * (21 * columns) * 2.0**-53
    x = torch.randn(3, 4, columns, dtype=F64, generator=generator(3))
    want = torch.stack([torch.linalg.solve(damped(one), part.T).T for one, part in zip(h, x, strict=True)])
    torch.testing.assert_close(factored.solve(x), want, rtol=1e-9, atol=1e-12)


def test_a_singular_h_needs_only_the_damping():
    x = inputs(1, 3, 48)  # 3 tokens
    h = moments_of(x).h
    factored = gptq.factor(h)
    u, order = factored.u[0], factored.order[0]
    torch.testing.assert_close(u.T @ u, damped(h[0]).inverse()[order][:, order], rtol=1e-9, atol=0)


def test_damping_grows_tenfold_until_every_matrix_is_positive_definite():
    h = moments_of(inputs(2, 96, 48)).h
    level = h[0].diagonal().mean()
    least, vector = (found[..., 0] for found in torch.linalg.eigh(h[0]))
    h[0] -= (least + 2 * level) * vector[:, None] * vector  # an eigenvalue of -2 mean diagonals, roughly
    level = h[0].diagonal().mean()
    assert -5 * level < torch.linalg.eigvalsh(h[0])[0] < -0.5 * level
    factored = gptq.factor(h)
    for u, order, one in zip(factored.u, factored.order, h, strict=True):  # 0.05 and 0.5 were too little
        torch.testing.assert_close(u.T @ u, damped(one, 5.0).inverse()[order][:, order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_without_any_knowledge_codes_are_plain_rounding(dtype):
    w = weights(2, 5, 96).to(dtype)
    h = torch.zeros(2, 96, 96, dtype=dtype)
    factored = gptq.factor(h)
    assert factored.u.isfinite().all()
    codes, scales = searched(w, h, factored, 32)
    assert torch.equal(codes, gptq.nearest(w, scales))
    assert torch.equal(gptq.fit(w, Moments(h, h, torch.zeros(2)), factored), w)


def test_a_column_that_is_never_used_is_rounded_plainly():
    x = inputs(1, 300, 64)
    x[..., 10:20] = 0
    w, h = weights(1, 8, 64), moments_of(x).h
    codes, scales = searched(w, h, gptq.factor(h), 32)
    dead = torch.zeros(64, dtype=torch.bool)
    dead[10:20] = True
    assert torch.equal(codes[..., dead], gptq.nearest(w, scales)[..., dead])
    assert codes[..., dead].any()


@pytest.mark.parametrize("damping", [1e-12, DAMPING])
def test_the_fit_solves_least_squares(damping):
    """Σ ‖W' x - W x̂‖² + λ ‖W' - W‖², solved by QR of the stacked system."""
    x = inputs(2, 200, 40)
    ideal = x + 0.1 * inputs(2, 200, 40, seed=5)
    w, moments = weights(2, 6, 40), moments_of(x, ideal)
    got = gptq.fit(w, moments, gptq.factor(moments.h, damping))
    got = w + (got - w) * (200 + 4 * 40) / 200  # 200 tokens are trusted that much
    for i in range(2):
        shift = (damping * moments.h[i].diagonal().mean()).sqrt() * torch.eye(40, dtype=F64)
        system, target = torch.cat([x[i], shift]), torch.cat([ideal[i] @ w[i].T, shift @ w[i].T])
        want = torch.linalg.lstsq(system, target).solution.T
        # Normal equations square the condition of the system, 1e3 here
        assert (got[i] - want).norm() / want.norm() < 1e-8
        assert (got[i] - w[i]).norm() / w[i].norm() > 0.01


def output(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w.mT


def test_errors_are_those_of_the_outputs():
    x = inputs(3, 100, 40)
    ideal = x + 0.1 * inputs(3, 100, 40, seed=5)
    w = weights(3, 6, 40)
    moments = moments_of(x, ideal)
    some, other = w + 0.1 * weights(3, 6, 40, seed=6), w + 0.2 * weights(3, 6, 40, seed=7)

    def direct(q: torch.Tensor) -> torch.Tensor:
        return (output(ideal, w) - output(x, q)).square().sum((1, 2))

    got = gptq.output_error(w, some, moments) - gptq.output_error(w, other, moments)
    torch.testing.assert_close(got, direct(some) - direct(other), rtol=1e-10, atol=0)
    assert (gptq.output_error(w, w, moments) == 0).all()
    want = (output(x, w - some)).square().sum((1, 2)) / output(x, w).square().sum((1, 2))
    torch.testing.assert_close(gptq.relative_error(w, some, moments), want, rtol=1e-10, atol=0)
    nothing = Moments(0 * moments.h, 0 * moments.s, moments.count)
    assert (gptq.relative_error(w, some, nothing) == 0).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_moments_add_up_over_tokens(weighted, bf16, monkeypatch):
    monkeypatch.setattr(gptq, "NEAR", 7)
    monkeypatch.setattr(gptq, "multiplies_bf16", lambda: bf16)
    columns = gptq.BLOCK + 6
    x = inputs(1, 30, columns)[0].float()
    ideal = x + 0.1 * inputs(1, 30, columns, seed=5)[0].float()
    share = torch.rand(30, generator=generator(4)) if weighted else None
    moments = Moments.zeros(2, columns, torch.device("cpu"))
    for rows in (slice(0, 11), slice(11, 11), slice(11, 30)):  # nothing, now and then
        moments.add(1, x[rows], ideal[rows], None if share is None else share[rows])
    weights = torch.ones(30, dtype=F64) if share is None else share.double()
    x, off = x.double(), (ideal - x).double()
    h, s = (torch.einsum("ti,t,tj->ij", left, weights, x) for left in (x, off))
    # 30 products of float32 values: sums of 30 terms of one sign on the diagonal, of about that size elsewhere
    assert (moments.h[1].double() - h).abs().max() < 30 * 2.0**-24 * h.abs().max()
    above, below = moments.h[1, : gptq.BLOCK, gptq.BLOCK :], moments.h[1, gptq.BLOCK :, : gptq.BLOCK]
    assert torch.equal(above, below.T)
    # In BF16 both factors of each term are rounded, and the sum of some: each by half of its last bit, 2^-9 at most.
    rounded = 3.1 * 2.0**-9 * torch.einsum("ti,t,tj->ij", off.abs(), weights, x.abs())
    allowed = rounded if bf16 else 30 * 2.0**-24 * s.abs().max()
    assert ((moments.s[1].double() - s).abs() <= allowed).all()
    assert moments.count.tolist() == [0, 30]
    assert not moments.h[0].any()
    assert not moments.s[0].any()


@pytest.mark.parametrize("priors", [1, 3])
def test_few_tokens_are_drawn_toward_the_prior(priors):
    columns, counts = 16, (0, 1, 40)
    x = inputs(3, 40, columns)
    ideal = x + 0.1 * inputs(3, 40, columns, seed=5)
    own, prior = Moments.zeros(3, columns, x.device), Moments.zeros(priors, columns, x.device)
    for i, count in enumerate(counts):
        own.add(i, x[i, :count].float(), ideal[i, :count].float(), torch.full((count,), 0.01))
    for i in range(priors):
        prior.add(i, (x[i] + 1).float(), (ideal[i] + 1).float())
    got = own.shrunk(prior)
    assert got.h.isfinite().all()
    assert got.s.isfinite().all()
    assert got.count.tolist() == list(counts)
    for i, count in enumerate(counts):
        k = i if priors > 1 else 0
        other_h, other_s = prior.h[k].double() / 40, prior.s[k].double() / 40
        if not count:
            want_h, want_s = other_h, other_s
        else:
            h, s = own.h[i].double() / count, own.s[i].double() / count
            ratio = h.trace() / other_h.trace()  # the prior knows no weights
            want_h = (count * h + columns * ratio * other_h) / (count + columns)
            want_s = (count * s + columns * ratio * other_s) / (count + columns)
            assert got.h[i].trace().item() == pytest.approx(h.trace().item(), rel=1e-5)
        torch.testing.assert_close(got.h[i].double(), want_h, rtol=1e-5, atol=1e-6 * want_h.abs().max().item())
        torch.testing.assert_close(got.s[i].double(), want_s, rtol=1e-5, atol=1e-6 * want_s.abs().max().item())
        torch.linalg.cholesky(damped(got.h[i].double()))


def test_tokens_of_nothing_but_zeros_leave_finite_moments():
    columns = 16
    own, prior = Moments.zeros(2, columns, torch.device("cpu")), Moments.zeros(2, columns, torch.device("cpu"))
    own.add(0, torch.zeros(5, columns), torch.zeros(5, columns))
    own.add(1, torch.zeros(5, columns), torch.zeros(5, columns))
    prior.add(0, *(inputs(1, 40, columns, seed=s)[0].float() for s in (0, 5)))
    prior.add(1, torch.zeros(5, columns), torch.zeros(5, columns))
    got = own.shrunk(prior)
    assert got.h.isfinite().all()
    assert got.s.isfinite().all()
    codes, scales = searched(weights(2, 4, columns).float(), got.h, gptq.factor(got.h), 8)
    assert scales.isfinite().all()
    assert codes.any()


def lost(x: torch.Tensor, ideal: torch.Tensor, w: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (output(ideal, w) - output(x, q)).square().sum((1, 2)) / output(ideal, w).square().sum((1, 2))


def test_gptq_loses_less_than_rounding_and_less_still_after_the_fit():
    x = inputs(3, 2000, 128)
    ideal = x + 0.1 * x @ torch.randn(3, 128, 128, dtype=F64, generator=generator(8)) * 128**-0.5
    w = weights(3, 32, 128)
    moments = moments_of(x[:, ::2], ideal[:, ::2])  # the other half of the tokens judges
    factored = gptq.factor(moments.h)

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        return gptq.dequantize(*searched(weight, moments.h, factored, 32)).double()

    scales = gptq.best_scales(w, torch.ones(3, 128), 32)
    plain = gptq.dequantize(gptq.nearest(w, scales), scales).double()
    x, ideal = x[:, 1::2], ideal[:, 1::2]
    assert (lost(x, x, w, rounded(w)) < 0.6 * lost(x, x, w, plain)).all()
    fitted = gptq.fit(w, moments, factored)
    assert (lost(x, ideal, w, rounded(fitted)) < 0.7 * lost(x, ideal, w, rounded(w))).all()


def test_few_tokens_are_damped_and_trusted_less():
    x = inputs(2, 300, 40)
    moments = moments_of(x, x + 0.1 * inputs(2, 300, 40, seed=5))
    moments.count[1] = 10
    torch.testing.assert_close(moments.damping, torch.tensor([0.05 + 40 / 300, 0.05 + 40 / 10], dtype=F64))
    w = weights(2, 6, 40)
    factored = gptq.factor(moments.h, moments.damping)
    refit = gptq.fit(w, moments, factored) - w
    whole = factored.solve(w @ moments.s)
    torch.testing.assert_close(refit[0], whole[0] * 300 / (300 + 4 * 40))
    torch.testing.assert_close(refit[1], whole[1] * 10 / (10 + 4 * 40))
    for i in range(2):
        inverse = torch.linalg.inv(damped(moments.h[i], float(moments.damping[i])))
        torch.testing.assert_close(factored.u[i].mT @ factored.u[i], inverse[factored.order[i]][:, factored.order[i]])
    none = Moments.zeros(1, 8, torch.device("cpu"))
    assert none.damping == 0.05 + 8
