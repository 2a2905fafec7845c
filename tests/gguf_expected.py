"""What the tests of whole GGUF files share: an importance matrix, digests of files, and the cases to compare."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import gguf_tiny
import numpy as np
import tiny
from gguf import GGUFWriter
from gguf_cases import bell

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.decoder import architecture
from dsv2quant.arch.families import model_config
from dsv2quant.arch.spec import GgufTensor
from dsv2quant.storage.gguf import Container

# Of the other families' models, whose types gguf_types.json has.
FAMILY_TYPES = ("Q8_0", "Q4_0", "Q4_K_M", "Q6_K", "IQ4_XS")
FILE_TYPES = ("Q8_0", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_M", "Q2_K", "IQ4_XS")
OTHER_TYPES = ("BF16", "F16", "Q5_0", "Q5_1", "Q4_1", "Q5_K_S", "Q3_K_L", "Q3_K_S", "IQ4_NL")
LOW_TYPES = (
    "TQ1_0", "TQ2_0", "MXFP4_MOE", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS",
    "IQ1_M", "IQ1_S",
)  # fmt: skip
# Our options, and llama-quantize's where they differ.
OPTIONS = {
    "output": ("--output-type", "Q5_K", "--token-embedding-type", "q4_0"),
    "patterns": ("--tensor-type", "ffn_down_exps=Q8_0", "--tensor-type", r"blk\.[02]\.ffn_(gate|up)=q6_k",
                 "--tensor-type", "ATTN_Q=q5_1", "--tensor-type", "ffn_down=q2_k"),
    # A model without experts counts the tensors that are left to the mix.
    "counted": ("--tensor-type", r"blk\.0\.(ffn_down|attn_v)=q8_0"),
    "everything": ("--tensor-type", "attn_k_b=q8_0", "--tensor-type", "output=q8_0", "--tensor-type", "weight=iq4_xs",
                   "--output-type", "f16"),
}  # fmt: skip
SPLIT_SIZE, SPLIT_MODELS = "2MB", ("dsv2-mini", "tiny-lite", "tiny-v2")


class Case(NamedTuple):
    """A model converted to a file type, with or without the importance matrix, with a choice of OPTIONS."""

    model: str
    file_type: str
    weighted: bool
    options: str = ""

    def __str__(self) -> str:
        return "-".join([self.model, self.file_type, *["imatrix"] * self.weighted, *filter(None, [self.options])])


CASES = [
    *(
        Case(m, t, weighted)
        for m in gguf_tiny.MODELS
        for t in (FAMILY_TYPES if m in gguf_tiny.FAMILY else FILE_TYPES)
        for weighted in (False, True)
    ),
    *(Case("tiny-v2", t, weighted) for t in OTHER_TYPES for weighted in (False, True)),
    *(Case(m, t, True) for m in ("tiny-lite", "tiny-v2") for t in LOW_TYPES),
    *(Case(m, t, False) for m in ("tiny-lite", "tiny-v2") for t in ("IQ3_M", "IQ3_S")),
    *(Case("tiny-v2", "Q4_K_M", False, options) for options in OPTIONS if options != "counted"),
    *(Case("tiny-lite", "Q3_K_M", True, options) for options in OPTIONS if options != "counted"),
    Case("tiny-llama", "Q4_K_M", False, "counted"),
]


def config_of(model: str) -> ModelConfig:
    raw = gguf_tiny.CONFIGS.get(model) or json.loads((tiny.MINI / "config.json").read_text())
    return model_config(raw, "config.json")


class _NoArchitecture(GGUFWriter):
    def add_architecture(self) -> None:
        pass


def write_imatrix(path: Path, model: str) -> Path:
    """An importance matrix as llama-imatrix lays it out: sums of squares and counts, one count per expert.

    In every layer the last expert was never routed to and the first saw one token; some channels never fired; and the
    last layer's attn_output is missing. The entries are those of matrices in layers, routers included.
    """
    writer = _NoArchitecture(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["one.txt", "two.txt"])
    writer.add_uint32("imatrix.chunk_count", 9)
    writer.add_uint32("imatrix.chunk_size", 512)
    config = config_of(model)
    missing = f"blk.{config.num_hidden_layers - 1}.attn_output.weight"
    for tensor in sorted(architecture(config).gguf_tensors(), key=lambda tensor: tensor.name):
        if tensor.layer is not None and len(tensor.shape) > 1 and tensor.name != missing:
            sums, counts = _sums(tensor)
            writer.add_tensor(f"{tensor.name}.in_sum2", sums)
            writer.add_tensor(f"{tensor.name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _sums(tensor: GgufTensor) -> tuple[np.ndarray, np.ndarray]:
    """Σ x² float32 [columns] and the count [1]; of experts [experts, columns] and [experts, 1].

    The halves of kv_b_proj have the sums of all heads, [heads · columns], and one count.
    """
    x = bell((tensor.matrices, tensor.shape[-1]), zlib.crc32(tensor.name.encode()) ^ 1)
    counts = np.full((tensor.matrices, 1), 4608, np.float32)
    if tensor.kind.endswith("_exps"):
        counts[:, 0] = (np.arange(tensor.matrices) * 1299 + 1) % 4001
        counts[-1] = 0
    sums = x * x * counts * np.ldexp(np.float32(1), np.rint(x * np.float32(6)).astype(int))
    sums[np.abs(x) < 1 / 32] = 0
    if tensor.kind.endswith("_exps"):
        return sums, counts
    return sums.reshape(-1), counts[0]


def crc(data: bytes | memoryview) -> str:
    return f"{zlib.crc32(data):08x}"


def types_and_digests(container: Container) -> list[list[str]]:
    """[name, type, CRC-32 of the bytes] of every tensor, in the order of the file."""
    data = memoryview(container.path.read_bytes())[container.data_start :]
    return [[t.name, t.type, crc(data[t.begin : t.begin + t.nbytes])] for t in container.tensors]


def keys_and_values(container: Container) -> list[list[Any]]:
    """[key, type, value] in the order of the file, a long value as its CRC-32."""
    found = []
    for key, value in container.metadata.items():
        text = json.dumps(value.value)
        kind = value.type.name + "[]" * value.is_array
        found.append([key, kind, value.value if len(text) < 100 else f"CRC-32 {crc(text.encode())}"])
    return found
