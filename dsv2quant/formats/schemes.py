"""The table of schemes: the codec of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv2quant.formats.codec import Bf16
from dsv2quant.formats.fp8 import Fp8
from dsv2quant.formats.int4 import Int4
from dsv2quant.formats.transposed import Awq, Gptq

if TYPE_CHECKING:
    pass
from dsv2quant.formats.codec import Codec

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Bf16(), Fp8("block"), Fp8("channel"), Fp8("tensor", "static"), Fp8("tensor", "autofp8"), Fp8("tensor"),
        Int4(128), Int4(64), Int4(32), Int4(None),
        Gptq(128), Gptq(64), Gptq(32), Gptq(None), Awq(128), Awq(64), Awq(32),
    )
}  # fmt: skip
