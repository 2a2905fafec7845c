"""What keeps the codes of a quantized source is loaded by transformers bit for bit."""

from __future__ import annotations

import json

import tiny
import torch
from test_sources import WIDE, with_powers_of_two, write_blocks
from test_transformers import load, their_weight

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.planning import recipe
from dsv2quant.planning.consumers import TARGETS
from dsv2quant.planning.plan import make_plan


def test_scales_that_are_declared_powers_of_two(tmp_path):
    """transformers then holds them in e8m0, whatever dtype they have in the file."""
    stored, _ = with_powers_of_two(tiny.write_checkpoint(tmp_path / "wide", WIDE))
    model = write_blocks(tmp_path / "model", stored, torch.float8_e8m0fnu, scale_fmt="ue8m0")
    out = tmp_path / "out"
    plan = make_plan(open_checkpoint(model), recipe.builtin("fp8-block"), for_targets=TARGETS)
    convert(plan, out, command="")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["scale_fmt"] == "ue8m0"
    assert sum(entry.is_kept for entry in plan.entries) > 10
    state, checkpoint = load(out, torch.bfloat16, False).state_dict(), open_checkpoint(out)
    for weight in checkpoint.weights:
        ours = checkpoint.decode(weight, torch.bfloat16)
        assert torch.equal(their_weight(state, weight.spec.name), ours), weight.spec.name
