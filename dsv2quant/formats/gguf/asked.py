"""Whether what a plan was asked for takes effect: types for tensors, and an importance matrix."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dsv2quant.errors import InputError, UsageError, listing
from dsv2quant.formats.gguf.file_types import FILE_TYPES
from dsv2quant.formats.gguf.imatrix import Imatrix, older_names
from dsv2quant.formats.gguf.tensors import Tensor
from dsv2quant.formats.gguf.types import PLAIN, Overrides, is_tied, quantizable

if TYPE_CHECKING:
    from dsv2quant.formats.gguf.plan import Line

_UNWEIGHTED = (*PLAIN, "Q8_0")  # have no use for importance
_UNMEASURED = ("token_embd", "output")  # the first has no input; llama-imatrix skips the other if not asked for it
_NEEDY = ("Q2_K_S", "Q2_K")  # a file type, and which of its tensors' types need importance (tensor_requires_imatrix)
_LOSSY = ("Q2_K", "Q3_K_S")
_HOW = "make one with `calibrate --imatrix` or llama-imatrix"


def check_types(tensors: Sequence[Tensor], file_type: str, overrides: Overrides) -> None:
    """Raise UsageError where one of the overrides decides no tensor's type."""
    is_plain = file_type in FILE_TYPES and FILE_TYPES[file_type].default in PLAIN
    if overrides.tensor_types and is_plain:  # llama-quantize ignores them
        raise UsageError(f"--tensor-type goes with a quantized file type, not {file_type}", fix="leave it out")
    matrices = [tensor for tensor in tensors if quantizable(tensor)]
    deciding = {overrides.pattern(tensor) for tensor in matrices}
    for number, (pattern, kind) in enumerate(overrides.tensor_types):
        if number not in deciding:
            found = [tensor for tensor in tensors if re.search(pattern.lower(), tensor.name)]
            if not found:
                what, fix = "no tensor's name matches", "`plan --gguf TYPE -v` lists them"
            elif not any(map(quantizable, found)):
                what, fix = "it matches norms, biases or routers, which stay F32", "leave it out"
            else:
                what, fix = "options before it decide for all that it matches", "the first that matches decides"
            raise UsageError(f"--tensor-type {pattern}={kind.lower()}: {what}", fix=fix)
    if overrides.output_type is not None and is_tied(tensors):
        embedding = next(tensor for tensor in tensors if tensor.kind == "token_embd")
        is_given = overrides.token_embedding_type is not None or overrides.pattern(embedding) is not None
        if is_plain or is_given:
            what = f"--output-type: the model's output is its embedding, {embedding.name}"
            what += ", whose type is given" if is_given else ""
            raise UsageError(what, fix="give --token-embedding-type alone")


def importance_notes(lines: Sequence[Line], file_type: str, imatrix: Imatrix | None) -> Iterator[str]:
    """What the user should know of tensors that are quantized without importance.

    Raises UsageError or InputError where llama-quantize would refuse to, because the result would be useless.
    """
    weighted = [line for line in lines if line.type not in _UNWEIGHTED and line.tensor.kind not in _UNMEASURED]
    lacking = [line for line in weighted if imatrix is None or line.name not in imatrix.entries]
    needy = [line.name for line in lacking if (file_type, line.type) == _NEEDY]
    if imatrix is None:
        if needy:
            raise UsageError(f"{file_type} needs an importance matrix", fix=f"give --imatrix FILE: {_HOW}")
        if file_type in _LOSSY:
            yield f"{file_type} without an importance matrix loses much: see `calibrate --imatrix`"
        return
    if needy:
        what = f"lacks {listing(needy)}, which {file_type} makes {_NEEDY[1]}"
        raise InputError(what, where=imatrix.source, fix=f"{_HOW}, or give a wider type by --tensor-type")
    if lacking:
        names = listing([line.name for line in lacking])
        yield f"{imatrix.source} lacks {len(lacking)} of {len(weighted)} tensors, quantized without it: {names}"
    if older := sorted(imatrix.entries.keys() & set(older_names([line.tensor for line in lines]))):
        what = f"{imatrix.source} has {len(older)} tensors that the model has not: {listing(older)}"
        yield f"{what} (an older llama.cpp measured attn_k_b and attn_v_b as one)"
