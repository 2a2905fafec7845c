"""A GGUF file as a checkpoint: the weights of the model, each with the bytes that hold it.

A tensor of the file is one weight, or stacks a layer's routed experts, or is a half of kv_b_proj (`GgufTensor`). An
expert's part is its slice of the stack, so that it can be read alone. Split files are put together as llama.cpp does
(src/llama-model-loader.cpp).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from gguf import LlamaFileType

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.arch.spec import GgufTensor, TensorSpec
from dsv2quant.checkpoint.checkpoint import Checkpoint, HfCheckpoint
from dsv2quant.checkpoint.gguf_config import config_json
from dsv2quant.checkpoint.weights import BLOCKS, Weight
from dsv2quant.errors import InputError, listing, printable
from dsv2quant.formats.gguf import blocks
from dsv2quant.formats.gguf.heads import as_halves
from dsv2quant.progress import Progress
from dsv2quant.storage.gguf import Container, Metadata, read
from dsv2quant.storage.manifest import gguf_manifest
from dsv2quant.storage.safetensors import PLAIN_DTYPES, StoredTensor
from dsv2quant.text.chat import Templates
from dsv2quant.text.gguf_tokenizer import open_tokenizer
from dsv2quant.text.tokenizer import Tokenizer, checked_stop_ids

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_AGAIN = "get the file again"
_LATER = {"41": "Q2_0"}  # what the library doesn't know yet


@dataclass(eq=False)
class GgufCheckpoint(Checkpoint):
    """A GGUF file, or those that it was split into; `metadata` is the first one's. It is measured, never converted."""

    metadata: Metadata = field(kw_only=True)

    # llama.cpp multiplies by blocks as they are. Its kernels round activations to 8 bits, each backend in its own way:
    # only weights are measured.
    served_dtype = "float32"
    is_weight_only = True
    leaves_out_prediction = True

    @classmethod
    def of_file(cls, path: Path) -> GgufCheckpoint:
        """Open a file. Raises InputError for one of another kind or architecture, and for tensors that are missing,
        surplus, mis-shaped or of a type that can't be decoded."""
        files = _files(path)
        held, metadata, first = _index(files), files[0].metadata, files[0].path
        biased = any(name.endswith("attn_q.bias") for name in held)
        raw_config = config_json(metadata, path, tied="output.weight" not in held, biased=biased)
        config = model_config(raw_config, path)
        weights = _weights(config, held, path)
        data = {file.path.name: (file.path, file.data_start) for file in files}
        logger.info("%s: %d weights in %d files", first.name, len(weights), len(data))
        return cls(printable(first.name), raw_config, config, weights, list(data), data, metadata=metadata)

    def as_source(self) -> HfCheckpoint:
        fix = "give the Hugging Face checkpoint it was made from"
        raise InputError("is a GGUF file, which is not converted", where=self.model, fix=fix)

    @property
    def inputs(self) -> list[Path]:
        return [path for path, _ in self.data.values()]

    def parts(self, weight: Weight, device: str = "cpu") -> dict[str, torch.Tensor]:
        """The bytes of its blocks, uint8 [rows, bytes], of a weight that is one tensor or slice."""
        import torch

        return {BLOCKS: torch.from_numpy(self._blocks(weight.spec, weight.stored)).to(device)}

    def decode(
        self, weight: Weight, dtype: torch.dtype, device: str = "cpu", scale_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """As llama.cpp does, from scales as stored.

        kv_b_proj is put together from attn_k_b [heads, kv_lora, nope] and attn_v_b [heads, v, kv_lora]:
        [heads · (nope + v), kv_lora].
        """
        import torch

        values = [self._values(weight.spec, part) for part in weight.parts.values()]
        if len(values) == 1:
            return torch.from_numpy(values[0]).to(device, dtype)
        k_b, v_b = values
        whole = np.concatenate([k_b.swapaxes(1, 2), v_b], 1).reshape(-1, v_b.shape[-1])
        return torch.from_numpy(whole).to(device, dtype)

    def _values(self, spec: TensorSpec, part: StoredTensor) -> np.ndarray:
        """float32, in the part's shape."""
        return blocks.decode(part.dtype, self._blocks(spec, part)).reshape(part.shape)

    def _blocks(self, spec: TensorSpec, part: StoredTensor) -> np.ndarray:
        """uint8 [rows, bytes of a row], rows in the model's order; a vector's elements are rows."""
        columns = part.shape[-1:] if len(part.shape) > 1 or spec.gguf_heads is None else (1,)
        rows = self.read(part).reshape(-1, blocks.nbytes(part.dtype, columns))
        return rows if spec.gguf_heads is None else as_halves(rows, spec.gguf_heads)

    def row_decoder(self, weight: Weight, dtype: torch.dtype, device: str) -> Callable[[int, int], torch.Tensor]:
        if len(weight.parts) == 1 and weight.spec.gguf_heads is None:
            return lambda begin, end: self.decode(weight.rows(begin, end), dtype, device)
        whole = self.decode(weight, dtype, device)
        return lambda begin, end: whole[begin:end]

    def tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.metadata, self.model)

    def templates(self) -> Templates:
        return Templates.of_gguf(self.metadata, self.model)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
        return checked_stop_ids([self.metadata[key].value for key in keys if key in self.metadata], self.model)

    @property
    def manifest(self) -> Path:
        return gguf_manifest(self.data[self.files[0]][0])

    def listed_files(self) -> list[str]:
        return self.files

    def check_unlisted(self, progress: Progress, has_source: bool) -> Literal["blocks", "nothing"]:
        """Read every weight. Raises InputError at the first scale or plain value that is NaN or infinite."""
        with progress(sum(weight.nbytes for weight in self.weights), "B", "scales") as advance:
            for weight in self.weights:
                for part in weight.parts.values():
                    bad = blocks.first_bad_block(part.dtype, self.read(part))
                    if bad is not None:
                        what = f"{part.name}: block {bad:,} of {weight.spec.name} has a scale that is NaN or infinite"
                        fix = "get the file again, or convert again"
                        raise InputError(what, where=self.data[part.file][0], fix=fix)
                    advance(part.nbytes)
        return "blocks"

    def file_summary(self) -> dict[str, Any]:
        types = {part.name: part.dtype for weight in self.weights for part in weight.parts.values()}
        return {"file_type": self._file_type(), "tensor_types": dict(Counter(types.values()).most_common())}

    def _file_type(self) -> str | None:
        """'Q4_K_M' of `general.file_type`; its number where that is unknown (llama.h, llama_ftype)."""
        found = self.metadata.get("general.file_type")
        if found is None:
            return None
        try:
            return LlamaFileType(found.value).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        except ValueError:
            return _LATER.get(str(found.value), str(found.value))


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
            held[tensor.name] = StoredTensor(
                tensor.name, tensor.type, tensor.shape, file.path.name, tensor.begin, tensor.nbytes
            )
    return held


def _weights(config: ModelConfig, held: dict[str, StoredTensor], where: Path) -> list[Weight]:
    """Every weight of the model with its parts by kind of tensor ('ffn_up_exps'); beside them the file may only hold
    layers for multi-token prediction."""
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
