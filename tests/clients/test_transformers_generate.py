"""Greedy tokens are those of transformers' own generate(), from the same weights in float32."""

from __future__ import annotations

import pytest
import tiny
import torch
from test_transformers import load

from dsv2quant.checkpoint.checkpoint import HfCheckpoint
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.model.completion import Sampling, generate
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan

PROMPTS = ([0, 1241, 975, 15, 507, 19, 1381, 655], [0, 77, 300, 2000], [0])
COUNT = 40
# Logits of up to 20 from float32 sums that differ by 1e-5 of their norm (see test_runtime): a tie is closer than this.
TIE = 20 * 1e-5


@pytest.mark.parametrize("name", ["bf16", "fp8-block", "int4-pure"])
def test_greedy_tokens_are_transformers(name, tmp_path, monkeypatch, one_thread):
    folder = tiny.MINI
    if name != "bf16":
        folder = tmp_path / "out"
        rtn = {"method": "rtn", "group_size": 64} if name == "int4-pure" else {}
        plan = make_plan(open_checkpoint(tiny.MINI), recipe.builtin(name, **rtn), for_targets=("transformers",))
        convert(plan, folder, command="")
    theirs = load(folder, torch.float32, dequantize=name == "int4-pure")
    with torch.inference_mode():
        theirs(torch.tensor([PROMPTS[0]]))  # the first pass is when compressed-tensors decompresses
    theirs = torch.nn.Module.float(theirs)

    decode = HfCheckpoint.decode

    def as_theirs(checkpoint, weight, dtype, *rest):
        """transformers rounds decoded INT4 to BF16, whatever dtype is asked for."""
        rounded = torch.bfloat16 if weight.scheme.startswith("int4") else dtype
        return decode(checkpoint, weight, rounded, *rest).to(dtype)

    monkeypatch.setattr(HfCheckpoint, "decode", as_theirs)
    ours = Model(open_checkpoint(folder), LoadOptions(weight_only=True))
    for prompt in PROMPTS:
        made = theirs.generate(
            torch.tensor([prompt]), do_sample=False, temperature=None, top_p=None, max_new_tokens=COUNT,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        want = made.sequences[0, len(prompt) :].tolist()
        got = list(generate(ours, prompt, stop={1}, max_new_tokens=COUNT, sampling=Sampling()))
        first = next((i for i, pair in enumerate(zip(got, want, strict=False)) if pair[0] != pair[1]), None)
        if first is None:
            assert got == want
            assert len(got) > 1
        else:  # from here on the texts are different ones
            logits = made.logits[first][0]
            assert logits.max() - logits[got[first]] < TIE
