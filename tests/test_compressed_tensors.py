"""compressed-tensors checkpoints of others: what its own compressors write is read bit for bit, or refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Packed
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from dsv2quant.arch.spec import LINEAR_ROLES
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import InputError
from dsv2quant.formats.schemes import CODECS
from dsv2quant.kernels import int4_layout
from dsv2quant.model.runtime import Model

CONFIG = tiny.GROUPED | {"num_hidden_layers": 2, "n_routed_experts": 3, "n_shared_experts": 1, "v_head_dim": 32}
Parts = dict[str, torch.Tensor]


def scheme_of(group: int | None, asymmetric: bool = True, bits: int = 4) -> QuantizationScheme:
    how: dict[str, Any] = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=not asymmetric, dynamic=False, **how)
    return QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")


def compressed(weight: torch.Tensor, scheme: QuantizationScheme, dtype: torch.dtype = torch.bfloat16) -> Parts:
    """A weight as compressed-tensors stores it, its scales and zero points from its own observer's rule."""
    groups = weight.float().unflatten(1, (-1, scheme.weights.group_size or weight.shape[1]))
    scales, zeros = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    return Packed.compress(
        {"weight": weight.float(), "weight_scale": scales.to(dtype), "weight_zero_point": zeros.to(torch.int8)}, scheme
    )


def scattered(weight: torch.Tensor, scheme: QuantizationScheme, seed: int) -> Parts:
    """The same with groups of columns as `actorder: group` scatters them: compressed in order, then put back."""
    index = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed)) // scheme.weights.group_size
    order = torch.argsort(index, stable=True)
    parts = compressed(weight[:, order], scheme)
    bits = scheme.weights.num_bits
    codes = unpacked(parts, bits)[:, torch.argsort(order)]
    return parts | {"weight_packed": pack_to_int32(codes, bits), "weight_g_idx": index.to(torch.int32)}


def unpacked(parts: Parts, bits: int) -> torch.Tensor:
    """Codes int8 [rows, columns], of compressed-tensors' unpacking."""
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32

    return unpack_from_int32(parts["weight_packed"], bits, torch.Size(parts["weight_shape"].tolist()))


def expected(parts: Parts, scheme: QuantizationScheme) -> torch.Tensor:
    """What compressed-tensors decompresses, in the dtype of the scales: of scattered groups after gathering them."""
    if "weight_g_idx" not in parts:
        return Packed.decompress(parts, scheme)["weight"]
    order = torch.argsort(parts["weight_g_idx"], stable=True)
    whole = {suffix: part for suffix, part in parts.items() if suffix != "weight_g_idx"}
    bits = scheme.weights.num_bits
    whole["weight_packed"] = pack_to_int32(unpacked(parts, bits)[:, order], bits)
    return Packed.decompress(whole, scheme)["weight"][:, torch.argsort(order)]


def write(
    folder: Path, group: int | None = 32, *, asymmetric: bool = True, reorder: bool = False, bits: int = 4
) -> Path:
    """A checkpoint whose linears but kv_b_proj are compressed, beside `plain` with what they decompress to."""
    scheme, weights = scheme_of(group, asymmetric, bits), tiny.random_weights(CONFIG)
    specs = {w.spec.name: w.spec for w in open_checkpoint(tiny.write_checkpoint(folder / "source", CONFIG)).weights}
    stored, plain = {}, {}
    for seed, (name, weight) in enumerate(weights.items()):
        if specs[name].role not in LINEAR_ROLES or specs[name].role == "kv_b_proj":
            stored[name] = plain[name] = weight
            continue
        parts = scattered(weight, scheme, seed) if reorder else compressed(weight, scheme)
        stored |= {f"{specs[name].module}.{suffix}": part for suffix, part in parts.items()}
        plain[name] = expected(parts, scheme)
    ignore = ["lm_head", "re:.*kv_b_proj", "re:.*mlp.gate$"]
    quantization = QuantizationConfig(
        config_groups={"group_0": scheme}, format="pack-quantized", quantization_status="compressed", ignore=ignore
    ).to_dict()
    if reorder:  # a word that version 0.20 has dropped
        quantization["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    quantization = json.loads(json.dumps(quantization, default=str))
    tiny.write_checkpoint(folder / "packed", CONFIG | {"quantization_config": quantization}, stored)
    tiny.write_checkpoint(folder / "plain", CONFIG, plain)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("compressed")
    return {
        "asym": write(folder / "asym"),
        "channel": write(folder / "channel", None),
        "scattered": write(folder / "scattered", reorder=True, asymmetric=False),
        "both": write(folder / "both", reorder=True),
        "INT3": write(folder / "INT3", bits=3),
        "INT2": write(folder / "INT2", reorder=True, bits=2),
    }


MARKS = {"asym": "int4-g32-asym", "channel": "int4-channel-asym", "scattered": "int4-g32-g_idx",
         "both": "int4-g32-asym-g_idx", "INT3": "int3-g32-asym", "INT2": "int2-g32-asym-g_idx"}  # fmt: skip


@pytest.mark.parametrize("rows", [24, 27])
@pytest.mark.parametrize(("group", "bits"), [(32, 4), (64, 4), (128, 4), (None, 4), (64, 3), (32, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_zero_points_are_decoded_as_compressed_tensors_does(group, bits, dtype, rows):
    scheme, codec = scheme_of(group, bits=bits), CODECS[f"int{bits}-g{group}" if group else "int4-channel"]
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0)) + 0.7
    parts = compressed(weight, scheme, dtype)
    layout = {p.suffix: p.shape for p in (*codec.layout(weight.shape), *codec.others(weight.shape))}
    assert {suffix: tuple(part.shape) for suffix, part in parts.items()} == {s: layout[s] for s in parts}
    assert parts["weight_zero_point"].unique().numel() > 1
    got = codec.decode(parts, dtype)
    assert torch.equal(got, expected(parts, scheme))
    off = float((got.float() - weight).norm() / weight.norm())
    assert off < {4: 0.2, 3: 0.25, 2: 0.5}[bits]  # as symmetric codes they'd be off by far more


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("group", "bits"), [(32, 4), (64, 4), (64, 3), (32, 2)])
def test_scattered_groups_are_decoded_and_repacked(group, bits, asymmetric):
    codec, scheme = CODECS[f"int{bits}-g{group}"], scheme_of(group, asymmetric, bits)
    parts = scattered(torch.randn(24, 256, generator=torch.Generator().manual_seed(1)) + 0.5, scheme, 3)
    want = expected(parts, scheme)
    assert torch.equal(codec.decode(parts, torch.bfloat16), want)
    packed = int4_layout.from_compressed_tensors(parts, bits)
    assert (packed.zeros is not None) == asymmetric
    zeros = torch.full_like(packed.scales, 8) if packed.zeros is None else packed.zeros
    index = torch.arange(256) // group
    values = (int4_layout.unpack(packed) - zeros.T[:, index]) * packed.scales.T[:, index]
    assert torch.equal(values.to(torch.bfloat16), want[:, packed.order])


def test_a_minus_one_leaves_columns_in_order():
    parts = compressed(torch.randn(8, 64), scheme_of(32))
    order = {"weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}  # compressed-tensors' own initial value
    assert torch.equal(
        CODECS["int4-g32"].decode(parts | order, torch.float32), CODECS["int4-g32"].decode(parts, torch.float32)
    )
    assert int4_layout.from_compressed_tensors(parts | order).order is None


@pytest.mark.parametrize("kind", MARKS)
def test_whole_checkpoints_are_read_and_computed_with(kind, written, cli):
    packed, plain = (open_checkpoint(written[kind] / name) for name in ("packed", "plain"))
    want = {w.spec.name: plain.decode(w, torch.bfloat16) for w in plain.weights}
    for weight in packed.weights:
        assert torch.equal(packed.decode(weight, torch.bfloat16), want[weight.spec.name]), weight.spec.name
    inspected = cli("inspect", packed.folder)
    assert inspected.code == 0, inspected.err
    assert MARKS[kind] in inspected.out


def test_the_runtime_computes_with_them(written):
    tokens = torch.arange(16).view(1, 16)
    got, near = (Model(open_checkpoint(written["both"] / name)).forward(tokens) for name in ("packed", "plain"))
    assert float((got - near).norm() / near.norm()) < 0.02  # plain holds products that are rounded to BF16


def changed(folder: Path, written: Path, change: Callable[[dict[str, Any], Parts], object]) -> Path:
    """A copy of a packed checkpoint after a change to its quantization_config and its tensors."""
    from safetensors.torch import load_file

    config = json.loads((written / "packed" / "config.json").read_text())
    tensors = load_file(written / "packed" / "model.safetensors")
    change(config["quantization_config"], tensors)
    return tiny.write_checkpoint(folder, config, tensors)


def weights_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]["weights"]


def drop(suffix: str) -> Callable[[dict[str, Any], Parts], object]:
    def change(config: dict[str, Any], tensors: Parts) -> None:
        for name in [name for name in tensors if name.endswith(suffix)]:
            del tensors[name]

    return change


def other_group(config: dict[str, Any], tensors: Parts) -> None:
    """A second group of the same size, symmetric: which weights have zero points is then no longer sure."""
    config["config_groups"]["group_1"] = copy.deepcopy(config["config_groups"]["group_0"])
    weights_of(config)["symmetric"] = True


CONTRADICTIONS = {
    "asym says sym": ("asym", lambda c, t: weights_of(c).update(symmetric=True),
                      "has weight_zero_point, but quantization_config does not say symmetric: false"),
    "no zero points": ("asym", drop("weight_zero_point"),
                       "has no weight_zero_point, but quantization_config says symmetric: false"),
    "one without": ("channel", drop("0.self_attn.o_proj.weight_zero_point"), "o_proj has no weight_zero_point, but"),
    "no groups": ("both", drop("weight_g_idx"), "has no weight_g_idx, but quantization_config says actorder: group"),
    "groups unsaid": ("scattered", lambda c, t: weights_of(c).update(actorder="static"),
                      "has weight_g_idx, but quantization_config does not say actorder: group"),
    "other size": ("asym", lambda c, t: weights_of(c).update(group_size=64), "which no group of quantization_config"),
    "other bits": ("INT3", lambda c, t: weights_of(c).update(num_bits=2),
                   "groups of 32 columns in INT3, which no group of quantization_config declares"),
    "both ways": ("asym", other_group, "symmetric: false of one group alike, not of another"),
    "no config": ("asym", lambda c, t: (c.clear(), c.update(quant_method="fp8", activation_scheme="dynamic"),
                                        t.update({"model.norm.weight_zero_point": torch.zeros(1)})),
                  "quantization_config does not declare: model.norm.weight_zero_point"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_configuration_that_contradicts_the_tensors_is_an_error(name, written, tmp_path):
    kind, change, message = CONTRADICTIONS[name]
    with pytest.raises(InputError, match=r"get both again|as it was published") as raised:
        open_checkpoint(changed(tmp_path / "changed", written[kind], change))
    assert message in str(raised.value)
    assert "or remove" not in str(raised.value)


@pytest.mark.parametrize("value", [-2, 4])
def test_a_group_that_is_not_there_is_damage(value, written, tmp_path):
    def change(config: dict[str, Any], tensors: Parts) -> None:
        tensors["model.layers.0.self_attn.o_proj.weight_g_idx"][5] = value

    checkpoint = open_checkpoint(changed(tmp_path / "changed", written["both"], change))
    weight = next(w for w in checkpoint.weights if w.spec.name.endswith("0.self_attn.o_proj.weight"))
    with pytest.raises(InputError, match="o_proj: weight_g_idx names groups beyond its 4"):
        checkpoint.decode(weight, torch.float32)


def group_of(scheme: str) -> dict[str, Any]:
    """A preset of compressed-tensors as it is written to config.json."""
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    return json.loads(json.dumps(preset_name_to_scheme(scheme, ["Linear"]).model_dump(), default=str))


REFUSED: dict[str, tuple[dict[str, Any] | str, str]] = {
    **{f"W{bits}A16": (f"W{bits}A16", f"weights with num_bits {bits} in group_0") for bits in (5, 6, 7)},
    "W8A16": ("W8A16", "weights with strategy 'group'"),
    "INT8 alone": ({"weights": {"num_bits": 8, "strategy": "channel", "group_size": None, "symmetric": True},
                    "format": "int-quantized"}, "no input_activations of INT8 weights"),
    "asymmetric INT8": ({"weights": {"num_bits": 8, "strategy": "channel", "group_size": None, "symmetric": False},
                         "format": "int-quantized"}, "weights with symmetric False"),
    "W4A8": ("W4A8", "input_activations with type 'int'"),
    "inputs of asymmetric INT4": ({"input_activations": {"num_bits": 8, "type": "float", "strategy": "token",
                                                         "dynamic": True}}, "input_activations of INT4 weights"),
    "NVFP4A16": ("NVFP4A16", "weights with num_bits 4"),
    "MXFP4": ("MXFP4", "weights with num_bits 4"),
    "MXFP8A16": ("MXFP8A16", "weights with strategy 'group'"),
    "FP8_BLOCK": ("FP8_BLOCK", "weights with strategy 'block'"),
    "channel of INT3": ({"weights": {"num_bits": 3, "strategy": "channel", "group_size": None}},
                        "weights with strategy 'channel'"),
    "inputs of INT2": ({"weights": {"num_bits": 2}, "input_activations": {"num_bits": 8, "type": "float",
                        "strategy": "token", "dynamic": True}}, "input_activations of INT2 weights"),
    "tensor of INT4": ({"weights": {"strategy": "tensor", "group_size": None}}, "weights with strategy 'tensor'"),
    "groups of 16": ({"weights": {"group_size": 16}}, "weights with group_size 16"),
    "dynamic": ({"weights": {"dynamic": True}}, "dynamic weights"),
    "actorder": ({"weights": {"actorder": "columns"}}, "weights with actorder 'columns'"),
    "actorder list": ({"weights": {"actorder": [1]}}, "weights with actorder [1]"),
    "unknown key": ({"weights": {"codebook": "nf4"}}, "weights with the key 'codebook'"),
    "outputs": ({"output_activations": {"num_bits": 8}}, "output_activations in group_0"),
    "no weights": ({"weights": None}, "no weights in group_0"),
    "format": ({"format": "marlin-24"}, "format 'marlin-24' of int weights"),
    "top format": ({"": {"format": "sparse-24-bitmask"}}, "format 'sparse-24-bitmask'"),
    "sparsity": ({"": {"sparsity_config": {"format": "sparse-bitmask"}}}, "sparsity_config"),
    "transform": ({"": {"transform_config": {"config_groups": {"u": {}}}}}, "transform_config"),
    "preset": ({"": {"config_groups": {"W4A16": ["Linear"]}}}, "W4A16 of config_groups, which names a preset"),
    "no groups": ({"": {"config_groups": None}}, "no config_groups"),
    "cache of INT8": ({"": {"kv_cache_scheme": {"num_bits": 8, "type": "int", "strategy": "tensor"}}},
                      "type 'int' in kv_cache_scheme"),
    "cache by head": ({"": {"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "attn_head"}}},
                      "strategy 'attn_head' in kv_cache_scheme"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(name, written, tmp_path, cli):
    what, message = REFUSED[name]
    config = json.loads((written["asym"] / "packed" / "config.json").read_text())
    quantization = config["quantization_config"]
    group = quantization["config_groups"]["group_0"]
    if isinstance(what, str):
        quantization["config_groups"]["group_0"] = group_of(what)
    for key, value in what.items() if isinstance(what, dict) else ():
        target = quantization if key == "" else group[key] if value and key == "weights" else group
        target.update(value if target is not group else {key: value})
    tiny.write_checkpoint(tmp_path / "model", config)
    ran = cli("inspect", tmp_path / "model")
    assert ran.code == 3
    assert f"config.json: quantization_config has {message}" in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("scheme", ["W2A16", "W3A16", "W4A16", "W4A16_ASYM", "FP8", "FP8_DYNAMIC", "W8A8", "W4AFP8"])
def test_presets_that_are_read(scheme):
    from dsv2quant.formats.declared import unread

    kind = {"FP": "float-quantized", "W8": "int-quantized"}.get(scheme[:2], "pack-quantized")
    assert unread({"format": kind, "config_groups": {"group_0": group_of(scheme)}, "sparsity_config": {}}) is None
