"""llama.cpp's tools, as build.py leaves them in build/llama.cpp."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf_tiny import PRE_TOKENIZERS

from dsv2quant.formats.gguf.blocks import nbytes

ROOT = Path(__file__).parents[3] / "build" / "llama.cpp"
BIN = ROOT / "build" / "bin"
# The converter knows the tokenizers of published models by a hash; of ours it is told which. SentencePiece's
# package, which it imports before it finds that a model has no vocabulary of that kind, need not be there.
CONVERTER = """
import sys
sys.path.insert(0, sys.argv[1])
import convert_hf_to_gguf
from conversion.base import TextModel
pre = sys.argv.pop(2)
TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
def without(self):
    raise FileNotFoundError
TextModel._create_vocab_sentencepiece = without
sys.argv = sys.argv[1:]
convert_hf_to_gguf.main()
"""


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command, with its output in the error where it fails."""
    words = [str(word) for word in command]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        words,
        cwd=cwd,
        env=environment,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done


def tool(name: str, *args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run(BIN / f"llama-{name}", *args, cwd=cwd)


def convert(model: Path, out: Path) -> Path:
    """The model as a GGUF file in BF16; one with plain attention as DeepSeek-OCR's, which the converter knows it by."""
    raw = json.loads((model / "config.json").read_text())
    if raw.get("use_mla") is False:
        model = _as_ocr(model, raw, out.with_suffix(".ocr"))
    pre = PRE_TOKENIZERS.get(model.name, "deepseek-llm")
    run(sys.executable, "-c", CONVERTER, ROOT, pre, model, "--outfile", out, "--outtype", "bf16")
    return out


def _as_ocr(model: Path, raw: dict[str, Any], folder: Path) -> Path:
    """The same files with the configuration of DeepSeek-OCR, in a folder of the same name."""
    copy = folder / model.name
    shutil.copytree(model, copy)
    whole = {"architectures": ["DeepseekOCRForCausalLM"], "model_type": "deepseek_vl_v2", "language_config": raw}
    (copy / "config.json").write_text(json.dumps(whole))
    return copy


def quantize(source: Path, out: Path, file_type: str, *options: str) -> Path:
    """`source` quantized, with our options; a relative path among them is one in the folder of `out`."""
    tool("quantize", *own_options(options), source, out, file_type, 2, cwd=out.parent)
    return out


def own_options(options: Sequence[str]) -> list[str]:
    """Our options as llama-quantize writes them."""
    return [word.replace("--output-type", "--output-tensor-type") for word in options]


def quantize_chunk(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """float32 [rows, cols] → uint8 [rows, bytes of a row] by ggml's library; `importance` float32 [cols]."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function = ctypes.CDLL(str(BIN / "libggml-base.so")).ggml_quantize_chunk
    function.argtypes = [ctypes.c_int, pointer, pointer, integer, integer, integer, pointer]
    function.restype = ctypes.c_size_t
    x = np.ascontiguousarray(x, np.float32)
    out = np.empty((len(x), nbytes(name, x.shape[1:])), np.uint8)
    weights = None if importance is None else importance.ctypes.data
    function(GGMLQuantizationType[name], x.ctypes.data, out.ctypes.data, 0, *x.shape, weights)
    return out


def imatrix(source: Path, text: Path, out: Path, chunks: int, length: int) -> Path:
    """llama-imatrix on the first chunks of a text, which lies in the folder of `out`."""
    words = ["-m", source, "-f", text.name, "-o", out.name, "-c", length, "--chunks", chunks, "--no-ppl", "-t", 2]
    tool("imatrix", *words, cwd=out.parent)
    return out


def split(source: Path, prefix: Path, size: str) -> list[Path]:
    """The files that `source` is split into, in order; `size` as "2MB", which gguf-split writes 2M."""
    tool("gguf-split", "--split", "--split-max-size", size.removesuffix("B"), source, prefix)
    return sorted(prefix.parent.glob(f"{prefix.name}-*-of-*.gguf"))
