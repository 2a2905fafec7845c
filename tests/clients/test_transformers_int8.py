"""INT8 W8A8 and W4A8 artifacts as transformers loads them: the same weights bit for bit, and the logits of our runtime.

By default activations of `nn.Linear` modules are quantized, those of routed experts are not. INT8 activations have
compressed-tensors' scale, 1 / 127.5 of a token's largest, where vLLM and our runtime have 1 / 127.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from test_transformers import DTYPES, like_transformers, load, their_weight
from test_transformers_int4 import apart, their_logits

from dsv2quant.arch.spec import LINEAR_ROLES
from dsv2quant.checkpoint.checkpoint import Checkpoint, HfCheckpoint
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.model.layers import Linear, Served
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan

SCHEMES = {"int8": "int8-channel", "w4a8": "w4a8-g128"}
MODES = [(name, dtype, dequantize) for name in SCHEMES for dtype in DTYPES for dequantize in (False, True)]
# Every linear has columns for groups of 128: with several groups `dequantize=True` takes the first for all linears.
WIDE = tiny.GROUPED_V2 | {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128,
    "v_head_dim": 32,
}  # fmt: skip
INT8 = QuantizationArgs(num_bits=8, type="int", strategy="token", symmetric=True, dynamic=True)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A folder that holds one of each name, and the `source`."""
    folder = tmp_path_factory.mktemp("artifacts")
    source = tiny.write_checkpoint(folder / "source", WIDE)
    for name in SCHEMES:
        method = "rtn" if name == "w4a8" else None
        plan = make_plan(open_checkpoint(source), recipe.builtin(name, method=method), for_targets=("transformers",))
        convert(plan, folder / name, command="")
    return folder


class TheirInt8(Linear):
    """A linear whose activations are quantized to INT8 as compressed-tensors does: with one scale per token, or, of
    kv_b_proj, whose input has four dimensions there, per sequence."""

    def __init__(self, linear: Linear, per_sequence: bool) -> None:
        super().__init__(linear.weight, linear.bias)
        self.per_sequence = per_sequence

    def __call__(self, x: torch.Tensor | Served) -> torch.Tensor:
        x = x.x if isinstance(x, Served) else x
        kept = (len(x), 1, -1) if self.per_sequence else (*x.shape[:-1], -1)
        rows = x.reshape(kept)
        scales, zeros = calculate_qparams(rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True), INT8)
        served = fake_quantize(rows, scales, zeros, INT8).view(x.shape)
        return Linear(self.weight.to(x.dtype), self.bias)(served)


def served_as_theirs(checkpoint: Checkpoint, options: LoadOptions) -> Model:
    """The runtime with transformers' activations."""
    model = like_transformers(checkpoint, options)
    for layer in model.layers():
        for holder in (layer.attention, getattr(layer.ffn, "shared", layer.ffn)):
            for name, linear in list(vars(holder).items()):
                if isinstance(linear, Linear) and (linear.activation or "").endswith("-int8"):
                    setattr(holder, name, TheirInt8(linear, linear.activation == "sequence-int8"))
    return model


@pytest.mark.parametrize(("name", "dtype", "dequantize"), MODES)
def test_weights_are_our_decode_and_logits_our_runtimes(name, dtype, dequantize, artifacts, one_library, monkeypatch):
    checkpoint, torch_dtype = open_checkpoint(artifacts / name), DTYPES[dtype]
    dense = {w.scheme for w in checkpoint.weights if w.spec.role in LINEAR_ROLES and w.spec.expert is None}
    assert dense - {"bf16"} == {SCHEMES[name]}
    theirs = load(checkpoint.folder, torch_dtype, dequantize)
    tokens, want = their_logits(theirs, checkpoint)
    state = theirs.state_dict()  # after the first forward pass, which is when compressed-tensors decompresses
    for weight in checkpoint.weights:
        # They multiply in the scales' dtype, ours in BF16, where no parameter of the model's dtype holds them.
        routed = weight.spec.role.startswith("routed.")
        in_bf16 = (dequantize or routed) and weight.scheme in SCHEMES.values()
        got = their_weight(state, weight.spec.name)
        ours = checkpoint.decode(weight, torch.bfloat16 if in_bf16 else torch_dtype)
        assert torch.equal(got, ours.to(got.dtype)), weight.spec.name

    if torch_dtype == torch.bfloat16:  # sums of any order are rounded: each side moves as far as the rounding does
        got = served_as_theirs(checkpoint, LoadOptions(torch_dtype, "cpu", dequantize)).forward(tokens)
        exact = served_as_theirs(checkpoint, LoadOptions(weight_only=dequantize)).forward(tokens)
        assert apart(got, want).median() < 2 * apart(want, exact).median()

    # The same weights in float32, theirs and ours: now sums in another order are all that differs. Quantized
    # activations flip a code or two in a sequence now and then, which the median passes over.
    def same(_, weight, dtype, *rest):
        return their_weight(state, weight.spec.name).to(dtype)

    monkeypatch.setattr(HfCheckpoint, "decode", same)
    ours = served_as_theirs(checkpoint, LoadOptions(weight_only=dequantize)).forward(tokens)
    with torch.inference_mode():
        float32 = torch.nn.Module.float(theirs)(tokens).logits  # transformers' own .float() refuses quantized models
    different = apart(ours, float32)
    assert (different.max() if dequantize else different.median()) < 1e-5


def test_its_loader_finds_no_int8_experts(artifacts, tmp_path):
    """What planning/consumers.py says of it: the row may go where this fails."""
    source = artifacts / "source"
    plan = make_plan(open_checkpoint(source), recipe.builtin("int8"), for_targets=("vllm",))
    convert(plan, tmp_path / "out", command="")
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        load(tmp_path / "out", torch.bfloat16, dequantize=False)
