"""Linear layers whose weights stay as they are stored, for the kernels' runtime, and where it gets these weights.

Each takes x [T, K], or where it wants e4m3 the codes alone, and gives [T, rows]. `Projections` are the layers that
share an input (q_a with kv_a, gate with up): weights of one kind become one matrix there, and one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from dsv2quant.arch.config import ModelConfig
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.checkpoint.weights import BLOCKS
from dsv2quant.errors import InputError, UsageError
from dsv2quant.formats.declared import activations_quantized
from dsv2quant.formats.e4m3 import BLOCK
from dsv2quant.formats.fp8 import INPUT_SCALE
from dsv2quant.formats.schemes import CODECS
from dsv2quant.kernels import gguf_layout, int4_layout, ops, reference
from dsv2quant.kernels.gguf_layout import GgufWeight
from dsv2quant.kernels.int4_layout import Int4Weight


class Source(Protocol):
    """A model's weights by module, as they are stored, which a checkpoint has, or a benchmark makes up: on `device`.

    `name` is what errors call the model; `dtype` is that of plain weights, and of what is computed: BF16, the kernels'
    own; their references take float32, too.
    """

    name: str
    config: ModelConfig
    device: str
    dtype: torch.dtype

    def scheme(self, module: str) -> str:
        """A weight's scheme."""

    def stored(self, module: str) -> tuple[str, dict[str, torch.Tensor]]:
        """A weight's scheme and its parts by suffix, as formats/ names and shapes them; plain ones as 'bf16' with the
        one part 'weight', of GGUF's types ('q4_k') the one part `BLOCKS` of weights.py."""

    def plain(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """A bias, norm, router, embedding or head in `dtype`, or None where the model has no such tensor."""

    def activation(self, scheme: str) -> str | None:
        """How the activations are quantized that meet a weight: 'token', 'group128', 'static' or None."""

    def kv_scale(self, layer: int) -> torch.Tensor | None:
        """A layer's KV-cache scales, as the checkpoint's."""


class CheckpointSource:
    """The weights of a checkpoint, an artifact or a GGUF file. Blocks that have no kernel come as plain weights."""

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.name, self.config = checkpoint.model, checkpoint.config
        self._by_name = {weight.spec.name: weight for weight in checkpoint.weights}
        self._activations = activations_quantized(checkpoint.config.quantization)

    def scheme(self, module: str) -> str:
        weight = self._by_name[f"{module}.weight"]
        # A GGUF file has kv_b_proj in halves, of which one is transposed.
        as_blocks = len(weight.parts) == 1 and gguf_layout.supported(weight.scheme.upper())
        return weight.scheme if weight.scheme in CODECS or as_blocks else "bf16"

    def stored(self, module: str) -> tuple[str, dict[str, torch.Tensor]]:
        weight, scheme = self._by_name[f"{module}.weight"], self.scheme(module)
        if scheme == "bf16":
            return scheme, {"weight": self.checkpoint.decode(weight, self.dtype, self.device)}
        return scheme, self.checkpoint.parts(weight, self.device)

    def plain(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        weight = self._by_name.get(name)
        return None if weight is None else self.checkpoint.decode(weight, dtype or self.dtype, self.device)

    def activation(self, scheme: str) -> str | None:
        return CODECS[scheme].activation if self._activations and scheme in CODECS else None

    def kv_scale(self, layer: int) -> torch.Tensor | None:
        return self.checkpoint.kv_scale(layer, self.device)


FP8_UNIT = 16  # columns of FP8 weights, which the tensor memory accelerator reads, come in multiples


class Quantization(NamedTuple):
    """How an input is quantized before it meets FP8 weights: `granularity` as quantize_activation has it; None: not at
    all."""

    granularity: str | None = None
    scale: torch.Tensor | None = None  # of 'static', float32 [1]

    def same(self, other: Quantization) -> bool:
        if self.granularity != other.granularity:
            return False
        return self.scale is None or (other.scale is not None and bool(torch.equal(self.scale, other.scale)))


Codes = tuple[torch.Tensor, torch.Tensor]  # e4m3 [T, K] and their scales
Parts = dict[str, torch.Tensor]  # by suffix, as formats/ names them


class Linear(Protocol):
    @property
    def quantization(self) -> Quantization:
        """How its input is quantized."""

    @property
    def rows(self) -> int: ...

    def __call__(self, x: torch.Tensor | None, codes: Codes | None = None) -> torch.Tensor: ...


def rounded(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """x [..., K] quantized as served and back, in its dtype."""
    if activation is None:
        return x
    return reference.dequantize_activation(*reference.quantize_activation(x, activation)).to(x.dtype)


@dataclass
class PlainLinear:
    """A plain weight [rows, K], by the vendor's product; x is rounded to what `activation` makes of it, as
    `reference.quantize_activation` has it."""

    weight: torch.Tensor
    activation: str | None = None
    quantization: ClassVar[Quantization] = Quantization()

    @property
    def rows(self) -> int:
        return len(self.weight)

    def __call__(self, x: torch.Tensor | None, codes: Codes | None = None) -> torch.Tensor:
        assert x is not None
        return F.linear(rounded(x, self.activation), self.weight)


@dataclass
class Fp8Linear:
    """e4m3 codes [rows, K] with float32 scales of blocks, channels or the tensor; the product is of `dtype`."""

    weight: torch.Tensor
    scales: torch.Tensor
    quantization: Quantization
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return len(self.weight)

    def __call__(self, x: torch.Tensor | None, codes: Codes | None = None) -> torch.Tensor:
        if codes is None:
            granularity, scale = self.quantization
            assert x is not None
            assert granularity is not None
            return ops.fp8_linear(x, self.weight, self.scales, self.dtype, granularity, scale)
        return ops.fp8_matmul(*codes, self.weight, self.scales, self.dtype)


@dataclass
class PackedLinear:
    """A weight in the runtime's layout of INT4 or of GGUF's blocks, which its kernels multiply with x as it is."""

    weight: Int4Weight | GgufWeight
    quantization: ClassVar[Quantization] = Quantization()

    @property
    def rows(self) -> int:
        return self.weight.rows

    def __call__(self, x: torch.Tensor | None, codes: Codes | None = None) -> torch.Tensor:
        assert x is not None
        if isinstance(self.weight, Int4Weight):
            return ops.int4_linear(x, self.weight)
        return ops.gguf_linear(x, self.weight)


@dataclass
class Projections:
    """Layers of one input: `linears`, and of each layer the one it is part of, its columns there and its bias."""

    linears: Sequence[Linear]
    places: list[tuple[int, slice]]
    biases: list[torch.Tensor | None]

    @property
    def quantization(self) -> Quantization:
        """That of the input, as far as all agree: else each quantizes for itself."""
        first, *others = (linear.quantization for linear in self.linears)
        return first if all(first.same(other) for other in others) else Quantization()

    def __call__(self, x: torch.Tensor | None, codes: Codes | None = None) -> list[torch.Tensor]:
        """x [T, K], and its codes where it was quantized as `quantization` says → of each layer [T, its rows]: views
        of what one launch wrote. Where there are codes, x may be missing."""
        made = [linear(x, codes) for linear in self.linears]
        found = [made[index][:, columns] for index, columns in self.places]
        return [y if bias is None else y + bias for y, bias in zip(found, self.biases, strict=True)]


def load_projections(source: Source, modules: Sequence[str]) -> Projections:
    """The linear layers of these modules, which share an input."""
    biases = [source.plain(f"{module}.bias") for module in modules]
    linears = [load_linear(source, module) for module in modules]
    joined, unit = join(linears) if len(linears) > 1 else (None, 1)
    if joined is None:
        return Projections(linears, [(i, slice(0, linear.rows)) for i, linear in enumerate(linears)], biases)
    places, begin = [], 0
    for linear in linears:
        places.append((0, slice(begin, begin + linear.rows)))
        begin += -(-linear.rows // unit) * unit
    return Projections([joined], places, biases)


def load_linear(source: Source, module: str) -> Linear:
    """A module's weight, in the layout its kernel takes. Raises UsageError where it has none, and InputError where the
    weight's parts contradict each other."""
    scheme, parts = source.stored(module)
    if scheme == "bf16":
        return PlainLinear(parts["weight"])
    if BLOCKS in parts:
        return PackedLinear(gguf_layout.from_blocks(scheme.upper(), parts[BLOCKS], columns_of(scheme, parts[BLOCKS])))
    return LOADERS.get(CODECS[scheme].runtime, _decoded)(source, module, scheme, parts)


def _fp8(source: Source, module: str, scheme: str, parts: Parts) -> Linear:
    granularity = source.activation(scheme)
    if granularity is None:  # weights alone are FP8: no unit multiplies them with BF16
        return _decoded(source, module, scheme, parts)
    if parts["weight"].shape[1] % FP8_UNIT:
        raise unsupported(source, f"{module} is FP8 of {parts['weight'].shape[1]} columns, no multiple of {FP8_UNIT}")
    scale = parts[INPUT_SCALE].float().reshape(1) if granularity == "static" else None
    quantization = Quantization(granularity, scale)
    return Fp8Linear(parts["weight"].contiguous(), fp8_scales(parts), quantization, source.dtype)


def fp8_scales(parts: Parts) -> torch.Tensor:
    """The scales of an FP8 weight, float32: of blocks under one name, of rows or the tensor under another."""
    return (parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]).float()


def _int4(source: Source, module: str, scheme: str, parts: Parts) -> Linear:
    return PackedLinear(int4_weight(source, module, scheme, parts))


def _decoded(source: Source, module: str, scheme: str, parts: Parts) -> Linear:
    return PlainLinear(_decode(source, module, scheme, parts), source.activation(scheme))


# By `Codec.runtime`; what is not there is decoded.
LOADERS: dict[str, Callable[[Source, str, str, Parts], Linear]] = {
    "fp8": _fp8, **dict.fromkeys(("int4", "int3", "int2", "gptq", "awq"), _int4),
}  # fmt: skip
INT4_READERS: dict[str, Callable[[Parts], Int4Weight]] = {
    "int4": int4_layout.from_compressed_tensors, "gptq": int4_layout.from_gptq, "awq": int4_layout.from_awq,
    **{f"int{bits}": partial(int4_layout.from_compressed_tensors, bits=bits) for bits in (3, 2)},
}  # fmt: skip


def dequantized(source: Source, module: str) -> torch.Tensor:
    """A module's weight, decoded. Raises InputError where its parts contradict each other."""
    scheme, parts = source.stored(module)
    return parts["weight"] if scheme == "bf16" else _decode(source, module, scheme, parts)


def int4_weight(source: Source, module: str, scheme: str, parts: Parts) -> Int4Weight:
    """The runtime layout of a weight in compressed-tensors', GPTQ's or AWQ's. Raises as `load_linear`."""
    try:
        return INT4_READERS[CODECS[scheme].runtime](parts)
    except ValueError as error:
        _decode(source, module, scheme, parts)  # what can't be decoded is damaged, and no other backend takes it
        raise unsupported(source, f"{module}: {error}") from None


def unsupported(source: Source, what: str) -> UsageError:
    """The error to raise for weights that only the other backend takes."""
    return UsageError(f"{what}: no kernel takes that", where=source.name, fix="take --backend torch")


def _decode(source: Source, module: str, scheme: str, parts: Parts) -> torch.Tensor:
    try:
        return CODECS[scheme].decode(parts, source.dtype)
    except ValueError as error:
        fix = "the checkpoint is damaged: get it again"
        raise InputError(f"{module}: {error}", where=source.name, fix=fix) from None


def columns_of(scheme: str, blocks: torch.Tensor) -> int:
    """Of GGUF rows, uint8 [..., rows, bytes]."""
    spec = gguf_layout.SPECS[scheme.upper()]
    return blocks.shape[-1] // spec.bytes * spec.values


def join(linears: Sequence[Linear]) -> tuple[Linear | None, int]:
    """The layers as one, each padded to a multiple of so many rows; None where they are of different kinds."""
    plain = [linear for linear in linears if isinstance(linear, PlainLinear)]
    if len(plain) == len(linears) and len({linear.activation for linear in plain}) == 1:
        return PlainLinear(torch.cat([linear.weight for linear in plain]), plain[0].activation), 1
    packed = [linear.weight for linear in linears if isinstance(linear, PackedLinear)]
    int4 = [weight for weight in packed if isinstance(weight, Int4Weight)]
    if len(int4) == len(linears):
        weight = int4_layout.join(int4)
        return (None if weight is None else PackedLinear(weight)), int4_layout.ROWS
    fp8 = [linear for linear in linears if isinstance(linear, Fp8Linear)]
    if len(fp8) == len(linears) and all(fp8[0].quantization.same(linear.quantization) for linear in fp8):
        return _join_fp8(fp8)
    return None, 1


def _join_fp8(linears: Sequence[Fp8Linear]) -> tuple[Fp8Linear, int]:
    """Blocks of scales begin where a layer begins; other scales become those of channels."""
    quantization, dtype = linears[0].quantization, linears[0].dtype
    blocks = quantization.granularity == "group128"
    unit = BLOCK if blocks else 1
    codes = [F.pad(linear.weight.view(torch.uint8), (0, 0, 0, -linear.rows % unit)) for linear in linears]
    scales = [x.scales if blocks else x.scales.reshape(-1, 1).expand(x.rows, 1) for x in linears]
    joined = torch.cat(codes).view(torch.float8_e4m3fn)
    return Fp8Linear(joined, torch.cat(scales).contiguous(), quantization, dtype), unit
