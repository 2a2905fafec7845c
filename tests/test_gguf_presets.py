"""Mixes of our own: no larger than the stock mixes whose bytes they spend, and closer to the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from gguf import GGUFReader
from gguf_tiny import PUBLISHED

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import UsageError
from dsv2quant.evaluation import divergence
from dsv2quant.evaluation import divergence as perplexity
from dsv2quant.formats.gguf import blocks
from dsv2quant.formats.gguf.file_types import FILE_TYPES, PRESETS
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import gguf_presets
from dsv2quant.planning import gguf_types as types
from dsv2quant.planning.gguf_plan import Options, make_gguf_plan
from dsv2quant.planning.gguf_presets import ENDS, ERROR, WEIGHT, choose_preset
from dsv2quant.planning.gguf_types import Overrides, quantizable
from dsv2quant.storage.gguf import padded
from dsv2quant.text import text
from dsv2quant.text.tokenizer import Tokenizer, cut

MODELS = {"mini": json.loads((tiny.MINI / "config.json").read_text()), **PUBLISHED}
CONFIGS = {n: c for n, raw in MODELS.items() if (c := model_config(raw, "config.json")).is_mla}
TENSORS = {name: architecture(config).gguf_tensors() for name, config in CONFIGS.items()}
every_preset = pytest.mark.parametrize("preset", PRESETS)
every_model = pytest.mark.parametrize("model", CONFIGS)


def chosen(model: str, preset: str, **overrides) -> dict[str, str]:
    """{tensor: type}."""
    tensors = TENSORS[model]
    asked = Overrides(**overrides)
    choices = choose_preset(tensors, preset, CONFIGS[model], has_imatrix=True, overrides=asked)
    return {tensor.name: kind for tensor, (kind, _) in zip(tensors, choices, strict=True)}


@every_model
@every_preset
def test_a_preset_is_never_larger_than_its_stock_mix(preset, model):
    tensors = TENSORS[model]
    stock = types.choose(tensors, PRESETS[preset], CONFIGS[model], has_imatrix=True)
    theirs = sum(blocks.nbytes(kind, tensor.shape) for tensor, (kind, _) in zip(tensors, stock, strict=True))
    ours = sum(blocks.nbytes(kind, t.shape) for t, kind in zip(tensors, chosen(model, preset).values(), strict=True))
    assert 0.99 * theirs < ours <= theirs


@every_model
@every_preset
def test_hardly_any_choice_within_the_bytes_costs_less(preset, model):
    """By weak duality: for any price of a byte, no choice within the budget costs less than what every tensor does at
    its best under that price, less the price of the budget. No step of any tensor of dsv2-mini is small."""
    tensors, config = TENSORS[model], CONFIGS[model]
    parts = [gguf_presets._Part(tensor, PRESETS[preset], config.num_hidden_layers) for tensor in tensors]
    stock = types.choose(tensors, PRESETS[preset], config, has_imatrix=True)
    budget = sum(padded(blocks.nbytes(kind, tensor.shape)) for tensor, (kind, _) in zip(tensors, stock, strict=True))
    kinds = chosen(model, preset).values()
    cost = sum(part.weight * ERROR.get(kind, 0.0) for part, kind in zip(parts, kinds, strict=True))
    costs = [np.array([part.weight * ERROR.get(kind, 0.0) for kind, _ in part.ladder]) for part in parts]
    sizes = [np.array(part.sizes) for part in parts]
    bound = max(
        sum((c + price * b).min() for c, b in zip(costs, sizes, strict=True)) - price * budget
        for price in cost / budget * np.geomspace(0.1, 100, 300)
    )
    assert bound <= cost < (1.05 if model == "mini" else 1.02) * bound


@every_preset
@pytest.mark.parametrize("hidden", [64, 256, 320])
def test_tensors_of_few_blocks_have_steps_that_take_nothing(preset, hidden):
    """Where the padding takes what two types differ by."""
    raw = tiny.V2 | {"hidden_size": hidden, "intermediate_size": 64, "moe_intermediate_size": 32, "vocab_size": 2}
    config = model_config(raw, "config.json")
    tensors = architecture(config).gguf_tensors()
    ours, theirs = (
        [kind for kind, _ in choose(tensors, name, config, has_imatrix=True, overrides=Overrides())]
        for choose, name in ((choose_preset, preset), (types.choose, PRESETS[preset]))
    )
    room, taken = (
        sum(padded(blocks.nbytes(kind, tensor.shape)) for tensor, kind in zip(tensors, kinds, strict=True))
        for kinds in (theirs, ours)
    )
    assert taken <= room


@every_model
def test_every_kind_of_tensor_has_its_weight(model):
    assert {tensor.kind for tensor in TENSORS[model] if quantizable(tensor)} <= {*WEIGHT, *ENDS}


@pytest.mark.parametrize("raw", [tiny.LLAMA, tiny.DEEPSEEK_MOE])
def test_presets_are_for_latent_attention_and_experts(raw) -> None:
    config = model_config(raw, "config.json")
    tensors = architecture(config).gguf_tensors()
    with pytest.raises(UsageError, match=r"DSV2_Q4_K_M is a mix for latent attention .* \(give Q4_K_M\)"):
        choose_preset(tensors, "DSV2_Q4_K_M", config, has_imatrix=False, overrides=Overrides())


@every_model
@every_preset
def test_a_preset_is_made_of_types_that_fit(preset, model):
    kinds = chosen(model, preset)
    assert kinds == chosen(model, preset)
    for tensor in TENSORS[model]:
        kind = kinds[tensor.name]
        assert kind in blocks.TYPES
        assert tensor.shape[-1] % blocks.TYPES[kind].values == 0
        assert (kind == "F32") == (len(tensor.shape) == 1 or tensor.kind == "ffn_gate_inp")


@every_preset
def test_an_override_wins(preset):
    plain = chosen("lite", preset)
    fixed = {"output_type": "Q8_0", "token_embedding_type": "Q2_K"}
    overridden = chosen("lite", preset, tensor_types=[("blk.3.*exps", "Q6_K"), ("attn_kv_a", "BF16")], **fixed)
    for name, kind in overridden.items():
        if name == "output.weight":
            assert kind == "Q8_0"
        elif name == "token_embd.weight":
            assert kind == "Q2_K"
        elif name.startswith("blk.3.") and "exps" in name:
            assert kind == ("Q8_0" if "down" in name else "Q6_K")  # rows of 1408: the fallback
        elif "attn_kv_a_mqa" in name:
            assert kind == "BF16"
        else:
            assert kind == plain[name]


def test_a_preset_is_deterministic_and_says_its_stock_number(tmp_path, cli):
    for name in ("a.gguf", "b.gguf"):
        assert cli("convert", tiny.MINI, "--gguf", "dsv2_q4_k_m", "-o", tmp_path / name, "-q").code == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    reader = GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.file_type"].contents() == FILE_TYPES["Q4_K_M"].number
    assert {t.name: t.tensor_type.name for t in reader.tensors} == chosen("mini", "DSV2_Q4_K_M")


def test_on_dsv2_mini_the_preset_is_closer_to_the_model(tmp_path):
    """Mean KLD per window, paired: the preset's is smaller by more than 3 standard errors, in a file not larger."""
    tokenizer = Tokenizer.open(tiny.MINI)
    windows = cut(tokenizer.encode(text.python_topics().content), 256, tokenizer.bos_id, "default", "topics")
    ids, first = windows.ids[:8], windows.first
    reference = run(tiny.MINI, ids)
    klds, sizes = {}, {}
    for file_type in ("Q4_K_M", "DSV2_Q4_K_M"):
        out = tmp_path / f"{file_type}.gguf"
        convert(make_gguf_plan(open_checkpoint(tiny.MINI), Options(file_type)), out)
        klds[file_type] = divergence.compare(run(out, ids), reference, ids, first).kld.mean(1)
        sizes[file_type] = out.stat().st_size
    gain = klds["Q4_K_M"] - klds["DSV2_Q4_K_M"]
    assert sizes["DSV2_Q4_K_M"] <= sizes["Q4_K_M"]
    assert gain.mean() > 3 * gain.std(ddof=1) / np.sqrt(len(gain))


def run(model: Path, ids: np.ndarray) -> perplexity.Pass:
    options = LoadOptions(torch.float32, "cpu", weight_only=True)
    return perplexity.run(Model(open_checkpoint(model), options), ids, perplexity.batches_of(len(ids), 8))
