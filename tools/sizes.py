"""What artifacts of DeepSeek-V2-Lite and V2 take, and the machines that hold them: the tables of docs/sizes.md.

    python tools/sizes.py      prints them

All of it comes of plans, made from headers of the published shapes: no weight is read.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import gguf_tiny  # noqa: E402
import tiny  # noqa: E402

import dsv2quant as dq  # noqa: E402
from dsv2quant.arch.config import ModelConfig  # noqa: E402
from dsv2quant.arch.decoder import architecture  # noqa: E402
from dsv2quant.formats.gguf.file_types import FILE_TYPES, PRESETS  # noqa: E402
from dsv2quant.formats.gguf.imatrix import FileEntry, Imatrix  # noqa: E402
from dsv2quant.planning.gguf_plan import Options, make_gguf_plan  # noqa: E402
from dsv2quant.planning.memory import GIB, Workload, cache_per_token, card_capacity  # noqa: E402

MODELS = {"DeepSeek-V2-Lite": "lite", "DeepSeek-V2": "v2"}
FOLDERS = {
    "--fp8=block": "fp8-block", "--fp8=channel": "fp8-channel", "--int8": "int8", "--int4=mixed": "int4-mixed",
    "--int4=experts": "int4-experts", "--int4=pure": "int4-pure", "--int3=mixed": "int3-mixed",
    "--int2=mixed": "int2-mixed",
}  # fmt: skip
GGUF = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "DSV2_Q4_K_M", "IQ4_XS", "Q3_K_M", "DSV2_Q3_K_M", "IQ3_XS", "IQ3_XXS",
    "DSV2_IQ3_XXS", "Q2_K", "IQ2_M", "DSV2_IQ2_M", "IQ2_XXS", "DSV2_IQ2_XXS", "IQ1_M", "TQ1_0",
)  # fmt: skip
# Mixes with types that llama-quantize wants an importance matrix for.
MEASURED = (
    "IQ3_XS", "IQ3_XXS", "DSV2_IQ3_XXS", "IQ2_M", "DSV2_IQ2_M", "IQ2_XXS", "DSV2_IQ2_XXS", "IQ1_M",
)  # fmt: skip
CONTEXT = 32_768  # tokens of the cache, of one text
CARDS = (8, 16, 24, 48, 80, 141)  # GB
RAM = (16, 32, 64, 128, 192, 256, 384)  # GB
COMPUTING = GIB  # of each GPU, for activations and buffers
SYSTEM = 4 * GIB  # of the main memory, for all else


class Size(NamedTuple):
    """Bytes of a plan's tensors, and of the routed experts among them."""

    options: str
    weights: int
    experts: int

    @property
    def is_gguf(self) -> bool:
        return self.options.startswith("--gguf")


def sizes(checkpoint: dq.Checkpoint) -> Iterator[Size]:
    """Of every artifact of the tables."""
    for words, scheme in FOLDERS.items():
        entries = dq.plan(checkpoint, scheme=scheme).entries
        yield Size(words, sum(e.nbytes for e in entries), sum(e.nbytes for e in entries if e.spec.expert is not None))
    for name in GGUF:
        assert name in FILE_TYPES or name in PRESETS
        measured = importance(checkpoint.config) if name in MEASURED else None
        plan = make_gguf_plan(checkpoint, Options(name, imatrix=measured))
        experts = sum(e.nbytes for e in plan.entries if e.tensor.specs[0].expert is not None)
        yield Size(f"--gguf {name}", plan.bytes_out, experts)


def importance(config: ModelConfig) -> Imatrix:
    """One that has every tensor: a plan asks for no more of it."""
    zero = np.zeros(1, np.float32)
    tensors = [tensor for tensor in architecture(config).gguf_tensors() if len(tensor.shape) > 1]
    entries = {
        t.name: FileEntry(np.broadcast_to(zero, (t.matrices, t.shape[-1])), np.broadcast_to(zero, (t.matrices,)))
        for t in tensors
    }
    return Imatrix(entries, (), 0, 0)


def held(size: Size, config: ModelConfig, gpus: int) -> float:
    """Bytes that the fullest of so many GPUs holds. A folder is split by tensors, and latents lie on every GPU; a GGUF
    file by layers, which take their part of the cache with them."""
    layers = config.num_hidden_layers
    by_layers = math.ceil(layers / gpus) / layers
    if size.is_gguf:
        return (size.weights + cached(config)) * by_layers + COMPUTING
    return size.weights / gpus + cached(config) + COMPUTING


def counts(size: Size, config: ModelConfig) -> list[str]:
    """How many GPUs of each card's memory hold it all, nothing where more than 8 would."""
    fits = {gb: [n for n in (1, 2, 4, 8) if held(size, config, n) <= card_capacity(f"{gb}GB")] for gb in CARDS}
    return [str(found[0]) if found else "" for found in fits.values()]


def offloaded(size: Size, config: ModelConfig) -> str:
    """A GPU that holds all but the routed experts, and the main memory that these take."""
    if not size.is_gguf:
        return ""
    needed = size.weights - size.experts + cached(config) + COMPUTING
    gpu = next(gb for gb in CARDS if needed <= card_capacity(f"{gb}GB"))
    return f"{gpu} + {next(gb for gb in RAM if size.experts + SYSTEM <= gb * GIB)}"


def on_processors(size: Size, config: ModelConfig) -> str:
    """The main memory that takes it all."""
    needed = size.weights + cached(config) + SYSTEM
    return str(next(gb for gb in RAM if needed <= gb * GIB)) if size.is_gguf else ""


def cached(config: ModelConfig) -> int:
    """Bytes of a cache in BF16."""
    return CONTEXT * cache_per_token(config, Workload((1,), (CONTEXT,)))


def table(checkpoint: dq.Checkpoint) -> list[str]:
    """The lines of a model's table."""
    parameters = sum(weight.spec.size for weight in checkpoint.weights)
    config = checkpoint.config
    lines = [
        f"A cache of {CONTEXT:,} tokens takes {cached(config) / 1e9:.2f} GB, in BF16.",
        "",
        f"| options | GB | bits/weight | experts, GB | {' | '.join(f'{gb} GB' for gb in CARDS)} | GPU + main | main |",
        f"|---|--:|--:|--:|{'--:|' * len(CARDS)}--:|--:|",
    ]
    for size in sizes(checkpoint):
        options = f"`{size.options}`" + (" `--imatrix FILE`" if size.options.split()[-1] in MEASURED else "")
        cells = (
            options, f"{size.weights / 1e9:.1f}", f"{8 * size.weights / parameters:.2f}", f"{size.experts / 1e9:.1f}",
            *counts(size, config), offloaded(size, config), on_processors(size, config),
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def tables(folder: Path, models: Mapping[str, str] = MODELS) -> dict[str, list[str]]:
    """The lines of each model's table, of headers that are written into a folder."""
    found = {}
    for model, name in models.items():
        checkpoint = dq.open(tiny.write_headers(folder / model, gguf_tiny.PUBLISHED[name]))
        found[model] = table(checkpoint)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for model, lines in tables(Path(folder)).items():
            print(f"## {model}\n", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
