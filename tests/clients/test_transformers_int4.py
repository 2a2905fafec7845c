"""INT4, INT3 and INT2 as transformers loads them: the same weights bit for bit, and on these our runtime's logits.

transformers stores every part as the checkpoint does and multiplies in the scales' dtype, BF16. By default the linears
it keeps as modules follow the model's dtype; routed experts, and with `dequantize=True` all INT4, are the BF16-rounded
product whatever dtype is asked for. Where experts stay BF16 in a float32 model, it also computes them in BF16.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from test_transformers import DTYPES, like_transformers, load, their_weight

from dsv2quant.calib.calibration import Calibration, Tuning
from dsv2quant.checkpoint.checkpoint import Checkpoint, HfCheckpoint, Weight
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.model.layers import Linear, MoE, Served
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan

# name: (recipe, group size, method). 704 and 10944 columns hold no groups of 128: "two sizes" has them in 64.
ARTIFACTS = {
    "pure": ("int4-pure", 64, "rtn"),
    "channel": ("int4-pure", 0, "rtn"),
    "two sizes": ("int4-pure", 128, "rtn"),
    "experts": ("int4-experts", 64, "rtn"),
    "mixed": ("int4-mixed", 64, "rtn"),
    "folded": ("int4-pure", 64, "awq"),
    "tuned": ("int4-pure", 64, "rtn"),
    "INT3": ("int3-mixed", 32, "mse"),
    "INT2": ("int2-experts", 64, "mse"),
}
# `dequantize=True` takes one group of the configuration for all linears but experts: not for two sizes.
MODES = [
    (name, dtype, dequantize)
    for name in ARTIFACTS
    for dtype in DTYPES
    for dequantize in ((False,) if name == "two sizes" else (False, True))
]
mode_ids = [f"{name}-{dtype}{'-dequantize' * dequantize}".replace(" ", "-") for name, dtype, dequantize in MODES]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, awkward):
    """{(source, artifact): folder}."""
    folder = tmp_path_factory.mktemp("artifacts")
    tokens = Calibration(np.random.default_rng(0).integers(2, 150, (8, 64)), "random", "", 0, [])
    made = {}
    for source, path in (("mini", tiny.MINI), ("awkward", awkward)):
        for name, (asked, group_size, method) in ARTIFACTS.items():
            out = folder / f"{source}-{name.replace(' ', '-')}"
            chosen = recipe.builtin(asked, method=method, group_size=group_size)
            plan = make_plan(open_checkpoint(path), chosen, for_targets=("vllm", "transformers"))
            assert len(plan.schemes) == (2 if name in ("two sizes", "mixed", "INT3") else 1)
            tuning = Tuning(replace(tokens, ids=tokens.ids.reshape(32, 16)), 512) if name == "tuned" else None
            held_out = iter((1.0, 0.5))  # so few tokens say nothing of others
            with pytest.MonkeyPatch.context() as m:
                m.setattr("dsv2quant.calib.tuning.STEP_TOKENS", 32)
                m.setattr("dsv2quant.calib.tuning._held_out", lambda whole, tokens, held_out=held_out: next(held_out))
                found = convert(plan, out, command="", calibration=None if method == "rtn" else tokens, tuning=tuning)
            assert found.tuned is None or found.tuned["accepted"]
            made[source, name] = out
    return made


def dtype_there(weight: Weight, dtype: torch.dtype, dequantize: bool) -> torch.dtype:
    """What transformers rounds a weight to."""
    int4, routed = weight.scheme.startswith("int"), weight.spec.role.startswith("routed.")
    return torch.bfloat16 if int4 and (routed or dequantize) else dtype


class InBf16(Linear):
    """A routed expert's linear as transformers computes it on BF16 weights, in a float32 model too."""

    def __call__(self, x: torch.Tensor | Served) -> torch.Tensor:
        return super().__call__((x.x if isinstance(x, Served) else x).to(torch.bfloat16))


def experts_in_bf16(model: Model) -> Model:
    for layer in model.layers():
        for expert in layer.ffn.experts if isinstance(layer.ffn, MoE) else []:
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(expert, name, InBf16(getattr(expert, name).weight.to(torch.bfloat16)))
    return model


def apart(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Relative differences of the logits [batch, tokens]."""
    return (got.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1)


def their_logits(theirs: torch.nn.Module, checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [16, 4] and their logits. Many short sequences: a router's choice or a code that falls the other way
    spoils only its own."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, checkpoint.config.vocab_size, (16, 4), generator=generator)
    with torch.inference_mode():
        return tokens, theirs(tokens).logits


@pytest.mark.parametrize("source", ["mini", "awkward"])
@pytest.mark.parametrize(("name", "dtype", "dequantize"), MODES, ids=mode_ids)
def test_weights_are_our_decode_and_logits_our_runtimes(source, name, dtype, dequantize, artifacts, monkeypatch):
    checkpoint, torch_dtype = open_checkpoint(artifacts[source, name]), DTYPES[dtype]
    theirs = load(checkpoint.folder, torch_dtype, dequantize)
    tokens, want = their_logits(theirs, checkpoint)
    state = theirs.state_dict()  # after the first forward pass, which is when compressed-tensors decompresses
    served = name in ("mixed", "INT3") and not dequantize
    # Loaded by default, compressed-tensors keeps FP8 scales in parameters of the model's dtype. INT4's are BF16 anyway.
    scale_dtype = torch.bfloat16 if served and torch_dtype == torch.bfloat16 else None
    for weight in checkpoint.weights:
        fp8 = weight.scheme.startswith("fp8")
        rounded = dtype_there(weight, torch_dtype, dequantize)
        ours = checkpoint.decode(weight, rounded, scale_dtype=scale_dtype if fp8 else None)
        got = their_weight(state, weight.spec.name)
        assert got.dtype == (torch_dtype if dequantize and not weight.spec.role.startswith("routed.") else rounded)
        assert torch.equal(got, ours.to(got.dtype)), weight.spec.name

    options = LoadOptions(torch_dtype, "cpu", not served, scale_dtype)
    got = experts_in_bf16(like_transformers(checkpoint, options)).forward(tokens)
    exact = like_transformers(checkpoint, LoadOptions(weight_only=not served)).forward(tokens)  # in float32
    if torch_dtype == torch.bfloat16:  # sums of any order are rounded: each side moves as far as the rounding does
        assert apart(got, want).median() < 2 * apart(want, exact).median()
    elif not dequantize:
        # A sum of K products in another order crosses a rounding boundary of BF16 in about √K · 2^-24 / 2^-8 of all
        # outputs, 2^-12, and moves 2^-8: of the experts' output √2^-12 · 2^-8 = 6e-5, in each of three layers.
        assert apart(got, want).median() < 3e-4

    # The same weights in float32, theirs and ours: now sums in another order are all that differs. Quantized
    # activations flip a code or two in a sequence now and then, which the median passes over.
    def same(_, weight, dtype, *rest):
        return their_weight(state, weight.spec.name).to(dtype)

    monkeypatch.setattr(HfCheckpoint, "decode", same)
    ours = like_transformers(checkpoint, LoadOptions(weight_only=not served)).forward(tokens)
    with torch.inference_mode():
        float32 = torch.nn.Module.float(theirs)(tokens).logits  # transformers' own .float() refuses quantized models
    different = apart(ours, float32)
    assert (different.median() if served else different.max()) < 1e-5


def test_gptq_and_awq_would_find_no_expert_to_load():
    # Both replace Linear modules (integrations/awq.py; optimum for GPTQ), and experts are none.
    from transformers import DeepseekV2ForCausalLM

    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(tiny.transformers_config(tiny.LITE))
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert "model.layers.1.mlp.shared_experts.up_proj" in linear
    assert not [name for name in linear if ".mlp.experts" in name]
    assert model.model.layers[1].mlp.experts.down_proj.dim() == 3
