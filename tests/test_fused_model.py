"""The kernels' runtime on the CPU, where the kernels' torch references take their place, against the torch backend: the
same checkpoint must give the same logits. tests/gpu has the kernels themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import static
import tiny
import torch
from safetensors.torch import load_file, save_file

from dsv2quant.arch.deepseek_v2 import SEQUENCE_CLASSIFICATION
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import UsageError
from dsv2quant.model import fused
from dsv2quant.model.cache import KV_DTYPES
from dsv2quant.model.completion import open_model
from dsv2quant.model.experts import Int4Stack
from dsv2quant.model.fused_model import FusedModel
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe

pytestmark = pytest.mark.usefixtures("one_thread")

V2 = tiny.GROUPED_V2 | {"attention_bias": True, "norm_topk_prob": True}
# What llama.cpp takes, with dsv2-mini's tokenizer; blocks fit both halves of kv_b_proj.
BLOCKS = tiny.GROUPED_V2 | {"hidden_size": 256, "vocab_size": 4096, "qk_nope_head_dim": 32}
HEADS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}  # of published models
CONFIGS = {
    "lite": tiny.LITE, "v2": tiny.V2, "biases": V2, "tied": tiny.LITE | {"tie_word_embeddings": True},
    "awkward": tiny.AWKWARD | {"first_k_dense_replace": 1}, "grouped": tiny.GROUPED, "blocks": BLOCKS,
    "no shared experts": tiny.LITE | {"n_shared_experts": None},
    "one expert a token": tiny.LITE | {"num_experts_per_tok": 1, "first_k_dense_replace": 0},
    "llama": tiny.LLAMA | {"intermediate_size": 256},
    "llama's biases": tiny.LLAMA | {"attention_bias": True, "tie_word_embeddings": True},
    "deepseek-moe": tiny.DEEPSEEK_MOE, "plain v2": tiny.PLAIN_V2,
    "v3": tiny.V3, "glm4 turned by halves": tiny.GLM4 | {"rope_interleave": False},
    "lite's heads": tiny.LITE | HEADS, "v2's heads": tiny.V2 | HEADS,
    "heads turned by halves": tiny.GLM4 | {"rope_interleave": False} | HEADS,
}  # fmt: skip
INT4 = ("--method", "rtn", "--group-size", "32")
# Float32 roundings, and sums in another order: see test_runtime.TOLERANCE.
TOLERANCE = 1e-5
# Roundings put a value on the other side of a tie between two codes now and then. What that does must be small beside
# what quantizing activations does at all: of KL divergences, whose roots are distances, this part.
TIES = 0.1


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: tiny.write_checkpoint(folder / name, config) for name, config in CONFIGS.items()}


@pytest.fixture
def converted(sources, tmp_path, cli) -> Callable[..., Path]:
    """converted("lite", "--fp8=block") → an artifact."""

    def convert(source: str, *options: str, name: str = "out") -> Path:
        ran = cli("convert", sources[source], *options, "-o", tmp_path / name, "-q")
        assert ran.code == 0, ran.err
        return tmp_path / name

    return convert


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Change a checkpoint's tensors in place."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return folder


def opened(folder: Path, **options: Any) -> tuple[Model, FusedModel]:
    """On both backends."""
    checkpoint = open_checkpoint(folder)
    found = open_model(checkpoint, LoadOptions(backend="kernels", **options))
    assert isinstance(found, FusedModel)
    return Model(checkpoint, LoadOptions(**options)), found


def tokens_for(model: Model, rows: int = 2, length: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, model.config.vocab_size, (rows, length), generator=generator)


@torch.inference_mode()
def through(model: Model | FusedModel, tokens: torch.Tensor, decoded: bool) -> tuple[torch.Tensor, list]:
    """Logits of all positions, and of each layer the chosen experts in order: by prefill, or token by token."""
    rows, length = tokens.shape
    x, rope, chosen = model.ends.embed(tokens), model.rope(0, length), []
    for i, layer in enumerate(model.layers()):
        x, experts = layer.decoded(x, rope, model.cache(i, rows, length)) if decoded else layer(x, rope)
        chosen.append(None if experts is None else experts.reshape(rows * length, -1).sort(1).values)
    return model.ends.logits(x), chosen


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean KL divergence, nats a token."""
    p, q = (x.double().log_softmax(-1) for x in (a, b))
    return float((p.exp() * (p - q)).sum(-1).mean())


def check_same(folder: Path, rows: int = 2, length: int = 9) -> tuple[Model, FusedModel]:
    """For weights alone, up to roundings."""
    theirs, ours = opened(folder)
    tokens = tokens_for(theirs, rows, length)
    for decoded in (False, True):
        (want, of_want), (got, of_got) = (through(model, tokens, decoded) for model in (theirs, ours))
        assert error(got, want) < TOLERANCE
        for a, b in zip(of_got, of_want, strict=True):
            assert a is b or torch.equal(a.long(), b)
    return theirs, ours


def check_near(folder: Path, length: int = 9) -> tuple[Model, FusedModel]:
    """With quantized activations, up to ties."""
    theirs, ours = opened(folder)
    tokens = tokens_for(theirs, 2, length)
    plain, _ = through(Model(open_checkpoint(folder), LoadOptions(weight_only=True)), tokens, False)
    for decoded in (False, True):
        want, got = (through(model, tokens, decoded)[0] for model in (theirs, ours))
        assert divergence(want, got) < TIES * divergence(want, plain)
    return theirs, ours


@pytest.mark.parametrize("name", ["lite's heads", "v2's heads", "heads turned by halves"])
def test_prompts_as_on_hopper(name, sources, monkeypatch):
    """By the attention that takes heads of these widths there, behind none and behind earlier tokens."""
    asked = []
    monkeypatch.setattr(fused, "is_served", lambda *given: asked.append(given[:3]) or True)
    model, ours = check_same(sources[name])
    assert set(asked) == {(128, 64, 128)}
    tokens = tokens_for(model)
    caches = ours.caches(len(tokens), 16)
    for part in tokens.split([4, 5], 1):
        logits = ours.next_logits(part, caches)
    assert error(logits, model.forward(tokens)[:, -1]) <= TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_weights(name, sources):
    check_same(sources[name], *((1, 4) if name == "awkward" else ()))


@pytest.mark.parametrize("source", ["grouped", "biases", "llama"])
@pytest.mark.parametrize("format_", ["compressed-tensors", "gptq"])
def test_int4(source, format_, converted):
    check_same(converted(source, "--int4=pure", *INT4, "--format", format_))


def test_awq_experts_beside_plain_layers(converted):
    check_same(converted("grouped", "--int4=experts", *INT4, "--format", "awq"))


@pytest.mark.parametrize("format_", ["gptq", "awq"])
def test_zero_points(format_, converted):
    """Of every weight but the first expert's: its stack needs room for them later. And scales that BF16 does not hold,
    as others' files have."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if name.endswith("qzeros") and ".experts.0." not in name:
                tensors[name] = torch.randint(-(2**31), 2**31, tensor.shape, generator=generator, dtype=torch.int32)
            elif name.endswith(".scales"):
                tensors[name] = tensor * 1.001

    options = ("--int4=pure",) if format_ == "gptq" else ("--int4=experts",)
    _, ours = check_same(edit(converted("grouped", *options, *INT4, "--format", format_), change))
    stack = next(layer for i, layer in enumerate(ours.layers()) if i == 1).ffn.experts.weights
    assert len(set(stack.down.zeros.flatten().tolist())) > 8


def test_columns_ordered_by_activation(converted):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, group in tensors.items():
            if name.endswith("g_idx") and ".experts." not in name:
                tensors[name] = group[torch.randperm(len(group), generator=torch.Generator().manual_seed(len(group)))]

    check_same(edit(converted("biases", "--int4=pure", *INT4, "--format", "gptq"), change))


@pytest.mark.parametrize("scheme", ["Q8_0", "Q4_0", "Q5_1", "Q4_K_M"])
def test_gguf(scheme, converted):
    pytest.importorskip("gguf")
    check_same(converted("blocks", "--gguf", scheme, name="out.gguf"), length=5)


@pytest.mark.parametrize("scheme", ["block", "channel", "tensor"])
@pytest.mark.parametrize("source", ["lite", "biases", "awkward", "llama"])
def test_fp8(source, scheme, converted):
    target = ["--target=transformers"] * (scheme == "block")  # vLLM has no ragged blocks
    check_near(converted(source, f"--fp8={scheme}", *target), length=3 if source == "awkward" else 9)


@pytest.mark.parametrize(
    ("source", "activation", "options"),
    [("grouped", "token-int8", ["--int8"]), ("biases", "token", ["--w4a8", "--method=rtn", "--target=transformers"])],
)
def test_schemes_without_a_kernel_are_decoded_and_their_activations_rounded(source, activation, options, converted):
    _, ours = check_near(converted(source, *options))
    assert all(layer.attention.qkv_a.linears[0].activation == activation for layer in ours.layers())
    if activation == "token-int8":
        stacks = [layer.ffn.experts for i, layer in enumerate(ours.layers()) if i]
        assert all(stack.activation == activation for stack in stacks)


def test_fp8_weights_alone(converted):
    """A configuration may leave activations as they are: the weights are decoded then."""
    out = converted("lite", "--fp8=channel")
    raw = json.loads((out / "config.json").read_text())
    for group in raw["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    (out / "config.json").write_text(json.dumps(raw))
    _, ours = check_same(out)
    assert all(layer.attention.o.quantization.granularity is None for layer in ours.layers())


@pytest.mark.parametrize("scheme", ["fp8-static", "fp8-autofp8"])
@pytest.mark.parametrize("source", ["lite", "biases"])
def test_static_activations(source, scheme, sources, tmp_path):
    """Every expert has input scales of its own."""
    static.write(sources[source], tmp_path / "out", scheme)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("input_scale") and ".experts." in name:
                tensors[name] = tensors[name] * (1 + int(name.split(".experts.")[1].split(".")[0]) / 8)

    _, ours = check_near(edit(tmp_path / "out", change))
    *_, layer = ours.layers()
    assert all(len(set(scales.tolist())) > 4 for scales in layer.ffn.experts.inputs)


@pytest.mark.parametrize("scheme", ["--int4=mixed", "--int3=mixed", "--int2=mixed"])
def test_packed_experts_beside_fp8(scheme, converted):
    _, ours = check_near(converted("biases", scheme, *INT4))
    assert isinstance([*ours.layers()][-1].ffn.experts, Int4Stack)


@pytest.mark.parametrize("scheme", ["--int3=experts", "--int2=experts"])
def test_experts_of_few_bits(scheme, converted):
    check_same(converted("grouped", scheme, *INT4))


MIXED = """
name: mixed
rules:
  - {roles: [embed, lm_head, router, norm, bias, kv_b_proj], scheme: bf16}
  - {roles: [%s], scheme: %s}
  - {roles: ["*"], scheme: %s}
"""


@pytest.fixture
def mixed(sources, tmp_path, monkeypatch) -> Callable[[str, str, str], Path]:
    """mixed("q_a_proj", "fp8-channel", "fp8-static") → an artifact of biases: of a role by one scheme, of all others by
    another. Engines that fuse layers would not load it."""

    def convert(roles: str, scheme: str, others: str) -> Path:
        monkeypatch.setitem(static.RECIPES, "mixed", recipe.parse(MIXED % (roles, scheme, others), "mixed"))
        static.write(sources["biases"], tmp_path / "mixed", "mixed", for_targets=["transformers"])
        return tmp_path / "mixed"

    return convert


@pytest.mark.parametrize("schemes", [("fp8-channel", "fp8-static"), ("fp8-static", "fp8-channel")])
def test_experts_that_want_other_codes_than_the_shared_ones(schemes, mixed):
    check_near(mixed("'routed.*'", *schemes))


@pytest.mark.parametrize("scheme", ["fp8-static", "int4-g32", "bf16"])
def test_layers_of_one_input_that_differ_are_not_joined(scheme, mixed):
    _, ours = check_near(mixed("q_a_proj", scheme, "fp8-channel"))
    for layer in ours.layers():
        assert len(layer.attention.qkv_a.linears) == 2
        assert layer.attention.qkv_a.quantization.granularity is None
    assert len(layer.ffn.shared.gate_up.linears) == 1


@pytest.mark.parametrize("kind", ["float32", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("name", ["lite", "biases", "llama"])
def test_generation(name, kind, sources):
    """A prompt in two parts, then steps, through a cache of another dtype, too."""
    models = opened(sources[name], kv_cache=KV_DTYPES[kind])
    tokens = tokens_for(models[0], length=14)
    rows, stores = [], []
    for model in models:
        caches = model.caches(2, 14)
        model.next_logits(tokens[:, :4], caches)
        found = [model.next_logits(tokens[:, 4:9], caches)]
        decode = model.decoder(caches)
        found += [decode(token).clone() for token in tokens[:, 9:].unbind(1)]
        assert [cache.length for cache in caches] == [14] * len(caches)
        rows.append(torch.stack(found))
        stores.append(torch.stack([cache.store.double() for cache in caches]))
        with pytest.raises(ValueError, match="the cache holds 14 tokens, 15 were asked for"):
            decode(tokens[:, 0])
    # A code of the cache may round to its neighbour, 2^-3 or 2^-2 of it away.
    flips = float((stores[1] != stores[0]).double().mean())
    assert error(stores[1], stores[0]) < TOLERANCE if kind == "float32" else flips < 1e-3
    assert error(rows[1], rows[0]) < (TOLERANCE if kind == "float32" or not flips else 1e-2)
    alone = through(models[0], tokens, False)[0][:, 8:].transpose(0, 1)
    assert (error(rows[1], alone) < TOLERANCE) is (kind == "float32")


@pytest.mark.parametrize("name", ["biases", "llama"])
def test_a_cache_has_the_scales_of_its_layer(name, sources, tmp_path):
    static.write(sources[name], tmp_path / "out", "fp8-static", kv=5.0)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for scale in tensors:
            if scale.endswith("v_scale"):
                tensors[scale] = tensors[scale] * 3

    theirs, ours = opened(edit(tmp_path / "out", change), kv_cache=torch.float8_e4m3fn)
    scales = [model.caches(1, 1)[0].scale.tolist() for model in (theirs, ours)]
    assert scales[0] == scales[1]
    assert scales[0] != [1.0]
    assert len(set(scales[0])) == (2 if name == "llama" else 1)
    tokens = tokens_for(theirs)
    want, got = (through(model, tokens, True)[0] for model in (theirs, ours))
    scaled = through(opened(tmp_path / "out")[0], tokens, True)[0]
    assert divergence(want, got) < TIES * divergence(scaled, want)


@pytest.mark.parametrize("heads", [{"num_attention_heads": 32, "num_key_value_heads": 1}, {"head_dim": 272}])
def test_heads_that_no_kernel_takes_are_refused(heads, tmp_path):
    with pytest.raises(UsageError, match=r"heads of .* share keys and values: no kernel takes that"):
        opened(tiny.write_checkpoint(tmp_path / "m", tiny.LLAMA | heads))


def test_streaming_is_the_same(sources):
    checkpoint = open_checkpoint(sources["lite"])
    options = LoadOptions(backend="kernels")
    resident, streamed = (open_model(checkpoint, options, stream=stream) for stream in (False, True))
    tokens = tokens_for(resident)
    assert torch.equal(through(resident, tokens, False)[0], through(streamed, tokens, False)[0])


def test_a_classifier_has_its_own_head(tmp_path):
    config = tiny.LITE | {"architectures": [SEQUENCE_CLASSIFICATION], "num_labels": 5}
    _, ours = check_same(tiny.write_checkpoint(tmp_path / "m", config))
    assert ours.ends.head(torch.zeros(1, 64)).shape == (1, 5)
