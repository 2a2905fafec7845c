"""The table of schemes: the codec of each."""

from __future__ import annotations

from dsv2quant.formats.codec import Bf16, Codec
from dsv2quant.formats.fp8 import Fp8
from dsv2quant.formats.int4 import W4A8, Int4
from dsv2quant.formats.int8 import Int8
from dsv2quant.formats.transposed import Awq, Gptq

# Where a weight has the parts of several, the first that its checkpoint's configuration lets pass is its scheme.
CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Bf16(), Fp8("block"), Fp8("channel"), Fp8("tensor", "static"), Fp8("tensor", "autofp8"), Fp8("tensor"),
        Int8(), W4A8(), Int4(128), Int4(64), Int4(32), Int4(None),
        Gptq(128), Gptq(64), Gptq(32), Gptq(None), Awq(128), Awq(64), Awq(32),
    )
}  # fmt: skip
