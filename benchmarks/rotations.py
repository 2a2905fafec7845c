"""What orthogonal rotations that are baked into the weights change, format by format: an ablation.

    python benchmarks/rotations.py --scratch DIR --results benchmarks/results/rotations.csv

Rotated, exactly but for rounding, computed in float64, signs drawn at random before a Hadamard matrix:

- latent: rows of kv_a that make the latent, and kv_b's columns; kv_a_layernorm's weight goes into kv_b first.
- q latent: rows of q_a, and q_b's columns; q_a_layernorm's weight goes into q_b first.
- values: each head's rows of kv_b that make its values, and o_proj's columns.
- residual: the stream between layers, so all that reads or writes it, with router, embeddings and head; norms' weights
  go into what reads them.

"folded" is the weights of the two latents' norms moved and nothing rotated: what of a change is theirs. KLD is from
the checkpoint as it was, on windows that nothing was calibrated on. Rotated weights are BF16 as the checkpoint's own
are; the format "bf16" is what that rounding alone costs. Formats: quality.py's recipes by GPTQ, and GGUF mixes with an
importance matrix. Caches: of the BF16 checkpoint, latents rounded as they are made: e4m3 under one scale for all, INT8,
INT6 and INT4 under a scale per token.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf_presets import command
from quality import CTX, MODEL, TARGETS, Evaluator, ours
from safetensors import safe_open
from safetensors.torch import save_file

from dsv2quant import __version__
from dsv2quant.bench.device import append
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.model.layers import RMSNorm
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.text.calibration import standard_library, windows
from dsv2quant.text.tokenizer import Tokenizer

Tensors = dict[str, torch.Tensor]
SETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "folded": ("folded",),
    "latent": ("latent",),
    "q latent": ("q latent",),
    "values": ("values",),
    "all but residual": ("latent", "q latent", "values"),
    "residual": ("residual",),
    "all": ("latent", "q latent", "values", "residual"),
}
RECIPES = ("int4-pure", "int4-mixed", "int4-experts", "int3-experts", "int2-experts")
GGUF = ("Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_M")


def rotation(size: int, seed: int) -> torch.Tensor:
    """A Hadamard matrix [size, size] over √size, its columns' signs drawn: orthogonal. Sizes are powers of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return matrix * signs / math.sqrt(size)


def fold(tensors: Tensors, norm: str, readers: list[str]) -> None:
    """A norm's weight moves into the columns of what reads it."""
    for name in readers:
        tensors[name] = tensors[name] * tensors[norm]
    tensors[norm] = torch.ones_like(tensors[norm])


def rotate(tensors: Tensors, config: dict[str, Any], chosen: tuple[str, ...]) -> None:
    """Rotate a DeepSeek checkpoint's tensors, all float64, in place."""
    latent, heads = config["kv_lora_rank"], config["num_attention_heads"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.self_attn"
        if "latent" in chosen or "folded" in chosen:
            fold(tensors, f"{at}.kv_a_layernorm.weight", [f"{at}.kv_b_proj.weight"])
        if "latent" in chosen:
            r = rotation(latent, layer)
            kv_a, kv_b = f"{at}.kv_a_proj_with_mqa.weight", f"{at}.kv_b_proj.weight"
            tensors[kv_a] = torch.cat([r @ tensors[kv_a][:latent], tensors[kv_a][latent:]])
            tensors[kv_b] = tensors[kv_b] @ r.T
        if f"{at}.q_b_proj.weight" in tensors:
            if "q latent" in chosen or "folded" in chosen:
                fold(tensors, f"{at}.q_a_layernorm.weight", [f"{at}.q_b_proj.weight"])
            if "q latent" in chosen:
                r = rotation(config["q_lora_rank"], 100 + layer)
                tensors[f"{at}.q_a_proj.weight"] = r @ tensors[f"{at}.q_a_proj.weight"]
                tensors[f"{at}.q_b_proj.weight"] = tensors[f"{at}.q_b_proj.weight"] @ r.T
        if "values" in chosen:
            r = rotation(value, 200 + layer)
            kv_b = tensors[f"{at}.kv_b_proj.weight"].unflatten(0, (heads, nope + value))
            tensors[f"{at}.kv_b_proj.weight"] = torch.cat([kv_b[:, :nope], r @ kv_b[:, nope:]], 1).flatten(0, 1)
            o = tensors[f"{at}.o_proj.weight"].unflatten(1, (heads, value))
            tensors[f"{at}.o_proj.weight"] = (o @ r.T).flatten(1)
    if "residual" in chosen:
        _rotate_residual(tensors, rotation(config["hidden_size"], 300), config["num_hidden_layers"])


def _rotate_residual(tensors: Tensors, r: torch.Tensor, layers: int) -> None:
    """What reads the stream takes rᵀ behind it, what writes it r before."""
    reading = ("q_a_proj", "q_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj", "mlp.gate")
    writing = ("o_proj", "down_proj")
    for layer in range(layers):
        at = f"model.layers.{layer}"
        names = [name for name in tensors if name.startswith(f"{at}.") and name.endswith(".weight")]
        readers = [name for name in names if name.removesuffix(".weight").endswith(reading)]
        for norm, part in (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")):
            fold(tensors, f"{at}.{norm}.weight", [name for name in readers if f"{at}.{part}." in name])
        for name in readers:
            tensors[name] = tensors[name] @ r.T
        for name in names:
            if name.removesuffix(".weight").endswith(writing):
                tensors[name] = r @ tensors[name]
    fold(tensors, "model.norm.weight", ["lm_head.weight"])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = tensors[name] @ r.T


def write(model: Path, chosen: tuple[str, ...], out: Path) -> None:
    """The checkpoint with the chosen rotations, in BF16."""
    shutil.copytree(model, out)
    tensors: Tensors = {}
    for shard in sorted(out.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shard.unlink()
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    rotate(wide, json.loads((model / "config.json").read_text()), chosen)
    save_file({name: wide[name].to(tensors[name].dtype).contiguous() for name in tensors}, out / "model.safetensors")


def scaled(x: torch.Tensor, largest: float, along: int | None) -> torch.Tensor:
    """The scale by which the largest magnitude, of all or of each token, becomes `largest`."""
    most = x.abs().amax() if along is None else x.abs().amax(along, keepdim=True)
    return most.clamp(min=1e-12) / largest


def e4m3(x: torch.Tensor) -> torch.Tensor:
    scale = scaled(x, 448, None)
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


def integers(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = scaled(x, 2 ** (bits - 1) - 1, -1)
        return (x / scale).round() * scale

    return rounded


CACHES = {"e4m3": e4m3, "INT8": integers(8), "INT6": integers(6), "INT4": integers(4)}


class Rounding(RMSNorm):
    """A latent's norm, whose output is rounded as a cache would have it."""

    def __init__(self, norm: RMSNorm, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(norm.weight, norm.eps)
        self._how = how

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._how(super().__call__(x))


def cached(model: Model, how: Callable[[torch.Tensor], torch.Tensor]) -> Model:
    for layer in model.layers():
        layer.attention.kv_a_layernorm = Rounding(layer.attention.kv_a_layernorm, how)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--windows", type=int, default=128)
    options = parser.parse_args()
    options.scratch.mkdir(parents=True)
    evaluate = Evaluator(options.model)
    ids = windows(standard_library(), Tokenizer.open(options.model), options.windows, CTX, seed=0)
    plain: dict[str, np.ndarray] = {}  # KLD by window, of the checkpoint as it was
    rows: list[dict[str, Any]] = []
    out, turned = options.scratch / "out", options.scratch / "turned"

    def record(rotated: str, what: str, kld: np.ndarray) -> None:
        first = plain.setdefault(what, kld)
        change = kld - first
        row = {
            "model": options.model.name,
            "format": what,
            "rotated": rotated,
            "KLD": f"{kld.mean():.5f}",
            "change": f"{change.mean():+.5f} ± {change.std(ddof=1) / math.sqrt(len(kld)):.5f}",
            "ratio": f"{kld.mean() / first.mean():.3f}" if first.mean() else "",
            "tokens": evaluate.tokens,
            "cores": os.cpu_count(),
            "versions": f"dsv2quant {__version__}, torch {torch.__version__}",
        }
        print("  ".join(str(value) for value in list(row.values())[1:6]), file=sys.stderr, flush=True)
        rows.append(row)

    for name, chosen in SETS.items():
        write(options.model, chosen, turned)
        record(name, "bf16", evaluate.compare(turned).kld.mean(1))
        for how, rounded in CACHES.items():
            record(name, f"cache {how}", evaluate.compare(cached(evaluate.opened(turned), rounded)).kld.mean(1))
        for made in RECIPES:
            chosen_recipe = recipe.builtin(made, method="gptq", group_size=64)
            plan = make_plan(open_checkpoint(turned), chosen_recipe, for_targets=TARGETS)
            ours(plan, ids, out)
            record(name, made, evaluate.compare(out).kld.mean(1))
            shutil.rmtree(out)
        imatrix, statistics = options.scratch / "imatrix.gguf", options.scratch / "statistics.safetensors"
        given = ["--num-calibration-samples", options.windows, "--max-seq-length", CTX]
        command("calibrate", turned, "-o", statistics, "--imatrix", imatrix, *given, "--force")
        for mix in GGUF:
            file = options.scratch / "out.gguf"
            command("convert", turned, "--gguf", mix, "--imatrix", imatrix, "--force", "-o", file)
            record(name, mix, evaluate.compare(file).kld.mean(1))
        shutil.rmtree(turned)
    append(options.results, rows)


if __name__ == "__main__":
    main()
