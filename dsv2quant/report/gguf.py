"""What a GGUF file says of itself beside its weights: its file type, and how many tensors have which block type."""

from __future__ import annotations

from collections import Counter

from gguf import LlamaFileType

from dsv2quant.checkpoint import Checkpoint
from dsv2quant.formats.gguf.container import Metadata

_LATER = {"41": "Q2_0"}  # what the library doesn't know yet


def file_type(metadata: Metadata) -> str | None:
    """'Q4_K_M' of `general.file_type`; its number where that is unknown (llama.h, llama_ftype), None without one."""
    found = metadata.get("general.file_type")
    if found is None:
        return None
    try:
        return LlamaFileType(found.value).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return _LATER.get(str(found.value), str(found.value))


def tensor_types(checkpoint: Checkpoint) -> dict[str, int]:
    """Tensors of the file by block type, the most frequent first."""
    types = {part.name: part.dtype for weight in checkpoint.weights for part in weight.parts.values()}
    return dict(Counter(types.values()).most_common())
