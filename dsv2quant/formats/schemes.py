"""The table of schemes: the codec of each, and those that a weight can be quantized from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dsv2quant.formats.codec import F32, Bf16, Codec, widened
from dsv2quant.formats.fp8 import Fp8, decode_block_to_float32
from dsv2quant.formats.int4 import W4A8, Int4
from dsv2quant.formats.int8 import Int8
from dsv2quant.formats.transposed import Awq, Gptq

# Where a weight has the parts of several, the first that its checkpoint's configuration lets pass is its scheme.
CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Bf16(), F32(), Fp8("block"), Fp8("channel"), Fp8("tensor", "static"), Fp8("tensor", "autofp8"), Fp8("tensor"),
        Int8(), W4A8(), Int4(128), Int4(64), Int4(32), Int4(None),
        Gptq(128), Gptq(64), Gptq(32), Gptq(None), Awq(128), Awq(64), Awq(32),
    )
}  # fmt: skip
UNQUANTIZED = frozenset(name for name, codec in CODECS.items() if codec.quant_method is None)


def _plain(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    (stored,) = parts.values()
    return stored if stored.dtype == np.uint16 else stored.astype(np.float32, copy=False)


def _blocks(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    scales = parts["weight_scale_inv"]
    wide = widened(scales) if scales.dtype == np.uint16 else scales.astype(np.float32, copy=False)
    return decode_block_to_float32(parts["weight"], wide)


# The schemes of a source: stored parts by suffix (BF16 as bits, F8_E4M3 as codes) → the weight as codecs take it, BF16
# bits (uint16) or float32, without torch.
SOURCES: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {"bf16": _plain, "fp8-block": _blocks}
