"""The codec protocol, what codecs share, and the `bf16` scheme: a weight that stays unquantized.

A codec is the code of one scheme. `layout` predicts from a shape alone exactly what `encode` returns; `decode` is what
a consumer reconstructs. Adding a scheme is adding a class with these members, one line in the table of schemes.py, and
the scheme's rows in the consumers' table (planning/consumers.py). Nobody else asks which class a codec is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dsv2quant.errors import InputError
from dsv2quant.formats.e4m3 import E8M0_VALUES
from dsv2quant.storage.safetensors import Part

if TYPE_CHECKING:
    import torch

ROWS_APART = 128  # wherever a weight is cut into rows (`Codec.rows`), every codec's parts can be


@dataclass(frozen=True)
class Inputs:
    """What calibration measured of a weight's inputs: the mean square of each channel (float32 [in]), and the largest
    magnitude of all."""

    importance: np.ndarray
    amax: float


class TooLargeError(ValueError):
    """A weight needs larger scales than its layout stores: `which` of the weights given to `encode`."""

    def __init__(self, which: int) -> None:
        super().__init__(f"weight {which} has values too large for its scales")
        self.which = which


def too_large(module: str, scheme: str) -> InputError:
    """The error to raise for the module of such a weight."""
    what = f"has values too large for the float16 scales of {scheme}"
    return InputError(what, where=module, fix="leave out --format: compressed-tensors has BF16 scales")


class NonFiniteError(ValueError):
    """A weight holds NaN or infinity: `which` of the weights given to `encode`, and its first offending index."""

    def __init__(self, which: int, index: tuple[int, ...]) -> None:
        super().__init__(f"weight {which} is not finite at {index}")
        self.which, self.index = which, index


def config_group(weights: dict[str, Any], inputs: dict[str, Any] | None, layout: str) -> dict[str, Any]:
    """A group of compressed-tensors' `config_groups`, without its targets."""
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": layout}


def eight_bits(kind: str, strategy: str, *, dynamic: bool) -> dict[str, Any]:
    """compressed-tensors' arguments of a symmetric quantization to 8 bits, 'float' or 'int'."""
    return {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": dynamic}


class Integers(Protocol):
    """What GPTQ and AWQ need of a scheme whose weights are integers times the scales of groups of columns."""

    @property
    def bits(self) -> int:
        """Of a code, which has every value of `levels`."""

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None: all of a row."""

    def holds(self, scales: np.ndarray) -> bool:
        """Whether none of these scales is too large to be stored."""

    def storable(self, scales: np.ndarray) -> np.ndarray:
        """The scales of float32 that `pack` stores without loss in place of these: to be applied before codes are
        chosen."""

    def pack(self, codes: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
        """Codes (int8 [out, in], of `levels`) and scales (float32 [out, groups], `storable`) → the stored parts."""

    def unpack(self, parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales of what `pack` made."""


class Codec(Protocol):
    @property
    def name(self) -> str:
        """The scheme's name."""

    @property
    def quant_method(self) -> str | None:
        """The `quant_method` of `quantization_config` that describes it; None for unquantized."""

    @property
    def activation(self) -> str | None:
        """How activations are quantized when it is served: to FP8 by 'token', 'group128' or 'static' (by the stored
        `input_scale`), to INT8 by 'token-int8', or None: not at all."""

    @property
    def shares_scale(self) -> bool:
        """Whether the members of a fused module must be encoded together, with one scale."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that can choose its codes."""

    @property
    def integers(self) -> Integers | None:
        """Its grid for the methods that choose codes by calibration; None where they can't."""

    @property
    def finer(self) -> str:
        """The scheme to try where a weight can't have its groups."""

    @property
    def runtime(self) -> str:
        """How the kernels' runtime loads it: the name of a loader in model/quantized.py; one that isn't there is
        decoded."""

    def variant(self, group_size: int | None = None, layout: str | None = None) -> str:
        """The same scheme with other groups of columns (0: whole rows) or in another layout; of a scheme that has
        neither, its own name. It may be the name of none."""

    def declared(self, ignored: Sequence[str] = ()) -> dict[str, Any]:
        """What `quantization_config` says of it: of compressed-tensors, a group of `config_groups` without its targets;
        of other quant methods the whole, in an artifact that leaves the modules `ignored` unquantized."""

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape can't have the scheme; None where it can."""

    def layout(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """The stored parts of a weight of this shape, which `refusal` lets pass."""

    def others(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Parts that files of others may hold besides: `decode` takes them, `encode` never makes them."""

    def rows(self, parts: Mapping[str, torch.Tensor], begin: int, end: int) -> dict[str, torch.Tensor]:
        """Views of what `decode` needs for rows `begin` … `end` − 1, the first a multiple of ROWS_APART, as the last is
        or that of the weight."""

    def encode(
        self, weights: Sequence[np.ndarray], device: str = "cpu", method: str = "rtn", inputs: Sequence[Inputs] = ()
    ) -> list[dict[str, np.ndarray]]:
        """Encode weights that belong together (one, or a fused group with a shared scale) by a method that needs no
        forward pass.

        Each weight is [out, in], as BF16 bits (uint16) or float32; `inputs` are theirs, where the method or the scheme
        needs them. Returns per weight {suffix: array}, with arrays of `layout`'s shapes holding its dtypes' bits.
        Raises NonFiniteError, and TooLargeError where the scheme's scales have a narrower range than BF16.
        """

    def keeps(self, scheme: str, suffixes: Collection[str]) -> bool:
        """Whether a weight that has these parts in a scheme is on this one's grid, so that `kept` is without loss but
        for scales of a wider dtype."""

    def kept(self, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The codes and scales of such a weight, which is finite, in this layout; scales are rounded to the dtype that
        they are stored in here. Raises TooLargeError."""

    def encode_tensor(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What `encode` makes by `rtn` of a finite weight [out, in], BF16 or float32, which shares no scale, on its
        device. Raises ValueError where it can't."""

    def decode(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype, scale_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The weight a consumer reconstructs: scales rounded to `scale_dtype` (None: as stored), the product in
        float32, rounded once to `dtype`."""


class EveryShape:
    """What codecs have alike that take weights of every shape, in no groups of columns, layouts or parts but their
    own, and know no other scheme of their grid."""

    name: str
    integers = None
    finer = "bf16"

    def variant(self, group_size: int | None = None, layout: str | None = None) -> str:
        return self.name

    def refusal(self, shape: tuple[int, ...]) -> str | None:
        return None

    def others(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return ()

    def keeps(self, scheme: str, suffixes: Collection[str]) -> bool:
        return False

    def kept(self, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise ValueError(f"{self.name} keeps nothing")


class Bf16(EveryShape):
    """BF16, rounded to nearest even from wider sources; a BF16 source keeps its bytes."""

    name = "bf16"
    quant_method = None
    activation = None
    shares_scale = False
    methods: tuple[str, ...] = ("rtn", "fit")
    runtime = "decoded"

    def declared(self, ignored: Sequence[str] = ()) -> dict[str, Any]:
        return {}

    def layout(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return (Part("weight", "BF16", shape),)

    def rows(self, parts: Mapping[str, torch.Tensor], begin: int, end: int) -> dict[str, torch.Tensor]:
        return {"weight": parts["weight"][begin:end]}

    def encode(
        self, weights: Sequence[np.ndarray], device: str = "cpu", method: str = "rtn", inputs: Sequence[Inputs] = ()
    ) -> list[dict[str, np.ndarray]]:
        """BF16 bits (uint16) of BF16-bit or float32 arrays. Raises NonFiniteError, also where BF16 overflows."""
        encoded = []
        for which, weight in enumerate(weights):
            bits = weight.copy() if weight.dtype == np.uint16 else to_bf16(weight)
            check_finite(bits, which)
            encoded.append({"weight": bits})
        return encoded

    def encode_tensor(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        return {"weight": x.to(torch.bfloat16)}

    def decode(
        self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype, scale_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The weight in `dtype`; there are no scales."""
        return parts["weight"].to(dtype)


class F32(Bf16):
    """float32, for what must keep its digits: the correction bias of a router, whose scores may be closer to each other
    than BF16 tells them apart."""

    name = "f32"
    methods = ("rtn",)

    def layout(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return (Part("weight", "F32", shape),)

    def encode(
        self, weights: Sequence[np.ndarray], device: str = "cpu", method: str = "rtn", inputs: Sequence[Inputs] = ()
    ) -> list[dict[str, np.ndarray]]:
        """float32 arrays of BF16-bit or float32 ones. Raises NonFiniteError."""
        encoded = []
        for which, weight in enumerate(weights):
            check_finite(weight, which)
            encoded.append({"weight": widened(weight).copy()})
        return encoded

    def encode_tensor(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight": x.float()}


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 → BF16 bits (uint16), round to nearest even; NaN stays NaN and overflow becomes infinity."""
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def widened(weight: np.ndarray) -> np.ndarray:
    """BF16 bits (uint16) or float32 → float32."""
    return weight if weight.dtype == np.float32 else (weight.astype(np.uint32) << 16).view(np.float32)


def as_float32(numbers: np.ndarray) -> np.ndarray:
    """Numbers as they are stored, BF16 bits (uint16), e8m0 codes (uint8), float16 or float32 → float32."""
    if numbers.dtype == np.uint16:
        return widened(numbers)
    return E8M0_VALUES[numbers] if numbers.dtype == np.uint8 else numbers.astype(np.float32, copy=False)


def loaded(scales: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Scales as a consumer has them: rounded to a dtype (None: as stored), in float32."""
    return (scales if dtype is None else scales.to(dtype)).float()


def check_finite(weight: np.ndarray, which: int = 0) -> None:
    """Raise NonFiniteError at the first NaN or infinity of BF16 bits (uint16) or of a float32 array."""
    from dsv2quant.formats.cpu import amax_bits

    bits = np.ascontiguousarray(weight if weight.dtype == np.uint16 else weight.view(np.uint32))
    infinity = np.array(0x7F80 if bits.dtype == np.uint16 else 0x7F800000, bits.dtype)
    if amax_bits(bits.reshape(1, -1)) >= infinity:
        bad = (bits & ~np.array(1 << (8 * bits.itemsize - 1), bits.dtype)) >= infinity
        raise NonFiniteError(which, tuple(int(i) for i in np.unravel_index(int(bad.argmax()), weight.shape)))
