"""The main job on the shipped checkpoint: BF16 to FP8, INT4 and GGUF, loaded by transformers and measured against BF16.

`make demo` runs this. Artifacts go to ./demo; delete the folder to start over.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.model.layers import MoE
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.report.tables import gigabytes, table

ROOT = Path(__file__).parent.parent
SOURCE = "examples/dsv2-mini"
WINDOWS = 60


def dsv2quant(*args: str) -> dict[str, Any]:
    """Show and run a command; the object it prints with --json."""
    print(f"\n$ dsv2quant {shlex.join(args)}", flush=True)
    command = [sys.executable, "-m", "dsv2quant", *args, "--json"]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if ran.returncode:
        sys.exit(ran.returncode)
    result: dict[str, Any] = json.loads(ran.stdout)
    return result


def difference_from_transformers(folder: Path) -> float:
    """Relative difference of float32 logits between transformers and the runtime, on weights alone."""
    import transformers
    from transformers.utils.quantization_config import CompressedTensorsConfig

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = (folder / "config.json").read_text()
    # Otherwise compressed-tensors quantizes the activations of FP8 linears too.
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "float-quantized" in config else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra)
    if "weight_block_size" in config:
        model = model.float()  # unquantized modules of a block-FP8 model load in BF16
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.data = parameter.data.float()  # INT4 experts load in BF16, and then compute in it
    tokens = torch.arange(512)[None] + 100
    with torch.inference_mode():
        theirs = model(tokens).logits
    runtime = Model(open_checkpoint(folder), LoadOptions(weight_only=True))
    for layer in runtime.layers() if "pack-quantized" in config else ():
        for expert in layer.ffn.experts if isinstance(layer.ffn, MoE) else ():
            for linear in (expert.gate_proj, expert.up_proj, expert.down_proj):
                linear.weight = linear.weight.bfloat16().float()  # as transformers rounds INT4 experts, and only them
    ours = runtime.forward(tokens)
    return float((ours - theirs).norm() / theirs.norm())


# Artifact, options, and whether transformers can load its weights alone (of a mixed one it quantizes activations too).
CALIBRATED = ("--num-calibration-samples", "64", "--max-seq-length", "512")
ARTIFACTS: list[tuple[str, tuple[str, ...], bool]] = [
    ("FP8 block", ("--fp8=block",), True),
    ("FP8 channel", ("--fp8=channel",), True),
    ("FP8 tensor", ("--fp8=tensor",), True),
    ("INT4 mixed", ("--int4=mixed", *CALIBRATED), False),
    ("INT4 pure", ("--int4=pure", "--target", "vllm", "--target", "transformers", *CALIBRATED), True),
    ("GGUF Q4_K_M", ("--gguf", "Q4_K_M", "--force"), False),
    ("GGUF DSV2_Q4_K_M", ("--gguf", "DSV2_Q4_K_M", "--force"), False),
]


def main() -> None:
    rows = []
    for name, options, comparable in ARTIFACTS:
        out = f"demo/dsv2-mini-{name.replace(' ', '-').upper()}{'.gguf' * ('--gguf' in options)}"
        converted = dsv2quant("convert", SOURCE, *options, "-o", out)
        measured = dsv2quant("eval-ppl", out, "--reference", SOURCE, "--ctx", "512", "--limit", str(WINDOWS))
        if comparable:
            different = difference_from_transformers(ROOT / out)
            print(f"transformers loads it; its logits and the runtime's differ by {different:.1e}", flush=True)
            if not different < 1e-5:
                sys.exit("error: they should agree to 1e-5")
        if not rows:
            ppl = measured["reference"]["perplexity"]
            size = gigabytes(converted["bytes_in"])
            rows.append(["BF16", size, "16.00", f"{ppl['value']:.3f} ± {ppl['stderr']:.3f}", "", "", ""])
        ppl, kld, ratio = measured["perplexity"], measured["kld"], measured["delta"]
        rows.append(
            [
                name,
                gigabytes(converted["bytes_out"]),
                f"{converted['bits_per_weight']:.2f}",
                f"{ppl['value']:.3f} ± {ppl['stderr']:.3f}",
                f"{100 * math.expm1(ratio['ln_ratio']):+.2f} ± {100 * ratio['stderr']:.2f}",
                f"{kld['mean']:.4f} ± {kld['stderr']:.4f}",
                f"{100 * measured['top1_agreement']:.2f}%",
            ]
        )
    text = measured["text"]["source"]
    print(f"\n{WINDOWS} windows of 512 tokens of {text}; activations as vLLM quantizes them, float32 for GGUF:\n")
    print(table(["dsv2-mini", "size", "bits/weight", "perplexity", "Δ %", "KLD, nats", "same top-1"], rows))


if __name__ == "__main__":
    main()
