"""GPTQ's and AWQ's layouts: packing bit for bit as others read it, scales that float16 and BF16 hold, and artifacts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_fp8 import as_float32, to_bf16
from test_gptq import inputs, moments_of, problem, textbook

from dsv2quant.calib import gptq
from dsv2quant.calib.calibration import Calibration
from dsv2quant.calib.choosing import choose
from dsv2quant.calib.distributed import ALONE
from dsv2quant.calib.gptq import Moments
from dsv2quant.calib.layer import Job
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.formats.codec import TooLargeError
from dsv2quant.formats.cpu import nearest_codes, rtn_scales
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.layers import Linear
from dsv2quant.model.load import Loader, LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan

GPTQ = ("gptq-g128", "gptq-g64", "gptq-g32", "gptq-channel")
AWQ = ("awq-g128", "awq-g64", "awq-g32")
FEWER = tuple(f"gptq{bits}-g{size}" for bits in (3, 2) for size in (128, 64, 32))
EXPERT = "model.layers.1.mlp.experts.2.down_proj"
NUMPY = {"I32": np.int32, "F16": np.float16}

# u[k, n] = (3k + 5n + kn) mod 16 for k, n < 16, as vLLM 0.33's quant_utils.py packs it: gptq_pack and awq_pack.
U = np.fromfunction(lambda k, n: (3 * k + 5 * n + k * n) % 16, (16, 16), dtype=np.int64)
GPTQ_WORDS = """
    52fc9630 1d951d95 d83e94fa 93d71b5f 5e7092b4 19191919 d4b2907e 9f5b17d3
    5af49e38 159d159d d0369cf2 9bdf1357 56789abc 11111111 dcba9876 97531fdb
    da741eb8 1d951d95 50b61c72 93d71b5f d6f81a3c 19191919 5c3a18f6 9f5b17d3
    d27c16b0 159d159d 58be147a 9bdf1357 def01234 11111111 543210fe 97531fdb"""
AWQ_WORDS = """
    39f5e4a0 b17d6c28 d1597bf3 d1597bf3 79bd0246 f1358ace 11119999 11119999
    b97520ec 31fda864 51d9b73f 51d9b73f f93d4e82 71b5c60a 9191d5d5 9191d5d5
    39f56c28 b17de4a0 d159f37b d159f37b 79bd8ace f1350246 11111111 11111111
    b975a864 31fd20ec 51d93fb7 51d93fb7 f93dc60a 71b54e82 91915d5d 91915d5d"""
# u[k, n] = (3k + 5n + kn / 4) mod 8 for k < 32, n < 8, as GPTQModel 7.7.0 packs it: TorchLinear.pack_original.
U3 = np.fromfunction(lambda k, n: (3 * k + 5 * n + k * n // 4) % 8, (32, 8), dtype=np.int64)
GPTQ3_WORDS = """
    98abc398 5762acc5 4e5d886a 0534e597 04104104 fbcb2a69 f2a607d6 a99d633b
    c398abc3 e5e1abc1 886acfc1 acb3efc1 41041041 634d104e 07d6344e 2a1f544e
    abc398ab 398873f0 cfc14e5d 7d8821a6 10410410 8207df59 344ef2a6 c6078d0f"""


def words(text: str, columns: int) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint32).view(np.int32).reshape(-1, columns)


def tensors(parts: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {suffix: torch.from_numpy(array) for suffix, array in parts.items()}


def sample(rows: int, cols: int, groups: int, seed: int = 0, bits: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [rows, cols], and scales [rows, groups] that float16 and BF16 hold."""
    rng = np.random.default_rng(seed)
    scales = as_float32(to_bf16(np.exp2(rng.uniform(-12, 4, (rows, groups))).astype(np.float32)))
    return rng.integers(-(1 << bits - 1), 1 << bits - 1, (rows, cols), dtype=np.int8), scales


def nibble(packed: torch.Tensor, row: int, column: int, which: int) -> int:
    return (int(packed[row, column]) >> 4 * which) & 15


def code(words: torch.Tensor, bits: int, which: int) -> int:
    """One of the codes that lie in int32 words without gaps."""
    places = range(bits * which, bits * which + bits)
    return sum((int(words[at // 32]) >> at % 32 & 1) << i for i, at in enumerate(places))


def by_hand(
    parts: dict[str, torch.Tensor], rows: int, cols: int, kind: str, bits: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """(u − zero, scales), both [rows, cols], one element at a time from what the formats' descriptions say."""
    codes, scales = np.empty((rows, cols), np.float64), np.empty((rows, cols), np.float64)
    place = {column: i for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}
    size = cols // len(parts["scales"])
    for n in range(rows):
        for k in range(cols):
            if kind == "gptq":
                group = int(parts["g_idx"][k])
                u, zero = code(parts["qweight"][:, n], bits, k), code(parts["qzeros"][group], bits, n) + 1
            else:
                group = k // size
                u = nibble(parts["qweight"], k, n // 8, place[n % 8])
                zero = nibble(parts["qzeros"], group, n // 8, place[n % 8])
            codes[n, k], scales[n, k] = u - zero, float(parts["scales"][group, n])
    return codes, scales


def test_words_are_those_of_vllms_packing():
    codes = (U.T - 8).astype(np.int8)  # [out, in]
    ones = np.ones((16, 1), np.float32)
    np.testing.assert_array_equal(CODECS["gptq-channel"].pack(codes, ones)["qweight"], words(GPTQ_WORDS, 16))
    np.testing.assert_array_equal(CODECS["awq-g32"].pack(codes, ones)["qweight"], words(AWQ_WORDS, 2))


def test_words_of_fewer_bits_are_those_of_gptqmodels_packing():
    codes = np.tile((U3.T - 4).astype(np.int8), (4, 1))
    packed = CODECS["gptq3-g32"].pack(codes, np.ones((32, 1), np.float32))["qweight"]
    np.testing.assert_array_equal(packed, np.tile(words(GPTQ3_WORDS, 8), 4))


@pytest.mark.parametrize("scheme", [*GPTQ, *AWQ, *FEWER])
def test_layout_predicts_what_encode_returns(scheme):
    codec = CODECS[scheme]
    for shape in ((32, 128), (96, 384)) if scheme in FEWER else ((8, 128), (24, 384)):
        weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        (parts,) = codec.encode([weight])
        assert [(suffix, array.shape, array.dtype) for suffix, array in parts.items()] == [
            (part.suffix, part.shape, NUMPY[part.dtype]) for part in codec.layout(shape)
        ]
        assert all(array.flags.c_contiguous for array in parts.values())


@pytest.mark.parametrize("scheme", ["gptq-g32", "gptq-channel", "awq-g32", "gptq3-g32", "gptq2-g32"])
def test_every_code_is_where_the_format_says(scheme):
    codec = CODECS[scheme]
    codes, scales = sample(32, 64, 64 // (codec.group_size or 64), bits=codec.bits)
    parts = tensors(codec.pack(codes, scales))
    got_codes, got_scales = by_hand(parts, 32, 64, codec.quant_method, codec.bits)
    np.testing.assert_array_equal(got_codes, codes)
    spread = scales.repeat(64 // scales.shape[1], 1)
    np.testing.assert_array_equal(got_scales, spread)
    for got, want in zip(codec.unpack(codec.pack(codes, scales)), (codes, scales), strict=True):
        np.testing.assert_array_equal(got, want)
    exact = torch.from_numpy(codes * spread)  # 4 bits × 8 bits
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(codec.decode(parts, dtype), exact.to(dtype))
    assert torch.equal(codec.decode(parts, torch.float32, torch.bfloat16), exact)  # scales that BF16 holds


@pytest.mark.parametrize("scheme", AWQ)
def test_compressed_tensors_converts_our_awq_files(scheme):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    codec = CODECS[scheme]
    codes, scales = sample(24, 384, 384 // codec.group_size)
    ours = {f"m.{suffix}": tensor for suffix, tensor in tensors(codec.pack(codes, scales)).items()}
    converter = AutoAWQConverter(group_size=codec.group_size)
    converter.validate(dict(ours))
    theirs = converter.process(ours)
    shape = torch.Size(codes.shape)
    assert torch.equal(unpack_from_int32(theirs["m.weight_packed"], 4, shape), torch.from_numpy(codes))
    assert torch.equal(theirs["m.weight_scale"].float(), torch.from_numpy(scales))
    zeros = unpack_from_int32(theirs["m.weight_zero_point"], 4, torch.Size(scales.shape), packed_dim=0)
    assert not zeros.any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(["gptq", "awq", "gptq3", "gptq2"]), st.integers(0, 2**32))
def test_others_zero_points_and_orders_are_read_as_stored(octets, groups, family, seed):
    codec = CODECS[f"{family}-g32"]
    rows, cols, kind = (8 if codec.bits == 4 else 32) * octets, 32 * groups, codec.quant_method
    rng = np.random.default_rng(seed)
    layout = codec.layout((rows, cols))
    parts = {p.suffix: rng.integers(-(2**31), 2**31, p.shape).astype(np.int32) for p in layout if p.dtype == "I32"}
    parts["scales"] = rng.uniform(0.001, 2, (groups, rows)).astype(np.float16)
    if kind == "gptq":
        parts["g_idx"] = rng.permutation(np.arange(cols) // 32).astype(np.int32)  # ordered by activation
    read = tensors(parts)
    codes, scales = by_hand(read, rows, cols, kind, codec.bits)
    got = codec.decode(read, torch.float32)
    np.testing.assert_array_equal(got.numpy(), (codes * scales).astype(np.float32))


@pytest.mark.parametrize("group", [-1, 2])
def test_a_group_that_is_not_there_is_an_error(group):
    parts = tensors(CODECS["gptq-g32"].pack(*sample(8, 64, 2)))
    parts["g_idx"][5] = group
    with pytest.raises(ValueError, match="g_idx names groups beyond its 2"):
        CODECS["gptq-g32"].decode(parts, torch.float32)


@pytest.mark.parametrize("scheme", [*GPTQ, *AWQ])
def test_rows_and_columns_must_fill_words_and_groups(scheme):
    codec = CODECS[scheme]
    unit = codec.group_size or 8
    assert codec.refusal((16, 3 * unit)) is None
    assert codec.refusal((12, 3 * unit)) == "12 rows are not a multiple of 8"
    assert codec.refusal((16, 3 * unit + unit // 2)) == f"{3 * unit + unit // 2} columns are not a multiple of {unit}"


def test_codes_of_fewer_bits_need_more_rows_to_fill_words():
    for bits, unit in ((3, 32), (2, 16)):
        assert CODECS[f"gptq{bits}-g32"].refusal((3 * unit, 32)) is None
        assert (
            CODECS[f"gptq{bits}-g32"].refusal((3 * unit + 8, 32)) == f"{3 * unit + 8} rows are not a multiple of {unit}"
        )


@pytest.mark.parametrize("scheme", ["gptq-g128", "awq-g64"])
def test_storable_scales_are_the_nearest_that_float16_and_bf16_hold(scheme):
    positive = as_float32(np.arange(1, 0x7F80, dtype=np.uint16))  # every finite BF16 value above zero
    small = positive[positive < 65504]
    both = small[small.astype(np.float16).astype(np.float32) == small]
    assert (both[0], both[-1]) == (2.0**-24, 65280)
    got = CODECS[scheme].storable(positive)
    assert np.isin(got, both).all()
    np.testing.assert_array_equal(CODECS[scheme].storable(both), both)
    inside = (positive > both[0]) & (positive < both[-1])
    above = both[np.searchsorted(both, positive[inside])]
    below = both[np.searchsorted(both, positive[inside], side="right") - 1]
    distance = np.abs(got[inside] - positive[inside])
    np.testing.assert_array_equal(distance, np.minimum(above - positive[inside], positive[inside] - below))
    assert (got[positive <= both[0]] == both[0]).all()
    assert (got[positive >= both[-1]] == both[-1]).all()
    wide = np.exp2(np.random.default_rng(0).uniform(-30, 20, 1000)).astype(np.float32)
    assert np.isin(CODECS[scheme].storable(wide), both).all()
    np.testing.assert_array_equal(CODECS["int4-g128"].storable(wide), as_float32(to_bf16(wide)))


@pytest.mark.parametrize("scheme", ["gptq-g32", "awq-g32"])
@pytest.mark.parametrize("size", [2.0**-22, 2.0**-16, 1.0, 2.0**16])
def test_codes_are_chosen_on_the_stored_scales(scheme, size):
    weight = (np.random.default_rng(0).standard_normal((16, 64)) * size).astype(np.float32)
    codec = CODECS[scheme]
    (parts,) = codec.encode([weight])
    stored = np.ascontiguousarray(parts["scales"].T.astype(np.float32))
    changed = (stored != rtn_scales(weight, 32)).any()
    assert changed == (size < 1)
    codes = nearest_codes(weight, stored)
    want = torch.from_numpy(codes * stored.repeat(32, 1))
    assert torch.equal(codec.decode(tensors(parts), torch.float32), want)


@pytest.mark.parametrize("family", ["gptq", "awq"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_weight_beyond_float16_scales_is_named(family, method, fox, tmp_path, cli):
    tensors = tiny.random_weights(tiny.WORDY)
    tensors[f"{EXPERT}.weight"][3, 5] = 1e9
    model = tiny.write_checkpoint(tmp_path / "model", tiny.WORDY, tensors)
    text = () if method == "rtn" else ("--calibration", fox, "--num-calibration-samples", 2, "--max-seq-length", 16)
    asked = ("--int4=pure", "--group-size", 32, "--target", "vllm", "--method", method, *text)
    ran = cli("convert", model, *asked, "--format", family, "-o", tmp_path / "out", "-q")
    assert (ran.code, ran.out) == (3, "")
    assert f"{EXPERT}: has values too large for the float16 scales of {family}-g32 (leave out --format" in ran.err
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("scheme", ["gptq-g32", "awq-g32", "gptq-channel"])
def test_the_largest_scale_is_the_largest_that_is_stored(scheme):
    weight = np.full((8, 32), 65280 * 7.5, np.float32)  # rounding's scale is amax / 7.5; the next of BF16 is 65536
    (parts,) = CODECS[scheme].encode([weight])
    assert (CODECS[scheme].decode(tensors(parts), torch.float32) == 65280 * 7).all()
    for beyond in (65500 * 7.5, 2.0**100):
        with pytest.raises(TooLargeError) as raised:
            CODECS[scheme].encode([weight, np.full_like(weight, beyond)])
        assert raised.value.which == 1


def test_gptq_rounds_to_the_scales_it_is_given():
    w, h = problem(1, 5, 96)
    scales = gptq.best_scales(w, h.diagonal(dim1=-2, dim2=-1), 32) * 1.5
    given = scales.clone()
    codes = gptq.quantize(w, scales, gptq.factor(h))
    assert torch.equal(given, scales)
    assert torch.equal(codes[0].double(), textbook(w[0], h[0], scales[0])[0])


@pytest.mark.parametrize("plain_wins", [False, True])
@pytest.mark.parametrize("scheme", ["gptq-g32", "awq-g32"])
def test_calibration_chooses_codes_on_the_stored_scales_too(scheme, plain_wins):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 64, generator=generator) * 2.0**-18  # scales near 2^-20, of which float16 holds 4 bits
    found = moments_of(inputs(1, 96, 64))
    train = Moments(found.h.float(), found.s.float(), found.count)
    # Inputs like none that GPTQ saw: what it makes up for there is lost here.
    held = Moments(torch.eye(64)[None], torch.zeros(1, 64, 64), torch.ones(1)) if plain_wins else train
    linear = Linear(weight, module="m.self_attn.o_proj")
    job = Job({linear.module: ("o_proj", scheme, "gptq")}, None, None, 1, 96, ALONE, 0, ThreadPoolExecutor(1), 0)
    choose(job, [[linear]], (train, held))
    assert job.outcomes[0].kept_rtn == plain_wins
    parts = job.parts["m.self_attn.o_proj"].result()
    assert torch.equal(linear.weight, CODECS[scheme].decode(tensors(parts), torch.float32))
    scales = torch.from_numpy(parts["scales"].T.astype(np.float32))
    steps = scales.repeat_interleave(32, 1)
    codes = (linear.weight / steps).round()
    if plain_wins:
        assert torch.equal(codes, (weight / steps).round().clamp(-8, 7))
    else:
        factored = gptq.factor(train.h, train.damping)
        wished = gptq.fit(weight[None], train, factored)
        assert torch.equal(codes[None], gptq.quantize(wished, scales[None], factored).float())


# Widths that whole groups of 64 and vLLM's tiles take.
CONFIG = tiny.V2 | {
    "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64, "num_hidden_layers": 2,
    "n_routed_experts": 8, "q_lora_rank": 64, "kv_lora_rank": 64, "n_group": 4, "qk_nope_head_dim": 24,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("layouts") / "source", CONFIG)


@pytest.fixture(scope="module")
def artifacts(source, tmp_path_factory):
    """{(family, method): folder}, all at group size 32, of the pure recipe."""
    folder = tmp_path_factory.mktemp("artifacts")
    ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (24, 32))
    calibration = Calibration(ids, "random", "", 0, [])
    made = {}
    for family, method in [("int4", "rtn"), ("gptq", "rtn"), ("awq", "rtn"), ("int4", "gptq"), ("gptq", "gptq")]:
        chosen = recipe.builtin("int4-pure", method=method, group_size=32, layout=family)
        plan = make_plan(open_checkpoint(source), chosen, for_targets=["vllm"])
        assert plan.schemes == {f"{family}-g32"}
        made[family, method] = folder / f"{family}-{method}"
        convert(plan, made[family, method], command="", calibration=calibration if method == "gptq" else None)
        for shard in plan.shards:
            assert (made[family, method] / shard.file).stat().st_size == shard.nbytes
    return made


def weights_of(folder) -> dict[str, torch.Tensor]:
    loader = Loader(open_checkpoint(folder), LoadOptions())
    return {w.spec.name: loader.tensor(w.spec.name) for w in loader.checkpoint.weights}


@pytest.mark.parametrize(("family", "method"), [("gptq", "rtn"), ("awq", "rtn"), ("gptq", "gptq")])
def test_the_layouts_hold_the_same_weights_as_compressed_tensors(family, method, artifacts):
    # Scales of these weights are BF16 values that float16 holds: nothing about the codes may differ.
    ours, reference = weights_of(artifacts[family, method]), weights_of(artifacts["int4", method])
    assert ours.keys() == reference.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, reference[name]), name
    assert open_checkpoint(artifacts[family, method]).config.quantization["quant_method"] == family


@pytest.mark.parametrize("family", ["gptq", "awq"])
def test_an_artifact_is_read_back_inspected_and_verified(family, artifacts, source, cli):
    folder = artifacts[family, "rtn"]
    quantized = {w.spec.name for w in open_checkpoint(folder).weights if w.scheme == f"{family}-g32"}
    assert len(quantized) == 2 * 4 + 3 + 3 + 8 * 3  # q_a, q_b, kv_a, o; dense, shared and routed FFNs
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.down_proj"
    parts = {n.rpartition(".")[2]: tensor for n, tensor in stored.items() if n.startswith(f"{name}.")}
    codes, scales = by_hand(parts, 128, 64, family)
    np.testing.assert_array_equal(weights_of(folder)[f"{name}.weight"].numpy(), codes * scales)
    ran = cli("verify", folder, "--source", source, "-q")
    assert ran.code == 0, ran.err
    assert f"{family}-g32" in ran.out
    inspected = cli("inspect", folder)
    assert inspected.code == 0
    assert f"routed.down_proj    {family}-g32" in inspected.out
    again = cli("convert", folder, "--fp8", "-o", folder.parent / "again", "-q")
    assert again.code == 3
    assert "already quantized: model.layers.0.self_attn.q_a_proj.weight" in again.err


@pytest.mark.parametrize("family", ["gptq", "awq"])
def test_the_runtime_computes_with_code_times_scale(family, artifacts, tmp_path):
    weights = weights_of(artifacts[family, "rtn"])
    plain = tiny.write_checkpoint(tmp_path / "plain", CONFIG, {name: w.contiguous() for name, w in weights.items()})
    tokens = torch.arange(2 * 16).view(2, 16)
    got, want = (Model(open_checkpoint(f)).forward(tokens) for f in (artifacts[family, "rtn"], plain))
    assert torch.equal(got, want)
