"""GGUF files of FP16, FP32 and FP8 checkpoints, whatever their shards; and the memory that a conversion takes.

What a tensor must hold is stacked and split by the gguf library's own map of names, from float32 values.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from gguf import GGUFReader
from gguf_files import CONFIG, stacked

from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.arch.spec import LINEAR_ROLES
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion import convert as conversion
from dsv2quant.formats.gguf import blocks
from dsv2quant.formats.gguf.imatrix import FileEntry, Imatrix
from dsv2quant.planning.gguf_plan import Options, make_gguf_plan

RAW = CONFIG | {"vocab_size": 4096, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
Tensors = dict[str, torch.Tensor]


def fp8_blocks(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """DeepSeek's FP8: what is stored, and its float32 values; a scale for each 128×128 block."""
    stored, values = dict(tensors), {name: tensor.float() for name, tensor in tensors.items()}
    for spec in architecture(model_config(RAW, "config.json")).specs():
        if spec.role in LINEAR_ROLES:
            codes = (tensors[spec.name].float() * 40).to(torch.float8_e4m3fn)
            rows, cols = (-(-n // 128) for n in spec.shape)
            scales = torch.linspace(0.01, 0.07, rows * cols).reshape(rows, cols)
            wide = scales.repeat_interleave(128, 0)[: spec.shape[0]].repeat_interleave(128, 1)[:, : spec.shape[1]]
            stored[spec.name], stored[f"{spec.name}_scale_inv"] = codes, scales
            values[spec.name] = codes.float() * wide
    return stored, values


def source(kind: str) -> tuple[dict[str, Any], Tensors, Tensors]:
    """(config.json, what is stored, its float32 values)."""
    if kind == "fp8":
        stored, values = fp8_blocks(tiny.random_weights(RAW))
        return RAW | {"quantization_config": FP8}, stored, values
    stored = tiny.random_weights(RAW, dtype=getattr(torch, kind))
    return RAW | {"torch_dtype": kind}, stored, {name: tensor.float() for name, tensor in stored.items()}


def convert(model: Path, out: Path, file_type: str, imatrix: Imatrix | None = None) -> Path:
    conversion.convert(make_gguf_plan(open_checkpoint(model), Options(file_type, imatrix=imatrix)), out)
    return out


def encoded(kind: str, values: np.ndarray, importance: np.ndarray | None = None) -> bytes:
    """Matrix by matrix, each with its own importance [matrices, cols]."""
    matrices = values.reshape(-1, *values.shape[-2:]) if values.ndim > 1 else values.reshape(1, 1, -1)
    weights = [None] * len(matrices) if importance is None or kind == "F32" else importance
    return b"".join(blocks.encode(kind, m, w).tobytes() for m, w in zip(matrices, weights, strict=True))


@pytest.mark.parametrize("file_type", ["Q4_K_M", "F32"])
@pytest.mark.parametrize("kind", ["float16", "float32", "fp8", "bfloat16"])
def test_every_tensor_encodes_the_float32_values(kind, file_type, tmp_path):
    raw, stored, values = source(kind)
    model = tiny.write_checkpoint(tmp_path / "model", raw, stored, shards=3)
    expected = stacked(RAW, values)
    found = GGUFReader(convert(model, tmp_path / "m.gguf", file_type)).tensors
    assert {tensor.name for tensor in found} == set(expected)
    assert len({tensor.tensor_type for tensor in found}) == (4 if file_type == "Q4_K_M" else 1)
    for tensor in found:
        want = expected[tensor.name]
        assert tuple(tensor.shape)[::-1] == want.shape, tensor.name
        assert tensor.data.tobytes() == encoded(tensor.tensor_type.name, want), tensor.name


def test_every_matrix_has_its_own_importance(tmp_path):
    """Experts' and heads' matrices, in one call or several."""
    raw, stored, values = source("float16")
    model = tiny.write_checkpoint(tmp_path / "model", raw, stored)
    generator = np.random.default_rng(0)
    expected = stacked(RAW, values)
    sums = {
        name: generator.random(
            (len(array) if "_exps" in name else 1, 1 if "_exps" in name else len(array), array.shape[-1]), np.float32
        )
        for name, array in expected.items()
        if array.ndim == 3
    }
    entries = {name: FileEntry(x.reshape(len(x), -1), np.full(len(x), 4, np.float32)) for name, x in sums.items()}
    out = convert(model, tmp_path / "m.gguf", "Q4_K_M", Imatrix(entries, ("a.txt",), 1, 512))
    checked = {tensor.name: tensor for tensor in GGUFReader(out).tensors if tensor.name in sums}
    assert set(checked) == set(sums)
    for name, tensor in checked.items():
        importance = (sums[name] / np.float32(4)).reshape(-1, expected[name].shape[-1])
        assert tensor.data.tobytes() == encoded(tensor.tensor_type.name, expected[name], importance), name


def test_shards_and_their_order_do_not_matter(tmp_path):
    raw, stored, _ = source("bfloat16")
    reordered = dict(sorted(stored.items(), key=lambda item: item[0][::-1]))
    files = [
        convert(tiny.write_checkpoint(tmp_path / str(n) / "model", raw, tensors, n), tmp_path / f"{n}.gguf", "Q5_K_M")
        for n, tensors in ((1, stored), (4, reordered))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


PEAK = """
import os, re, sys
from pathlib import Path
os.sched_getaffinity = lambda process: range(2)
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.planning.gguf_plan import Options, make_gguf_plan

def kib(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

for model in sys.argv[1:]:
    plan = make_gguf_plan(open_checkpoint(model), Options("Q8_0"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = kib("VmRSS")
    convert(plan, Path(model) / "m.gguf", split_max_size=20_000_000)
    print(plan.bytes_in, (kib("VmHWM") - before) * 1024)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """More layers and experts of the same widths, in files that are holes."""
    models = []
    for name, layers, experts in (("warm", 2, 4), ("small", 2, 8), ("large", 5, 32)):
        raw = RAW | {"num_hidden_layers": layers, "n_routed_experts": experts, "hidden_size": 768}
        folder = tiny.write_headers(tmp_path / name, raw | {"moe_intermediate_size": 512}, 100_000_000)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((tiny.MINI / file).read_bytes())
        models.append(folder)
    command = [sys.executable, "-c", PEAK, *map(str, models)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    _, (small, first), (large, second) = (map(int, line.split()) for line in ran.stdout.splitlines())
    assert large - small > 250_000_000
    assert max(first, second) < 32_000_000
