"""Every artifact is loaded by transformers, in each of its load modes: the same weights bit for bit, the same logits.

Modes: dtype float32 or bfloat16; compressed-tensors by default (activations of `nn.Linear` modules fake-quantized, not
those of routed experts, which transformers fuses) or with `dequantize=True`. Block FP8 is always dequantized without an
FP8 GPU; in float32 it must be loaded and then cast, because its unquantized modules stay in BF16.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open

from dsv2quant.arch.deepseek_v2 import SEQUENCE_CLASSIFICATION
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.identity import sampled
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.evaluation.divergence import Pass, batches_of, compare, negative_log_likelihoods, perplexity, run
from dsv2quant.model.layers import Linear, MoE, add_rows, dispatch, finish
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.consumers import TARGETS
from dsv2quant.planning.plan import make_plan
from dsv2quant.text.text import python_topics
from dsv2quant.text.tokenizer import Tokenizer, cut

# name: (recipe, targets). Tensor scales for every consumer are mixed with channel scales, for transformers alone not.
ARTIFACTS = {
    "block": ("fp8-block", TARGETS),
    "channel": ("fp8-channel", TARGETS),
    "tensor": ("fp8-tensor", TARGETS),
    "tensor for transformers": ("fp8-tensor", ("transformers",)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WINDOWS, LAYERS = 12, 4


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, awkward):
    """{(source, artifact): folder}."""
    folder = tmp_path_factory.mktemp("artifacts")
    made = {}
    for source, path in (("mini", tiny.MINI), ("awkward", awkward)):
        for name, (asked, targets) in ARTIFACTS.items():
            out = folder / f"{source}-{name.replace(' ', '-')}"
            convert(make_plan(open_checkpoint(path), recipe.builtin(asked), for_targets=targets), out, command="")
            made[source, name] = out
    return made


def load(folder, dtype: torch.dtype, dequantize: bool):
    """The artifact as transformers loads it."""
    import transformers
    from transformers.utils.quantization_config import CompressedTensorsConfig

    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra).eval()
    declared = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    return model.float() if declared.get("quant_method") == "fp8" and dtype == torch.float32 else model


def their_weight(state: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A weight under its checkpoint name; transformers stacks experts, gate before up."""
    if name in state:
        return state[name]
    prefix, _, rest = name.partition(".experts.")
    expert, leaf, _ = rest.split(".")
    if leaf == "down_proj":
        return state[f"{prefix}.experts.down_proj"][int(expert)]
    gate, up = state[f"{prefix}.experts.gate_up_proj"][int(expert)].chunk(2)
    return gate if leaf == "gate_proj" else up


MODES = [
    (name, dtype, dequantize)
    for name in ARTIFACTS
    for dtype in DTYPES
    for dequantize in ((False,) if name == "block" else (False, True))
]
mode_ids = [f"{name}-{dtype}{'-dequantize' * dequantize}".replace(" ", "-") for name, dtype, dequantize in MODES]


@pytest.mark.parametrize("source", ["mini", "awkward"])
@pytest.mark.parametrize(("name", "dtype", "dequantize"), MODES, ids=mode_ids)
def test_weights_are_our_decode_and_logits_our_runtimes(source, name, dtype, dequantize, artifacts, one_library):
    folder, torch_dtype = artifacts[source, name], DTYPES[dtype]
    theirs = load(folder, torch_dtype, dequantize)
    checkpoint = open_checkpoint(folder)
    vocabulary = checkpoint.config.vocab_size
    tokens = torch.randint(2, vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = theirs(tokens).logits.double()
    state = theirs.state_dict()  # after the first forward pass, which is when compressed-tensors decompresses
    # Loaded by default, compressed-tensors keeps scales in parameters of the model's dtype.
    rounds_scales = name != "block" and not dequantize and torch_dtype == torch.bfloat16
    for weight in checkpoint.weights:
        routed = weight.spec.role.startswith("routed.")
        scale_dtype = torch.bfloat16 if rounds_scales and not routed else None
        ours = checkpoint.decode(weight, torch_dtype, scale_dtype=scale_dtype)
        assert torch.equal(their_weight(state, weight.spec.name), ours), weight.spec.name

    served = name != "block" and not dequantize
    options = LoadOptions(torch_dtype, "cpu", not served, torch.bfloat16 if rounds_scales else None)
    got = like_transformers(checkpoint, options).forward(tokens).double()
    error = float((got - want).norm() / want.norm())
    if torch_dtype == torch.float32:
        # Weight-only: float32 sums in another order. Quantized activations: a last-place difference moves about one
        # in 10^6 codes by a step of 2^-3 or less, each time within a sum of hundreds: √1e-6 · 2^-4 ≈ 6e-5 a layer,
        # and a moved router choice where scores are that close.
        assert error < (1e-2 if served else 1e-5)
    else:
        exact = like_transformers(checkpoint, LoadOptions(weight_only=not served)).forward(tokens).double()
        assert error < 2 * float((want - exact).norm() / exact.norm())


def like_transformers(checkpoint: Checkpoint, options: LoadOptions | None = None) -> Model:
    """The runtime with transformers' departures from what engines do."""
    return Model(checkpoint, replace(options or LoadOptions(), serving="transformers"))


class TheirLogits:
    """Stands in for the runtime's ends: hidden states are positions, whose logits transformers computed."""

    def __init__(self, logits: torch.Tensor) -> None:
        self._logits = logits.flatten(0, 1)

    def logits(self, positions: torch.Tensor) -> torch.Tensor:
        return self._logits[positions[:, 0].long()]


def their_pass(model, ids: np.ndarray) -> Pass:
    with torch.inference_mode():
        logits = torch.cat([model(torch.from_numpy(part)).logits for part in np.array_split(ids, len(ids) // 4)])
    positions = torch.arange(ids.size).view(*ids.shape, 1)
    return Pass(TheirLogits(logits), positions, [None] * LAYERS)


@pytest.fixture(scope="module")
def scored():
    """(token windows, our pass and transformers' pass over BF16 dsv2-mini)."""
    tokenizer = Tokenizer.open(tiny.MINI)
    ids = cut(tokenizer.encode(python_topics().content), 512, tokenizer.bos_id, "default", "topics").ids[:WINDOWS]
    ours = run(Model(open_checkpoint(tiny.MINI)), ids, batches_of(WINDOWS, 4))
    return ids, ours, their_pass(load(tiny.MINI, torch.float32, False), ids)


def test_perplexity_of_dsv2_mini_is_transformers(scored):
    ids, ours, theirs = scored
    got = perplexity(negative_log_likelihoods(ours, ids, 0)).value
    want = perplexity(negative_log_likelihoods(theirs, ids, 0)).value
    assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_weight_only_kld_is_transformers(name, scored, artifacts):
    ids, ours, theirs = scored
    folder = artifacts["mini", name]
    model = Model(open_checkpoint(folder), LoadOptions(weight_only=True))
    got = compare(run(model, ids, batches_of(WINDOWS, 4)), ours, ids, 0).kld.mean()
    want = compare(their_pass(load(folder, torch.float32, name != "block"), ids), theirs, ids, 0).kld.mean()
    assert got == pytest.approx(want, abs=1e-4)
    assert got > 1e-3


@pytest.mark.parametrize("name", [name for name in ARTIFACTS if name != "block"])
def test_given_transformers_inputs_every_module_quantizes_and_sums_as_transformers(name, scored, artifacts):
    """Each module is given the very input that transformers' had, so that no code differs and float32 sums alone do."""
    folder = artifacts["mini", name]
    theirs, model = load(folder, torch.float32, False), like_transformers(open_checkpoint(folder))
    inputs, outputs, handles = {}, {}, []
    for path, module in theirs.named_modules():

        def seen(_, args, output, path=path):
            inputs[path], outputs[path] = args, output

        handles.append(module.register_forward_hook(seen))
    with torch.inference_mode():
        theirs(torch.from_numpy(scored[0][:2]))
        quantized, errors = 0, {}
        for path, ours in modules_of(model):
            got, want = ours(*inputs[path]), outputs[path]
            errors[path] = float((got - want).norm() / want.norm())
            quantized += isinstance(ours, Linear) and ours.activation is not None
    assert max(errors.values()) < 1e-5, max(errors, key=errors.__getitem__)
    assert quantized > 5 * LAYERS  # attention's, and gate, up and down of the dense or shared FFN


def modules_of(model: Model):
    """(transformers' name, ours) of linear layers and of the routed experts of an MoE: all that may quantize."""
    for index, layer in enumerate(model.layers()):
        prefix, ffn = f"model.layers.{index}", layer.ffn
        parts = {"self_attn": layer.attention, "mlp": ffn}
        if isinstance(ffn, MoE):
            parts = {"self_attn": layer.attention, "mlp.shared_experts": ffn.shared}
            yield f"{prefix}.mlp.experts", partial(routed, ffn)
        for part, holder in parts.items():
            for name, linear in vars(holder).items():
                if isinstance(linear, Linear):
                    yield f"{prefix}.{part}.{name}", linear


def routed(moe: MoE, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What the experts chosen [tokens, k] give for x [tokens, hidden]."""
    out = torch.zeros_like(x)
    for expert, rows, its_weights in dispatch(weights, chosen, len(moe.experts)):
        add_rows(out, rows, finish(moe.experts[expert].stages(x[rows])) * its_weights[:, None])
    return out


@pytest.mark.parametrize("name", [name for name in ARTIFACTS if name != "block"])
def test_kld_with_quantized_activations_is_transformers(name, scored, artifacts):
    ids, ours, theirs = scored
    folder = artifacts["mini", name]
    served = run(like_transformers(open_checkpoint(folder)), ids, batches_of(WINDOWS, 4))
    everywhere = run(Model(open_checkpoint(folder)), ids, batches_of(WINDOWS, 4))
    their_own = their_pass(load(folder, torch.float32, False), ids)
    got = compare(served, ours, ids, 0).kld.mean(1)  # by window
    want = compare(their_own, theirs, ids, 0).kld.mean(1)
    # A code near a tie rounds either way after a last-place difference, and which do depends on the processor. Each
    # flip moves the KLD up or down: the mean difference is noise, whose size the spread over windows tells. 6 standard
    # errors of 12 windows are passed once in 10,000 times.
    assert abs((got - want).mean()) < 6 * (got - want).std(ddof=1) / WINDOWS**0.5
    # Flips alone part us from transformers: to quantize the inputs of routed experts too would part us much further.
    flips, more = (compare(each, their_own, ids, 0).kld.mean() for each in (served, everywhere))
    assert 3 * flips < more


@pytest.mark.parametrize(
    "changes",
    [{"attention_bias": True}, {"architectures": [SEQUENCE_CLASSIFICATION], "pad_token_id": 2}],
    ids=["biases", "classifier"],
)
@pytest.mark.parametrize("asked", ["fp8-channel", "fp8-tensor"])
def test_biases_and_a_classifiers_head_load_too(changes, asked, tmp_path):
    import transformers
    from transformers.utils.quantization_config import CompressedTensorsConfig

    raw = tiny.V2 | changes
    model = tiny.write_checkpoint(tmp_path / "model", raw)
    convert(make_plan(open_checkpoint(model), recipe.builtin(asked)), tmp_path / "out", command="")
    loader = getattr(transformers, raw["architectures"][0])
    dequantize = CompressedTensorsConfig(dequantize=True)
    theirs = loader.from_pretrained(tmp_path / "out", dtype=torch.float32, quantization_config=dequantize).eval()
    tokens = torch.randint(3, 160, (2, 20))
    with torch.inference_mode():
        want = theirs(tokens).logits
    got = Model(open_checkpoint(tmp_path / "out"), LoadOptions(weight_only=True)).forward(tokens)
    got = got if want.dim() == 3 else got[:, -1]  # a classifier gives the score of the last token
    assert (got - want).norm() / want.norm() < 1e-5


def test_its_stacked_experts_are_the_same_model(tmp_path, lite):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(lite, dtype="auto")
    model.save_pretrained(tmp_path, save_original_format=False)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "model.layers.1.mlp.experts.gate_up_proj" in file.keys()  # noqa: SIM118 - it is no dictionary
    assert sampled(open_checkpoint(tmp_path)) == sampled(open_checkpoint(lite))
