"""The type of every tensor, as llama-quantize --dry-run chooses it for DeepSeek-V2-Lite and DeepSeek-V2.

tests/golden/gguf_types.json is made by tests/clients/llama_cpp/goldens.py (llama.cpp 0c1e57098).
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_expected import OPTIONS
from gguf_tiny import PUBLISHED

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.arch.spec import GgufTensor
from dsv2quant.planning.gguf_types import Overrides, choose

GOLDEN = json.loads((Path(__file__).parent / "golden" / "gguf_types.json").read_text())
CONFIGS = {name: model_config(raw, "config.json") for name, raw in PUBLISHED.items()}
TENSORS = {name: architecture(config).gguf_tensors() for name, config in CONFIGS.items()}
MIXES = sorted({key.split("-")[1] for key in GOLDEN})


def expected(golden: dict, tensor: GgufTensor) -> str:
    """The type that the golden names: by kind, or by kind and layer; norms and routers stay F32."""
    if len(tensor.shape) == 1 or tensor.kind == "ffn_gate_inp":
        return "F32"
    name = golden["types"].get(tensor.kind, golden["types"]["*"])
    if isinstance(name, str):
        return name
    return next(kind for kind, layers in name.items() if tensor.layer in layers)


def check(model: str, golden: dict, file_type: str, has_imatrix: bool = False, **overrides) -> None:
    tensors = TENSORS[model]
    chosen = choose(tensors, file_type, CONFIGS[model], has_imatrix=has_imatrix, overrides=Overrides(**overrides))
    wrong = [
        (tensor.name, name, expected(golden, tensor))
        for tensor, (name, _) in zip(tensors, chosen, strict=True)
        if name != expected(golden, tensor)
    ]
    assert not wrong, f"{len(wrong)} tensors, the first (ours, llama-quantize's): {wrong[:3]}"
    assert sum(reason is not None for _, reason in chosen) == golden["fallbacks"]
    mib = sum(size(name, tensor.shape) for tensor, (name, _) in zip(tensors, chosen, strict=True)) / 2**20
    assert mib == pytest.approx(golden["MiB"], abs=0.006)


def size(name: str, shape: tuple[int, ...]) -> int:
    values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return prod(shape) // values * nbytes


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("file_type", MIXES)
@pytest.mark.parametrize("model", PUBLISHED)
def test_types_are_those_of_llama_quantize(model: str, file_type: str, weighted: bool) -> None:
    plain = GOLDEN[f"{model}-{file_type}"]
    golden = GOLDEN.get(f"{model}-{file_type}-imatrix", plain) if weighted else plain
    check(model, golden, file_type, has_imatrix=weighted)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", PUBLISHED)
def test_overrides_are_those_of_llama_quantize(model: str, options: str) -> None:
    words = OPTIONS[options]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    patterns = [value.split("=") for option, value in pairs if option == "--tensor-type"]
    fixed = {option[2:].replace("-", "_"): value.upper() for option, value in pairs if option != "--tensor-type"}
    tensor_types = [(pattern, name.upper()) for pattern, name in patterns]
    check(model, GOLDEN[f"{model}-Q4_K_M-{options}"], "Q4_K_M", tensor_types=tensor_types, **fixed)


def test_q2_k_s_gives_the_first_eighth_of_ffn_down_more() -> None:
    """As Q2_K, but for what llama_tensor_get_type_impl says of Q2_K_S: no more for attn_output and the other layers."""
    config, tensors = CONFIGS["v2"], TENSORS["v2"]
    kinds = zip(*(choose(tensors, name, config, has_imatrix=True) for name in ("Q2_K", "Q2_K_S")), strict=True)
    for tensor, ((plain, _), (small, _)) in zip(tensors, kinds, strict=True):
        if tensor.kind.startswith("ffn_down"):
            assert (plain, small) == ("Q3_K", "Q4_K" if tensor.layer < 7 else "Q2_K")
        else:
            assert (plain, small) == ("Q3_K", "Q2_K") if tensor.kind == "attn_output" else small == plain
