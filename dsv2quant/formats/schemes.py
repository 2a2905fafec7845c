"""The table of schemes: the codec of each, and those that a weight can be quantized from."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dsv2quant.formats.codec import F32, Bf16, Codec, as_float32
from dsv2quant.formats.fp8 import Fp8, decode_block_to_float32
from dsv2quant.formats.int4 import W4A8, FewBits, Int4
from dsv2quant.formats.int8 import Int8
from dsv2quant.formats.transposed import Awq, Gptq

# Where a weight has the parts of several, the first that its checkpoint's configuration lets pass is its scheme.
CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Bf16(), F32(), Fp8("block"), Fp8("channel"), Fp8("tensor", "static"), Fp8("tensor", "autofp8"), Fp8("tensor"),
        Int8(), W4A8(), Int4(128), Int4(64), Int4(32), Int4(None),
        FewBits(3, 128), FewBits(3, 64), FewBits(3, 32), FewBits(2, 128), FewBits(2, 64), FewBits(2, 32),
        Gptq(128), Gptq(64), Gptq(32), Gptq(None), Awq(128), Awq(64), Awq(32),
        Gptq(128, 3), Gptq(64, 3), Gptq(32, 3), Gptq(128, 2), Gptq(64, 2), Gptq(32, 2),
    )
}  # fmt: skip
UNQUANTIZED = frozenset(name for name, codec in CODECS.items() if codec.quant_method is None)


def _blocks(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    return decode_block_to_float32(parts["weight"], as_float32(parts["weight_scale_inv"]))


def _plain(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    (stored,) = parts.values()
    return stored if stored.dtype == np.uint16 else as_float32(stored)


# The schemes that a weight can be quantized from.
SOURCES = frozenset({"bf16", "fp8-block", "fp8-channel", "int4-g128", "int4-g64", "int4-g32", "int4-channel"})
# Of those that are decoded without torch: stored parts by suffix, as `HELD_AS` has them → the weight as codecs take it,
# BF16 bits (uint16) or float32.
DECODERS: dict[str, Callable[[Mapping[str, np.ndarray]], np.ndarray]] = {"bf16": _plain, "fp8-block": _blocks}
# What a consumer multiplies with in place of what `decode` gives, by consumer and scheme: parts, dtype → weight.
SERVED = {("vllm", "w4a8-g128"): W4A8.decode_as_vllm}
