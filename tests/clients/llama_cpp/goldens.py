"""Make the goldens of GGUF from llama.cpp: tests/golden/gguf_blocks.json of its library, and gguf_files.json and
gguf_types.json of its tools.

Run it after `make test-clients` has built them:
    PYTHONPATH=.:tests .venv/bin/python tests/clients/llama_cpp/goldens.py
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf_cases
import gguf_expected
import gguf_tiny
import llama_cpp_tools as llama
from gguf_expected import CASES, OPTIONS, crc, keys_and_values, types_and_digests

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.arch.spec import GgufTensor
from dsv2quant.formats.gguf.blocks import NEEDY, TYPES, nbytes
from dsv2quant.planning.gguf_keys import model_keys
from dsv2quant.storage import gguf as container
from dsv2quant.storage.gguf import TensorHeader, Value, string

GOLDEN = Path(__file__).parents[2] / "golden"
MIXES = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S", *gguf_expected.LOW_TYPES,
)  # fmt: skip


def blocks() -> dict[str, Any]:
    """{type: {matrix: a digest for each importance}}; null where the type can't be had without."""
    cases = gguf_cases.matrices().items()
    return {
        name: {
            case: [
                None if weights is None and name in NEEDY else gguf_cases.digest(llama.quantize_chunk(name, x, weights))
                for weights in gguf_cases.importances(x.shape[1])
            ]
            for case, x in cases
        }
        for name in TYPES
        if TYPES[name].values > 1
    }


def files(folder: Path) -> dict[str, Any]:
    """What each model is in each case: types and digests of tensors, metadata, digests of split files."""
    paths = gguf_tiny.write(folder)
    found: dict[str, Any] = {"cases": {}, "metadata": {}, "split": {}}
    for model in gguf_tiny.MODELS:
        source = llama.convert(paths[model], folder / f"{model}.gguf")
        # as `--imatrix` names it, which the file repeats
        gguf_expected.write_imatrix(folder / "imatrix.gguf", model)
        for case in (case for case in CASES if case.model == model):
            options = [*OPTIONS.get(case.options, ()), *["--imatrix", "imatrix.gguf"] * case.weighted]
            out = llama.quantize(source, folder / "out.gguf", case.file_type, *options)
            made = container.read(out)
            _, types, digests = zip(*types_and_digests(made), strict=True)
            runs = [f"{len(list(run))} {name}" for name, run in groupby(types)]
            found["cases"][str(case)] = {
                "types": ", ".join(runs), "tensors": "".join(digests), "file": crc(out.read_bytes()),
            }  # fmt: skip
            if case.file_type == "Q4_K_M" and not case.options:
                found["metadata"][f"{model}{'-imatrix' * case.weighted}"] = keys_and_values(made)
                if not case.weighted and model in gguf_expected.SPLIT_MODELS:
                    shards = llama.split(out, folder / f"split-{model}", gguf_expected.SPLIT_SIZE)
                    found["split"][model] = {
                        shard.name.removeprefix("split-"): crc(shard.read_bytes()) for shard in shards
                    }
        source.unlink()
    return found


def types(folder: Path) -> dict[str, Any]:
    """What `llama-quantize --dry-run` chooses for the published models, of files that are headers and holes."""
    gguf_tiny.write(folder)
    base = container.read(llama.convert(folder / "tiny-lite", folder / "tiny.gguf")).metadata
    found: dict[str, Any] = {}
    for model, raw in gguf_tiny.PUBLISHED.items():
        config = model_config(raw, "config.json")
        tensors = architecture(config).gguf_tensors()
        source = sparse(folder / f"{model}.gguf", config, dict(base), tensors)
        gguf_expected.write_imatrix(folder / "imatrix.gguf", "tiny-odd")
        for mix in MIXES:
            plain = choices(source, mix, [], tensors)
            weighted = choices(source, mix, ["--imatrix", "imatrix.gguf"], tensors)
            found[f"{model}-{mix}"] = plain
            if weighted != plain:
                found[f"{model}-{mix}-imatrix"] = weighted
        for name, options in OPTIONS.items():
            found[f"{model}-Q4_K_M-{name}"] = choices(source, "Q4_K_M", llama.own_options(options), tensors)
    return found


def sparse(path: Path, config: ModelConfig, metadata: dict[str, Value], tensors: list[GgufTensor]) -> Path:
    """A model of any size: no data, and the tokenizer of another."""
    keys = {key: value for key, value in metadata.items() if not key.startswith("deepseek2.")}
    metadata = keys | {"general.architecture": string(config.gguf)} | model_keys(config, {}, drop_expert_groups=False)
    headers, begin = [], 0
    for tensor in tensors:
        kind = "F32" if len(tensor.shape) == 1 or tensor.kind == "ffn_gate_inp" else "BF16"
        header = TensorHeader(tensor.name, kind, tensor.shape, begin, nbytes(kind, tensor.shape))
        headers.append(header)
        begin += container.padded(header.nbytes)
    with path.open("wb") as file:
        file.write(container.pack_header(metadata, headers))
        file.truncate(file.tell() + begin)
    return path


def choices(source: Path, mix: str, options: list[str], tensors: list[GgufTensor]) -> dict[str, Any]:
    """The type of each kind of tensor, by layers where they differ; the file's MiB; how many fell back.

    What is kept F32 is not listed, and under "*" is the type of all others.
    """
    done = llama.tool("quantize", "--dry-run", *options, source, mix, cwd=source.parent)
    text = done.stdout + done.stderr
    chosen = dict(re.findall(r"\] +(\S+) +- \[.*MiB \((\S+)\)$", text, re.MULTILINE))
    kinds: dict[str, dict[str, list[int | None]]] = {}
    for tensor in tensors:
        if tensor.name in chosen:
            kinds.setdefault(tensor.kind, {}).setdefault(chosen[tensor.name].upper(), []).append(tensor.layer)
    types = {kind: next(iter(layers)) if len(layers) == 1 else layers for kind, layers in kinds.items()}
    most = Counter(kind for kind in types.values() if isinstance(kind, str)).most_common(1)[0][0]
    match = re.search(r"(\d+) of \d+ tensor\(s\) required fallback", text)
    return {
        "types": {"*": most} | {kind: name for kind, name in types.items() if name != most},
        "MiB": float(re.findall(r"quant size += +([\d.]+) MiB", text)[0]),
        "fallbacks": int(match[1]) if match else 0,
    }


def dump(content: dict[str, Any], depth: int) -> str:
    """JSON with one line for each entry, of `depth` levels."""
    items = (f"{json.dumps(k)}: {dump(v, depth - 1) if depth > 1 else json.dumps(v)}" for k, v in content.items())
    return "{\n" + ",\n".join(items) + "\n}"


def main() -> None:
    (GOLDEN / "gguf_blocks.json").write_text(dump(blocks(), 2) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        (GOLDEN / "gguf_types.json").write_text(dump(types(Path(folder)), 1) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        (GOLDEN / "gguf_files.json").write_text(dump(files(Path(folder)), 2) + "\n")


if __name__ == "__main__":
    main()
