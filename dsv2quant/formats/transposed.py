"""INT4 in AutoGPTQ's layout, `checkpoint_format: gptq` (version 1): symmetric codes with float16 scales.

    weight'[n, k] = (u − zero[g, n]) × scale[g, n]      g = g_idx[k]; u = code + 8, zero = 8

Everything is transposed. `qweight` [in / 8, out] holds eight codes to an int32 along the input, the first in the
lowest bits; `qzeros` [groups, out / 8] holds zero − 1, along the output; `scales` [groups, out]; `g_idx` [in]
(AutoGPTQ, nn_modules/qlinear/qlinear_cuda.py; SGLang 0.5.23, gptq/schemes/gptq_marlin.py). vLLM 0.33 drops `g_idx`
and, in symmetric files, takes every zero for 8. The layout can be had with every method that INT4 has, not just `gptq`.

INT3 and INT2 in it are read, as others make them, with u = code + 4 or + 2 and 32 INT3 to three words without gaps
(GPTQModel 7.7.0, nn_modules/qlinear/__init__.py, PackableQuantLinear); no consumer has a row for them.

INT4 in AutoAWQ's layout, `version: gemm`: codes with zero points, ours all 8, and float16 scales.

    weight'[n, k] = (u − zero[g, n]) × scale[g, n]      g = k // group size; u = code + 8, zero = 8

Everything is transposed, and packed along the output: `qweight` [in, out / 8], `qzeros` [groups, out / 8], `scales`
[groups, out]. Nibble i of a word holds the column `ORDER[i]` of its eight (AutoAWQ, modules/linear/gemm.py; vLLM
0.33, auto_awq.py, and SGLang 0.5.23, moe_wna16.py, have the inverse order). The layout can be had with every method
that INT4 has, not just `awq`. Per-row scales don't exist in it: vLLM and SGLang divide by the group size for experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv2quant.formats.codec import as_float32, loaded
from dsv2quant.formats.int4 import OFFSET, PER_WORD, Int4, pack_words, unpack_bits, unpack_codes, unpack_words
from dsv2quant.formats.integers import levels
from dsv2quant.storage.safetensors import Part

if TYPE_CHECKING:
    import torch


class Transposed(Int4):
    """What GPTQ's and AWQ's layouts share: an artifact has one group size, so that none finer can be tried."""

    finer = "bf16"

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """As INT4's; and rows must fill the words that are packed along the output."""
        unit = 32 // math.gcd(32, self.bits)
        ragged = f"{shape[0]} rows are not a multiple of {unit}" if shape[0] % unit else None
        return super().refusal(shape) or ragged

    def rows(self, parts: Mapping[str, torch.Tensor], begin: int, end: int) -> dict[str, torch.Tensor]:
        """The columns of transposed parts; `g_idx` is that of all."""
        mine, words = slice(begin, end), slice(begin * self.bits // 32, end * self.bits // 32)
        cut = {"qweight": words if self.family == "awq" else mine, "qzeros": words, "scales": mine}
        return {suffix: part[:, cut[suffix]] if suffix in cut else part for suffix, part in parts.items()}

    def others(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """None: zero points, and in GPTQ's the groups of columns, are always there."""
        return ()

    def encode_tensor(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        raise ValueError(f"{self.name} is packed on the CPU alone")

    def holds(self, scales: np.ndarray) -> bool:
        from dsv2quant.formats.cpu import LARGEST_FLOAT16, round_to_bf16

        return bool((round_to_bf16(scales) <= LARGEST_FLOAT16).all())

    def storable(self, scales: np.ndarray) -> np.ndarray:
        """Float16 values that BF16 holds too, so that consumers may load them in either."""
        from dsv2quant.formats.cpu import round_to_float16

        return round_to_float16(scales)


class Gptq(Transposed):
    """The codec of `gptq-g128`, `gptq-g64`, `gptq-g32` and, without a group size, `gptq-channel`; of INT3 and INT2 in
    groups, `gptq3-g128` and so on."""

    quant_method = "gptq"

    def __init__(self, group_size: int | None, bits: int = 4) -> None:
        self.bits = bits
        self.family, self.runtime = ("gptq", "gptq") if bits == 4 else (f"gptq{bits}", "decoded")
        super().__init__(group_size)

    def declared(self, ignored: Sequence[str] = ()) -> dict[str, Any]:
        """As AutoGPTQ and GPTQModel write it. What is left out are patterns of `dynamic`, matched from the start of a
        name as GPTQModel has them (vLLM gptq_utils.py, SGLang quantization/utils.py); vLLM also looks which modules
        hold integers."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size or -1,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "dynamic": {f"-:{re.escape(name)}$": {} for name in ignored},
        }

    def layout(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, cols = shape
        groups = cols // (self.group_size or cols)
        return (
            Part("qweight", "I32", (cols * self.bits // 32, rows)),
            Part("qzeros", "I32", (groups, rows * self.bits // 32)),
            Part("scales", "F16", (groups, rows)),
            Part("g_idx", "I32", (cols,)),
        )

    def pack(self, codes: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
        (rows, cols), groups, offset = codes.shape, scales.shape[1], -levels(self.bits)[0]
        return {
            "qweight": np.ascontiguousarray(pack_words((codes + np.int8(offset)).view(np.uint8), self.bits).T),
            "qzeros": pack_words(np.full((groups, rows), offset - 1, np.uint8), self.bits),
            "scales": np.ascontiguousarray(scales.T.astype(np.float16)),
            "g_idx": (np.arange(cols) // (cols // groups)).astype(np.int32),
        }

    def unpack(self, parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return unpack_codes(parts["qweight"].T, self.bits), as_float32(parts["scales"].T)

    def decode(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype, scale_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """(u − zero) × scale in float32, rounded once to `dtype`, with zero points and groups as stored: others' files
        may be asymmetric, and ordered by activation. Raises ValueError where g_idx names a group that is not there."""
        import torch

        scales, group = loaded(parts["scales"], scale_dtype), parts["g_idx"].long()
        if int(group.min()) < 0 or int(group.max()) >= len(scales):
            raise ValueError(f"g_idx names groups beyond its {len(scales)}")
        zeros, scales = (unpack_bits(parts["qzeros"], self.bits) + 1).float().T, scales.T  # [out, groups]
        weight = unpack_bits(parts["qweight"].T.contiguous(), self.bits).float()  # [out, in]
        groups = weight.unflatten(1, (scales.shape[1], -1))
        if bool((group.view(groups.shape[1:]) == torch.arange(len(groups[0]), device=group.device)[:, None]).all()):
            return groups.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).flatten(1).to(dtype)
        return weight.sub_(zeros[:, group]).mul_(scales[:, group]).to(dtype)


ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_INVERSE = tuple(int(i) for i in np.argsort(ORDER))
_AWQ_ZEROS = np.uint32(0x88888888).view(np.int32)  # eight of 8


class Awq(Transposed):
    """The codec of `awq-g128`, `awq-g64` and `awq-g32`."""

    family = quant_method = runtime = "awq"

    def declared(self, ignored: Sequence[str] = ()) -> dict[str, Any]:
        """As AutoAWQ writes it. `modules_to_not_convert` matches anywhere in a name, so that whole names are given:
        "mlp.gate" alone would also be found in `mlp.gate_proj`."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ignored,
        }

    def layout(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, cols = shape
        groups = cols // (self.group_size or cols)
        return (
            Part("qweight", "I32", (cols, rows // PER_WORD)),
            Part("qzeros", "I32", (groups, rows // PER_WORD)),
            Part("scales", "F16", (groups, rows)),
        )

    def pack(self, codes: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
        nibbles = (codes.T + np.int8(OFFSET)).view(np.uint8)  # [in, out]
        ordered = nibbles.reshape(len(nibbles), -1, PER_WORD)[:, :, ORDER]
        words = pack_words(ordered.reshape(nibbles.shape))
        return {
            "qweight": words,
            "qzeros": np.full((scales.shape[1], words.shape[1]), _AWQ_ZEROS),
            "scales": np.ascontiguousarray(scales.T.astype(np.float16)),
        }

    def unpack(self, parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        ordered = unpack_codes(parts["qweight"])  # [in, out]
        codes = ordered.reshape(len(ordered), -1, PER_WORD)[:, :, _INVERSE].reshape(ordered.shape)
        return np.ascontiguousarray(codes.T), as_float32(parts["scales"].T)

    def decode(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype, scale_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """(u − zero) × scale in float32, rounded once to `dtype`, with zero points as stored."""
        scales = loaded(parts["scales"], scale_dtype)
        codes, zeros = (unpack_words(parts[name], _INVERSE).float() for name in ("qweight", "qzeros"))
        groups = codes.unflatten(0, (len(scales), -1))  # [groups, group size, out]
        return groups.sub_(zeros[:, None]).mul_(scales[:, None]).flatten(0, 1).to(dtype).T.contiguous()
