"""A checkpoint of a published model's shape with random weights, to convert and to time engines on.

    python benchmarks/random_checkpoint.py v2-lite DIR --device cuda

writes DeepSeek-V2-Lite's 31 GB in BF16 (v2: 472 GB) beside dsv2-mini's tokenizer; --layers keeps the first few. Weights
are those of `dsv2quant bench model`: as wide as keeps activations at their size, so that tokens spread over experts as
their router's scores fall, and every expert is read.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from dsv2quant.arch.decoder import architecture
from dsv2quant.bench.model import MODELS, RandomWeights, configuration

MINI = Path(__file__).parent.parent / "examples" / "dsv2-mini"
SHARD = 4 << 30  # bytes, at most a tensor more


def write(name: str, out: Path, device: str, layers: int | None) -> None:
    config = configuration(name)
    raw = json.loads(resources.files("dsv2quant").joinpath("bench", "configs", f"{name}.json").read_text())
    if layers is not None:
        config, raw = replace(config, num_hidden_layers=layers), raw | {"num_hidden_layers": layers}
    source = RandomWeights(config, None, device)
    out.mkdir(parents=True)
    held: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    shard = 0

    def flush() -> None:
        nonlocal shard
        shard += 1
        file = f"model-{shard:05}.safetensors"
        save_file(held, out / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(held, file))
        held.clear()

    for spec in tqdm(list(architecture(config).specs()), unit="tensors"):
        found = source.plain(spec.name)
        assert found is not None
        held[spec.name] = found.cpu()
        if sum(tensor.nbytes for tensor in held.values()) > SHARD:
            flush()
    if held:
        flush()
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    ids = {key: json.loads((MINI / "config.json").read_text())[key] for key in ("bos_token_id", "eos_token_id")}
    (out / "config.json").write_text(json.dumps(raw | ids, indent=2))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(MINI / file, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int)
    asked = parser.parse_args()
    write(asked.name, asked.out, asked.device, asked.layers)
