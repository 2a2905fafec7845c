"""FP8 (e4m3) weights with one scale per 128×128 block, per output channel, or per tensor.

    scale = amax / 448                    float32, of the block, row or tensor
    code  = e4m3(weight / scale)          round to nearest even, saturating at ±448
    weight' = code × scale                float32

An all-zero block has scale 1, and no scale is subnormal: hardware that flushes subnormals to zero would divide by it.
`block` is the layout of DeepSeek-V3's published checkpoints (`weight_scale_inv`, which despite its name multiplies);
`channel` and `tensor` are compressed-tensors' `float-quantized` (`weight_scale`).

`static` and `autofp8` store with each weight, which has one scale per tensor, the scale of its input: `input_scale`,
from the largest magnitude that calibration saw. `static` is compressed-tensors' layout, with scales of shape [1];
`autofp8` is AutoFP8's (auto_fp8/quantize.py), which published Neural Magic's FP8 models, with scales of shape [].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dsv2quant.formats.codec import EveryShape, Inputs, as_float32, check_finite, config_group, eight_bits, loaded
from dsv2quant.formats.e4m3 import BLOCK, E4M3_MAX, E4M3_VALUES, Grid, decode_e4m3, expand_blocks, scale_of, scales_of
from dsv2quant.storage.safetensors import Part

if TYPE_CHECKING:
    import torch

INPUT_SCALE = "input_scale"


class Fp8(EveryShape):
    """The codec of `fp8-block`, `fp8-channel` and `fp8-tensor`; with static inputs, `fp8-static` and `fp8-autofp8`."""

    methods = ("rtn",)
    runtime = "fp8"

    def __init__(self, grid: Grid, static: Literal["static", "autofp8"] | None = None) -> None:
        self.grid, self.static = grid, static is not None
        self.name = f"fp8-{static or grid}"
        self.quant_method = "fp8" if grid == "block" or static == "autofp8" else "compressed-tensors"
        self.activation = "static" if static else "group128" if grid == "block" else "token"
        self.shares_scale = grid == "tensor"
        self.scale_suffix = "weight_scale_inv" if grid == "block" else "weight_scale"
        # compressed-tensors: [1], not []: transformers refuses a scalar.
        self.tensor_shape: tuple[int, ...] = () if static == "autofp8" else (1,)

    def variant(self, group_size: int | None = None, layout: str | None = None) -> str:
        """Static inputs can be had in AutoFP8's layout, 'autofp8'."""
        return "fp8-autofp8" if self.static and layout == "autofp8" else self.name

    def declared(self, ignored: Sequence[str] = ()) -> dict[str, Any]:
        """`block` as DeepSeek-V3 writes it, with the modules under both keys in use: `ignored_layers` (vLLM, SGLang)
        and `modules_to_not_convert` (transformers); `autofp8` as AutoFP8 does (auto_fp8/modeling.py)."""
        if self.quant_method == "compressed-tensors":
            weights = eight_bits("float", self.grid, dynamic=False)
            inputs = eight_bits("float", "tensor" if self.static else "token", dynamic=not self.static)
            return config_group(weights, inputs, "float-quantized")
        if self.static:
            return {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ignored}
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "ignored_layers": ignored,
            "modules_to_not_convert": ignored,
        }

    def layout(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        scales = self.tensor_shape if self.grid == "tensor" else scales_shape(self.grid, shape)
        parts = (Part("weight", "F8_E4M3", shape), Part(self.scale_suffix, "F32", scales))
        return (*parts, Part(INPUT_SCALE, "F32", self.tensor_shape)) if self.static else parts

    def rows(self, parts: Mapping[str, torch.Tensor], begin: int, end: int) -> dict[str, torch.Tensor]:
        """Codes and scales of these rows."""
        scales = parts[self.scale_suffix]
        if self.grid == "block":
            scales = scales[begin // BLOCK : -(-end // BLOCK)]
        elif self.grid == "channel":
            scales = scales[begin:end]
        return {"weight": parts["weight"][begin:end], self.scale_suffix: scales}

    def keeps(self, scheme: str, suffixes: Collection[str]) -> bool:
        """Its own, where no others share its scale: the scales of others may be BF16, float16 or e8m0."""
        return scheme == self.name and not self.shares_scale

    def kept(self, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"weight": parts["weight"], self.scale_suffix: as_float32(parts[self.scale_suffix])}

    def encode(
        self, weights: Sequence[np.ndarray], device: str = "cpu", method: str = "rtn", inputs: Sequence[Inputs] = ()
    ) -> list[dict[str, np.ndarray]]:
        """Codes (uint8) and float32 scales; the compiled CPU path and the torch path give the same bytes.

        A static layout needs `inputs`; the caller gives weights whose inputs share a scale the same `amax`.
        """
        if self.static and len(inputs) != len(weights):
            raise ValueError(f"{self.name} needs the inputs of every weight")
        on_cpu = device == "cpu"
        encoded = encode_on_cpu(weights, self.grid) if on_cpu else encode_with_torch(weights, self.grid, device)
        parts = [{"weight": codes, self.scale_suffix: scales} for codes, scales in encoded]
        if self.static:
            for found, x in zip(parts, inputs, strict=True):
                found[self.scale_suffix] = found[self.scale_suffix].reshape(self.tensor_shape)
                found[INPUT_SCALE] = np.full(self.tensor_shape, scale_of(x.amax), np.float32)
        return parts

    def encode_tensor(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.grid == "tensor":
            raise ValueError(f"{self.name} shares a scale")
        codes, scales = encode_tensor(x.float(), self.grid)
        return {"weight": codes, self.scale_suffix: scales}

    def decode(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype, scale_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """code × scale in float32, rounded once to `dtype`; transformers' default load of compressed-tensors rounds
        the scales to the model's dtype first (`scale_dtype`)."""
        codes, scales = decode_e4m3(parts["weight"]), loaded(parts[self.scale_suffix], scale_dtype)
        if self.grid != "block":
            return codes.mul_(scales).to(dtype)
        scales = scales.repeat_interleave(BLOCK, 1)[:, : codes.shape[1]]  # [⌈rows/128⌉, cols]
        whole, ragged = codes.split((len(codes) // BLOCK * BLOCK, len(codes) % BLOCK))
        whole.unflatten(0, (-1, BLOCK)).mul_(scales[: len(whole) // BLOCK, None])
        ragged.mul_(scales[len(whole) // BLOCK :])
        return codes.to(dtype)


def scales_shape(grid: Grid, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a weight [out, in]."""
    rows, cols = shape
    return {"block": (-(-rows // BLOCK), -(-cols // BLOCK)), "channel": (rows, 1), "tensor": (1,)}[grid]


def encode_on_cpu(weights: Sequence[np.ndarray], grid: Grid) -> list[tuple[np.ndarray, np.ndarray]]:
    """(codes uint8 [out, in], scales float32) of each weight; with `tensor`, all share one scale.

    Weights are BF16 bits (uint16) or float32. Raises NonFiniteError naming the weight and the first offending index.
    """
    from dsv2quant.formats.cpu import amax_bits, encode_block, encode_channel, encode_rows

    all_bits = [np.ascontiguousarray(w if w.dtype == np.uint16 else w.view(np.uint32)) for w in weights]
    infinity = np.uint16(0x7F80) if all_bits[0].dtype == np.uint16 else np.uint32(0x7F800000)
    if grid == "tensor":
        amaxes = [amax_bits(bits) for bits in all_bits]
        for which, amax in enumerate(amaxes):
            if amax >= infinity:
                check_finite(weights[which], which)
        shared_amax = all_bits[0].dtype.type(max(amaxes))
    encoded = []
    for which, bits in enumerate(all_bits):
        codes, scales = np.empty(bits.shape, np.uint8), np.empty(scales_shape(grid, bits.shape), np.float32)
        if grid == "tensor":
            encode_rows(bits, codes, scales, shared_amax)
        elif not (encode_block if grid == "block" else encode_channel)(bits, codes, scales, infinity):
            check_finite(weights[which], which)
        encoded.append((codes, scales))
    return encoded


def encode_with_torch(weights: Sequence[np.ndarray], grid: Grid, device: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The torch path: (codes uint8 [out, in], scales float32) of each weight, computed on `device`."""
    import torch

    tensors = []
    for which, weight in enumerate(weights):
        if weight.dtype == np.uint16:
            x = torch.from_numpy(weight.view(np.int16)).to(device).view(torch.bfloat16).float()
        else:
            x = torch.from_numpy(weight).to(device)
        if not bool(torch.isfinite(x).all()):
            check_finite(weight, which)
        tensors.append(x)
    shared = torch.stack([x.abs().max() for x in tensors]).max().reshape(1) if grid == "tensor" else None
    encoded = [encode_tensor(x, grid, shared) for x in tensors]
    return [(codes.view(torch.uint8).cpu().numpy(), scales.cpu().numpy()) for codes, scales in encoded]


def encode_tensor(x: torch.Tensor, grid: Grid, shared: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (float8_e4m3fn) and scales (float32) of finite float32 [out, in], on its device. The grid 'tensor' is given
    the largest magnitude, float32 [1], of all weights that share a scale."""
    import torch

    rows, cols = x.shape
    if grid == "block":
        padded = torch.nn.functional.pad(x.abs(), (0, -cols % BLOCK, 0, -rows % BLOCK))
        amax = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3))
    else:
        amax = x.abs().amax(1, keepdim=True) if shared is None else shared
    scales = scales_of(amax)
    per_weight = expand_blocks(scales, rows, cols) if grid == "block" else scales
    return (x / per_weight).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def decode_block_to_float32(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """fp8-block codes (uint8 [rows, cols]) and scales → float32, in numpy: a block-FP8 source is read without torch."""
    weights = E4M3_VALUES[codes]
    for i, row in enumerate(scales):  # row: [⌈cols/128⌉]
        weights[i * BLOCK : (i + 1) * BLOCK] *= np.repeat(row, BLOCK)[: codes.shape[1]]
    return weights
