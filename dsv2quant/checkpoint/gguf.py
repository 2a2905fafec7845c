"""Opening a GGUF file as a checkpoint: the weights of the model, each with the bytes that hold it.

A tensor of the file is one weight, or stacks a layer's routed experts, or is a half of kv_b_proj (`GgufTensor`). An
expert's part is its slice of the stack, so that it can be read alone. Split files are put together as llama.cpp does
(src/llama-model-loader.cpp).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.deepseek_v2 import architecture
from dsv2quant.arch.spec import GgufTensor, TensorSpec
from dsv2quant.checkpoint.weights import Weight
from dsv2quant.errors import InputError, listing
from dsv2quant.formats.gguf import blocks
from dsv2quant.formats.gguf.hf_config import model_config
from dsv2quant.storage.gguf import Container, TensorHeader, read
from dsv2quant.storage.safetensors import PLAIN_DTYPES, StoredTensor

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_AGAIN = "get the file again"


@dataclass(frozen=True)
class Opened:
    """A model's files in order, of which the first has the metadata, and what they hold."""

    files: list[Container]
    raw_config: dict[str, Any]
    config: ModelConfig
    weights: list[Weight]


def open_files(path: Path) -> Opened:
    """Open a GGUF file, and those it was split into. Raises InputError for a file of another kind or architecture, and
    for tensors that are missing, surplus, mis-shaped or of a type that can't be decoded."""
    files = _files(path)
    held = _index(files)
    raw_config = model_config(files[0].metadata, path, tied="output.weight" not in held)
    config = ModelConfig.from_dict(raw_config, path)
    return Opened(files, raw_config, config, _weights(config, held, path))


def decode(tensors: list[tuple[StoredTensor, np.ndarray]]) -> np.ndarray:
    """A weight's parts with their bytes (uint8) → the weight in Hugging Face's layout, float32.

    kv_b_proj is put together from attn_k_b [heads, kv_lora, nope] and attn_v_b [heads, v, kv_lora]:
    [heads · (nope + v), kv_lora].
    """
    parts = [blocks.decode(t.dtype, data.reshape(-1, blocks.nbytes(t.dtype, t.shape[-1:]))) for t, data in tensors]
    values = [part.reshape(t.shape) for (t, _), part in zip(tensors, parts, strict=True)]
    if len(values) == 1:
        return values[0]
    k_b, v_b = values
    return np.concatenate([k_b.swapaxes(1, 2), v_b], 1).reshape(-1, v_b.shape[-1])


def _files(path: Path) -> list[Container]:
    """The file, or all that it was split into, in order."""
    if not path.is_file():
        raise InputError("no such file", where=path, fix="give a GGUF file")
    opened = read(path)
    count = _integer(opened, "split.count", 1)
    if count <= 1:
        return [opened]
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        fix = f"its name must end in -00001-of-{count:05d}.gguf"
        raise InputError(f"is one of {count} files, but not named so", where=path, fix=fix)
    paths = [path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        what = f"{len(missing)} of {count} files are missing: {listing(missing)}"
        raise InputError(what, where=path.parent, fix="all files of a split model lie in one folder")
    files = [opened if p == path else read(p) for p in paths]
    total = sum(len(file.tensors) for file in files)
    wanted_by_key = {"split.no": range(count), "split.count": [count] * count, "split.tensors.count": [total] * count}
    for key, values in wanted_by_key.items():
        for file, wanted in zip(files, values, strict=True):
            if (found := _integer(file, key, None)) != wanted:
                raise InputError(
                    f"{key} is {found}, not {wanted}", where=file.path, fix="files of two models are mixed"
                )
    return files


def _integer(file: Container, key: str, default: int | None) -> int:
    value = file.metadata[key].value if key in file.metadata else default
    if type(value) is not int:
        raise InputError(f"{key} is {value!r}, not an integer", where=file.path, fix=_AGAIN)
    return value


def _index(files: list[Container]) -> dict[str, StoredTensor]:
    held: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in held:
                what = f"{tensor.name} lies in {held[tensor.name].file} too"
                raise InputError(what, where=file.path, fix="each tensor must lie in one file")
            if tensor.type not in blocks.DECODABLE:
                what = f"{tensor.name} has the type {tensor.type}"
                raise InputError(what, where=file.path, fix=f"it must be one of {', '.join(blocks.DECODABLE)}")
            held[tensor.name] = _stored(tensor, file.path.name)
    return held


def _stored(t: TensorHeader, file: str) -> StoredTensor:
    return StoredTensor(t.name, t.type, t.shape, file, t.begin, t.nbytes)


def _weights(config: ModelConfig, held: dict[str, StoredTensor], where: Path) -> list[Weight]:
    """Every weight of the model with its parts by kind of tensor ('ffn_up_exps'); the file must hold these alone."""
    tensors = architecture(config).gguf_tensors()
    expected = {tensor.name: tensor for tensor in tensors}
    for names, what in (
        ([name for name in expected if name not in held], "that its metadata implies are missing"),
        ([name for name in held if name not in expected], "that its metadata does not imply"),
    ):
        if names:
            raise InputError(f"{len(names)} tensors {what}: {listing(names)}", where=where, fix=_AGAIN)
    parts: dict[TensorSpec, dict[str, StoredTensor]] = {}
    for tensor in tensors:
        stored = held[tensor.name]
        if stored.shape != tensor.shape:
            what = f"{tensor.name} has shape {list(stored.shape)}, its metadata implies {list(tensor.shape)}"
            raise InputError(what, where=where, fix=_AGAIN)
        for spec, part in _parts(tensor, stored):
            parts.setdefault(spec, {})[tensor.kind] = part
    return [Weight(spec, _scheme(parts[spec]), parts[spec]) for spec in architecture(config).specs()]


def _parts(tensor: GgufTensor, stored: StoredTensor) -> list[tuple[TensorSpec, StoredTensor]]:
    """The slices of a stack of experts, or the whole tensor."""
    if tensor.specs[0].expert is None:
        return [(tensor.specs[0], stored)]
    size = stored.nbytes // len(tensor.specs)
    return [
        (spec, replace(stored, shape=spec.shape, begin=stored.begin + i * size, nbytes=size))
        for i, spec in enumerate(tensor.specs)
    ]


def _scheme(parts: dict[str, StoredTensor]) -> str:
    types = dict.fromkeys(part.dtype for part in parts.values())
    return "bf16" if types.keys() <= set(PLAIN_DTYPES) else "+".join(types).lower()
