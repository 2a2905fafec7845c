"""INT4, INT3 and INT2 weights in groups along the input, symmetric: compressed-tensors' `pack-quantized`.

    weight' = code × scale      code −8 … 7, one BF16 scale per `group_size` columns of a row, or per row

of INT3 −4 … 3, of INT2 −2 … 1. `weight_packed` holds code + 8, + 4 or + 2 along the input as one row of bits without
gaps, the first code in the lowest bits of the first int32: eight INT4 or sixteen INT2 to an int32, and 32 INT3 to three
of them (compressed-tensors 0.20, compressors/pack_quantized/helpers.py; Humming 0.1.20, kernel/pack_weight.cuh). How
codes and scales are chosen is the method:

    rtn   scale = amax / 7.5, of INT3 / 3.5, of INT2 / 1.5; codes to nearest
    mse   the scale among 61 that leaves the least squared error, weighted by the inputs' mean squares; codes to nearest
    awq   the same, behind a smoothing that widens the columns of strong inputs: see `calib/awq.py`
    gptq  with calibration: see `calib/gptq.py`

A code more on one side than on the other counts where there are few: scales of INT3 and INT2 are searched among
negative ones, too.

Files of others are read with what ours never have:

    weight_zero_point  zero + 8 of each group, packed alike along the output: weight' = (code − zero) × scale
    weight_g_idx       the group of each column (`actorder: group`); a −1 anywhere: columns are in order
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dsv2quant.formats.codec import (
    Inputs,
    Integers,
    TooLargeError,
    as_float32,
    check_finite,
    config_group,
    eight_bits,
    loaded,
    to_bf16,
    widened,
)
from dsv2quant.formats.e4m3 import E4M3_MAX
from dsv2quant.formats.integers import levels
from dsv2quant.storage.safetensors import Part

if TYPE_CHECKING:
    import torch

PACKED = "weight_packed"
ZERO_POINT = "weight_zero_point"
GROUP_INDEX = "weight_g_idx"
PER_WORD = 8  # codes of 4 bits in an int32
OFFSET = 8  # code −8 is stored as 0


def pack_words(codes: np.ndarray, bits: int = 4) -> np.ndarray:
    """uint8 [rows, columns] below 2^bits → int32 [rows, columns · bits / 32], the first in the lowest bits."""
    codes = np.ascontiguousarray(codes)
    if bits == 4:
        return (codes[:, 0::2] | codes[:, 1::2] << 4).view(np.int32)
    each = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(each.reshape(len(codes), -1), axis=-1, bitorder="little").view(np.int32)


def unpack_codes(packed: np.ndarray, bits: int = 4) -> np.ndarray:
    """int32 [rows, columns · bits / 32] of `weight_packed` → codes, int8 [rows, columns], −2^(bits − 1) and up."""
    octets = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 4:
        codes = np.empty((len(octets), 2 * octets.shape[1]), np.uint8)
        codes[:, 0::2], codes[:, 1::2] = octets & 15, octets >> 4
    else:
        each = np.unpackbits(octets, axis=-1, bitorder="little").reshape(len(octets), -1, bits)
        codes = np.packbits(each, axis=-1, bitorder="little")[..., 0]
    return codes.view(np.int8) - np.int8(1 << bits - 1)


def unpack_words(words: torch.Tensor, nibbles: Sequence[int] = range(PER_WORD)) -> torch.Tensor:
    """int32 [rows, n] → [rows, 8n], 0 … 15: the inverse of `pack_words`, or of another order of nibbles."""
    import torch

    shifts = torch.tensor([4 * nibble for nibble in nibbles], dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(1)


def unpack_bits(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, n] → [rows, 32n / bits] below 2^bits, of 2, 3 or 4 bits, and the last as if zeros followed: the
    inverse of `pack_words`."""
    import torch
    import torch.nn.functional as F

    count = torch.arange(16, dtype=torch.int32, device=words.device)
    units, codes = words, 32 // bits
    if 32 % bits:  # eight codes to so many octets
        octets = ((words.unsqueeze(-1) >> 8 * count[:4]) & 255).flatten(1)
        octets = F.pad(octets, (0, -octets.shape[1] % bits)).unflatten(1, (-1, bits))
        units, codes = (octets << 8 * count[:bits]).sum(-1, dtype=torch.int32), 8
    return ((units.unsqueeze(-1) >> bits * count[:codes]) & (1 << bits) - 1).flatten(1)


def unpack_zero_points(parts: Mapping[str, torch.Tensor], bits: int = 4) -> torch.Tensor | None:
    """int32 [rows, groups], 0 … 15 where a code of 0 is stored as 8; None where the weight is symmetric."""
    if ZERO_POINT not in parts:
        return None
    return unpack_bits(parts[ZERO_POINT].T, bits).T[: len(parts[PACKED])]


def group_of_columns(parts: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The group of each column, int64 [columns], where groups are scattered. Raises ValueError for a group that is not
    there."""
    if GROUP_INDEX not in parts:
        return None
    index, groups = parts[GROUP_INDEX].long(), parts["weight_scale"].shape[1]
    if bool((index == -1).any()):  # as compressed-tensors has it where columns were not reordered
        return None
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise ValueError(f"{GROUP_INDEX} names groups beyond its {groups}")
    return index


class Int4:
    """The codec of `int4-g128`, `int4-g64`, `int4-g32` and, without a group size, `int4-channel`.

    Other layouts of the same codes, other activations and fewer bits are subclasses (transposed.py, W4A8, FewBits).
    """

    bits = 4
    family = "int4"
    runtime = "int4"
    quant_method = "compressed-tensors"
    activation: str | None = None
    shares_scale = False
    methods: tuple[str, ...] = ("rtn", "mse", "awq", "gptq")

    def __init__(self, group_size: int | None) -> None:
        self.group_size = group_size
        self.name = self.variant(group_size or 0)

    @property
    def integers(self) -> Integers | None:
        return self

    @property
    def finer(self) -> str:
        """Half the group, down to 32."""
        return self.variant(self.group_size // 2) if self.group_size and self.group_size > 32 else "bf16"

    def variant(self, group_size: int | None = None, layout: str | None = None) -> str:
        """With groups of 128, 64 or 32 columns, and in GPTQ's or AWQ's layout."""
        size = self.group_size if group_size is None else group_size
        family = {None: self.family, "compressed-tensors": f"int{self.bits}"}.get(layout, layout)
        return f"{family}-g{size}" if size else f"{family}-channel"

    def declared(self, ignored: Sequence[str] = ()) -> dict[str, Any]:
        group = {"strategy": "group", "group_size": self.group_size} if self.group_size else {"strategy": "channel"}
        weights = {"num_bits": self.bits, "type": "int", **group, "symmetric": True, "dynamic": False}
        return config_group(weights, None, "pack-quantized")

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape can't have the scheme: its columns don't fill whole groups, or whole words."""
        unit = self.group_size or PER_WORD
        return f"{shape[1]} columns are not a multiple of {unit}" if shape[1] % unit else None

    def layout(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, cols = shape
        return (
            Part(PACKED, "I32", (rows, cols * self.bits // 32)),
            Part("weight_scale", "BF16", (rows, cols // (self.group_size or cols))),
            Part("weight_shape", "I64", (2,)),
        )

    def others(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, cols = shape
        zeros = (-(-rows * self.bits // 32), cols // (self.group_size or cols))
        return Part(ZERO_POINT, "I32", zeros), Part(GROUP_INDEX, "I32", (cols,))

    def rows(self, parts: Mapping[str, torch.Tensor], begin: int, end: int) -> dict[str, torch.Tensor]:
        """Codes, scales and zero points of these rows; the groups of columns are those of all."""
        words = slice(begin * self.bits // 32, -(-end * self.bits // 32))
        cut = {PACKED: slice(begin, end), "weight_scale": slice(begin, end), ZERO_POINT: words}
        return {suffix: part[cut[suffix]] if suffix in cut else part for suffix, part in parts.items()}

    def keeps(self, scheme: str, suffixes: Collection[str]) -> bool:
        """The symmetric weights of as many bits with groups as large, in order, in compressed-tensors' layout."""
        return scheme == Int4.variant(self, layout="compressed-tensors") and not {ZERO_POINT, GROUP_INDEX} & set(
            suffixes
        )

    def kept(self, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        scales = as_float32(parts["weight_scale"])
        if not self.holds(np.abs(scales)):
            raise TooLargeError(0)
        return self.pack(unpack_codes(parts[PACKED], self.bits), np.copysign(self.storable(np.abs(scales)), scales))

    def encode(
        self, weights: Sequence[np.ndarray], device: str = "cpu", method: str = "rtn", inputs: Sequence[Inputs] = ()
    ) -> list[dict[str, np.ndarray]]:
        """Encode by `rtn`, `mse` or `awq`; all run on the CPU, whatever the device."""
        from dsv2quant.formats.cpu import nearest_codes, rtn_scales, search_scales

        encoded = []
        for which, weight in enumerate(weights):
            check_finite(weight, which)
            x = widened(weight)
            group = self.group_size or x.shape[1]
            if method in ("mse", "awq"):
                scales = search_scales(x, inputs[which].importance[None], group, self.bits)
            else:
                scales = rtn_scales(x, group, self.bits)
            if not self.holds(scales):
                raise TooLargeError(which)
            scales = self.storable(scales)
            encoded.append(self.pack(nearest_codes(x, scales, *levels(self.bits)), scales))
        return encoded

    def encode_tensor(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        groups = x.float().unflatten(1, (-1, self.group_size or x.shape[1]))
        amax = groups.abs().amax(-1)
        # CUDA multiplies by the reciprocal of a scalar divisor, which rounds differently: a tensor.
        scales = (amax / torch.full_like(amax, (2**self.bits - 1) / 2)).bfloat16()
        scales = torch.where(scales > 0, scales, 1)
        low, high = levels(self.bits)
        nearest = (groups / scales.float().unsqueeze(-1)).round_().clamp_(low, high)
        eight = nearest.sub_(low).int().flatten(1).unflatten(1, (-1, 8))
        shifts = torch.arange(8, dtype=torch.int32, device=x.device)
        octets = (eight << self.bits * shifts).sum(-1, dtype=torch.int32).unsqueeze(-1) >> 8 * shifts[: self.bits]
        packed = (octets & 255).to(torch.uint8).flatten(1).view(torch.int32)
        return {PACKED: packed, "weight_scale": scales, "weight_shape": torch.tensor(x.shape)}

    def holds(self, scales: np.ndarray) -> bool:
        return True

    def storable(self, scales: np.ndarray) -> np.ndarray:
        from dsv2quant.formats.cpu import round_to_bf16

        return round_to_bf16(scales)

    def pack(self, codes: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
        return {
            PACKED: pack_words((codes - np.int8(levels(self.bits)[0])).view(np.uint8), self.bits),
            "weight_scale": to_bf16(scales),
            "weight_shape": np.array(codes.shape, np.int64),
        }

    def unpack(self, parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return unpack_codes(parts[PACKED], self.bits), as_float32(parts["weight_scale"])

    def decode(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype, scale_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """(code − zero) × scale in float32, rounded once to `dtype`. Raises ValueError as `group_of_columns`."""
        import torch

        scales, zeros = loaded(parts["weight_scale"], scale_dtype), unpack_zero_points(parts, self.bits)
        group = group_of_columns(parts)
        codes = unpack_bits(parts[PACKED], self.bits).float()  # [out, in]
        offsets = torch.full_like(scales, -levels(self.bits)[0]) if zeros is None else zeros.float()
        if group is not None:
            return codes.sub_(offsets[:, group]).mul_(scales[:, group]).to(dtype)
        groups = codes.unflatten(1, (scales.shape[1], -1))
        return groups.sub_(offsets.unsqueeze(-1)).mul_(scales.unsqueeze(-1)).flatten(1).to(dtype)


class FewBits(Int4):
    """The codec of `int3-g128`, `int3-g64`, `int3-g32`, and of `int2-…` alike.

    None without groups: eight or four levels won't do for a whole row, and vLLM has no such experts.
    """

    methods = ("rtn", "mse", "gptq")

    def __init__(self, bits: int, group_size: int) -> None:
        self.bits = bits
        self.family = self.runtime = f"int{bits}"
        super().__init__(group_size)


class W4A8(Int4):
    """The codec of `w4a8-g128`: groups of 128 with FP8 activations per token, served W4A8.

    Parts, codes and methods are those of `int4-g128`: only what a server makes of activations differs, so that
    `quantization_config` alone tells the two apart. `decode` is the weight as it is stored, which is also what
    transformers loads.

    vLLM 0.33 loads it on Hopper (sm90) and multiplies in FP8. The BF16 scales of a row become e4m3 multiples of one
    float32 scale, their largest / 448, which are divided by 8 and rounded again (quant_utils.py,
    convert_bf16_scales_to_fp8): a scale moves by 2.6% (root mean square) and at most 5.9%, whatever the model. Then
    codes times scales are e4m3, too (cutlass_pack_scale_fp8 tabulates them).
    """

    activation = "token"
    runtime = "decoded"
    finer = "int4-g128"

    def __init__(self) -> None:
        super().__init__(128)
        self.name = "w4a8-g128"

    def variant(self, group_size: int | None = None, layout: str | None = None) -> str:
        """Itself: kernels have groups of 128 alone."""
        return "w4a8-g128"

    def declared(self, ignored: Sequence[str] = ()) -> dict[str, Any]:
        return super().declared() | {"input_activations": eight_bits("float", "token", dynamic=True)}

    @staticmethod
    def decode_as_vllm(parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] that vLLM multiplies with: code × scale in e4m3, times the channel's float32 scale."""
        import torch

        scales = parts["weight_scale"].float()  # [out, groups]
        of_channel = scales.abs().amax(1, keepdim=True) / E4M3_MAX
        in_e4m3 = (scales / of_channel).to(torch.float8_e4m3fn).float() / 8
        in_e4m3 = in_e4m3.to(torch.float8_e4m3fn).float()
        codes = unpack_words(parts[PACKED]).float().sub_(OFFSET).unflatten(1, (scales.shape[1], -1))
        products = (codes * in_e4m3.unsqueeze(-1)).to(torch.float8_e4m3fn).float()
        return (products.flatten(1) * (of_channel * 8)).to(dtype)
