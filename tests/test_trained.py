"""What a step of tuning does to a weight: codes stay codes, gradients are those of the whole model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv2quant.calib import trained, whole
from dsv2quant.calib.held import of_folder
from dsv2quant.calib.trained import Blocks, Grid, Grouped, Plain
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.formats.gguf import blocks, codes
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.attention import Rope
from dsv2quant.model.load import Loader, LoadOptions
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")
INT4 = CODECS["int4-g32"].integers
TYPES = ("Q4_0", "Q5_1", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4", "IQ3_S", "IQ2_XXS", "IQ1_M")


def weight(rows: int = 4, columns: int = 512) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


def nothing(values: torch.Tensor) -> None:
    """Where no model is."""


def int4(w: np.ndarray) -> Grouped:
    (parts,) = CODECS["int4-g32"].encode([w])
    return Grouped("w", nothing, parts, INT4, torch.device("cpu"))


def of_type(kind: str, w: np.ndarray) -> Blocks:
    return Blocks("w", nothing, kind, blocks.encode(kind, w, np.ones(w.shape[1], np.float32)), torch.device("cpu"))


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_are_held_as_they_decode(kind):
    one = of_type(kind, weight())
    stored = one.settle()
    assert np.array_equal(stored[trained.BLOCKS], blocks.encode(kind, weight(), np.ones(512, np.float32)))
    wanted = blocks.decode(kind, stored[trained.BLOCKS])
    # two roundings of float32 of the larger of two terms, in another order
    np.testing.assert_allclose(one.values().numpy(), wanted, rtol=0, atol=2**-22 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", TYPES)
def test_what_was_trained_is_what_is_stored_up_to_float16(kind):
    one = of_type(kind, weight())
    one.begin_at(torch.from_numpy(weight()))
    before = one.values()
    gradient = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 512)).astype(np.float32))
    for _ in range(300):
        one.learn(one.values(), gradient, 1.0)
    wanted = one.values().numpy()
    found = blocks.decode(kind, one.settle()[trained.BLOCKS])
    assert not np.array_equal(wanted, before.numpy())
    # The scale is rounded to 11 bits; of types with an offset either term is, the larger several times w.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=8 * 2**-11 * np.abs(wanted).max())
    assert torch.equal(one.values(), of_stored(kind, one).values())
    assert (one.grid is None) == (codes.levels(kind, one._blocks) is None)


def of_stored(kind: str, one: Blocks) -> Blocks:
    return Blocks("w", nothing, kind, one._blocks, torch.device("cpu"))


def test_what_has_no_float16_scale_keeps_its_scales():
    one = of_type("MXFP4", weight())
    before = one.step.clone()
    for _ in range(20):
        one.learn(one.values(), torch.ones(4, 512), 1.0)
    one.settle()
    assert torch.equal(one.step, before)


def test_a_codes_number_begins_within_its_cell_where_the_weight_is():
    w = weight()
    one = int4(w)
    rounded = one.codes().clone()
    one.begin_at(torch.from_numpy(w + 10 * (np.arange(512) % 7 == 0).astype(np.float32)))
    assert torch.equal(one.codes(), rounded)
    inside = torch.from_numpy(np.arange(512) % 7 != 0)
    wanted = torch.from_numpy(w).unflatten(1, (16, -1)) / one.step.unsqueeze(-1)
    assert (one.numbers - wanted.flatten(1))[:, inside].abs().max() < 0.04  # ends of cells, BF16 scales
    assert torch.allclose((one.numbers - rounded)[:, ~inside].abs(), torch.tensor(trained.WITHIN))


def test_a_step_is_as_long_for_every_code_and_none_leaves_the_grid():
    one = int4(weight())
    begun = one.numbers.clone()
    gradient = torch.full((4, 512), 1e-9) * torch.arange(1, 5).unsqueeze(1)  # rows that matter 1 to 4 times as much
    one.learn(one.values(), gradient / one.step.repeat_interleave(32, 1), 1.0)
    torch.testing.assert_close(begun - one.numbers, torch.full((4, 512), trained.RATE), rtol=1e-3, atol=0)
    for _ in range(20_000):
        one._learn_codes(gradient.clone(), 1.0, 1.0)
    assert one.numbers.min() == -8 - trained.WITHIN
    assert one.settle()["weight_packed"].view(np.uint32).max() == 0


def test_a_tables_codes_are_its_values():
    grid = Grid(-10, 10, torch.tensor([-10.0, -1.0, 0.0, 10.0]))
    assert grid.nearest(torch.tensor([-99.0, -5.6, -5.4, -0.4, 4.9, 5.1])).tolist() == [-10, -10, -1, 0, 0, 10]


def test_a_norm_is_trained_by_factors():
    one = Plain("n", nothing, torch.tensor([2.0, -4.0, 1.0]), is_bf16=True)
    one.learn(one.values(), torch.tensor([[1.0, 1.0, 0.0]]), 1.0)
    # The first step of Adam's is a whole one: down where the value is above 0, up in size where it is below.
    factors = torch.tensor([-1e-3, 1e-3, 0.0]).exp()
    assert torch.allclose(one.values(), torch.tensor([[2.0, -4.0, 1.0]]) * factors)


def test_gradients_are_those_of_the_whole_model(wordy, monkeypatch):
    """Layer by layer, and by rows of the vocabulary's distributions: as of one graph."""
    monkeypatch.setattr(whole, "ROWS", 48)
    chosen = recipe.builtin("int4-pure", method="rtn", group_size=32)
    checkpoint = open_checkpoint(wordy)
    plan = make_plan(checkpoint, chosen, for_targets=("transformers",))
    loader = Loader(checkpoint, LoadOptions(torch.float32, weight_only=True))
    rope = Rope(checkpoint.config, torch.device("cpu")).table(torch.arange(32))

    def stored(entry):
        made = CODECS[entry.scheme].encode([checkpoint.encodable(entry.weight)], method="rtn")
        return made[0] if entry.scheme != "bf16" else checkpoint.arrays(entry.weight)

    model = whole.whole_model(loader, rope, [e.spec for e in plan.entries], of_folder(plan.entries, stored))
    ids = torch.from_numpy(np.random.default_rng(0).integers(3, 4096, (5, 32)))
    x = loader.ends().embed(ids)
    for index in range(checkpoint.config.num_hidden_layers):
        x, _ = loader.layer(index)(x, rope)
    assert model.divergence(ids, x) > 1e-4

    values = {one.name: one.values().requires_grad_() for one in model.trained}
    for one in model.trained:
        one.put(values[one.name])
    out = model.behind.ends.embed(ids)
    for layer in model.layers:
        out, _ = layer(out, rope)
    loss = model.behind.rows_divergence(out.flatten(0, 1), x.flatten(0, 1)) / ids.numel()
    assert loss.item() == pytest.approx(model.divergence(ids, x), rel=1e-5)
    wanted = dict(zip(values, torch.autograd.grad(loss, list(values.values()), allow_unused=True), strict=True))
    found = {}
    monkeypatch.setattr(trained.Trained, "learn", lambda one, _, gradient, share: found.update({one.name: gradient}))
    model.learn(ids, x, 1.0)
    assert found.keys() == {name for name, gradient in wanted.items() if gradient is not None}
    assert len(found) > 20
    for name, gradient in found.items():
        # sums of 160 float32 products in another order
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * wanted[name].abs().max().item())
