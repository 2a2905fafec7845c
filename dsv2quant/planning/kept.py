"""Which weights keep the codes that a quantized source has, and what that says of how they are served."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from dsv2quant.arch.spec import TensorSpec
from dsv2quant.checkpoint.weights import Weight
from dsv2quant.formats.schemes import CODECS

POWERS_OF_TWO = "ue8m0"  # `scale_fmt` of a quantization_config whose scales are


def mark_kept(weights: Iterable[Weight], schemes: MutableMapping[TensorSpec, tuple[str, str, str | None]]) -> None:
    """Choose no codes where the source's are on the scheme's grid, whatever the method: none come nearer. Of the
    matrices of a role in a layer all or none. `schemes` has scheme, method and reason of each."""
    kinds: dict[tuple[str, int | None], list[Weight]] = defaultdict(list)
    for weight in weights:
        kinds[weight.spec.role, weight.spec.layer].append(weight)
    for alike in kinds.values():
        if all(CODECS[schemes[weight.spec][0]].keeps(weight.scheme, weight.parts) for weight in alike):
            for weight in alike:
                scheme, _, reason = schemes[weight.spec]
                schemes[weight.spec] = scheme, "rtn", reason


def has_powers_of_two(quantization: Mapping[str, Any] | None, kept: Sequence[bool]) -> bool:
    """Whether the scales of all FP8 blocks, of which `kept` says whether they are the source's, are powers of two by
    the source's configuration, as DeepSeek-V3.1's are.

    Consumers then round the scales of activations up to such (vLLM transformers_utils/config.py, for DeepGEMM), which
    is what the model was trained with, and transformers holds those of weights in e8m0 (FineGrainedFP8Config).
    """
    return (quantization or {}).get("scale_fmt") == POWERS_OF_TWO and bool(kept) and all(kept)


def kept_notes(planned: Iterable[tuple[Weight, str, bool]]) -> list[str]:
    """Which matrices keep the codes of the source, and which of INT4 would with groups as large: of each weight with
    its scheme, and whether it does."""
    kept: Counter[str] = Counter()
    sizes: set[int | None] = set()
    for weight, scheme, is_kept in planned:
        kept[scheme] += is_kept
        stored, wanted = CODECS[weight.scheme].integers, CODECS[scheme].integers
        if stored is not None and wanted is not None and stored.group_size != wanted.group_size:
            sizes.add(stored.group_size)
    found = [f"{n} matrices keep the codes and scales that the source has, as {name}" for name, n in kept.items() if n]
    return found + [f"the source has INT4: --group-size {size or 'channel'} keeps its codes" for size in sizes]
