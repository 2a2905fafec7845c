"""Where codes, multiples and scales lie in the blocks whose values are affine in a code (the structs of
ggml/src/ggml-common.h and their dequantize_row_* in ggml/src/ggml-quants.c), and where any type has a float16 scale:

    value = step × multiple × code + offset × its multiple

Types of points of a grid, IQ1 to IQ3, have no codes.
"""

from __future__ import annotations

from typing import NamedTuple


class Plane(NamedTuple):
    """Bytes begin … end of a block, `width` to a row: first all low digits, of `bits`, of a row, then the next."""

    begin: int
    end: int
    width: int
    bits: int
    order: tuple[int, ...] | None = None  # which of the sequences of `width` digits are meant; None: all


class Spec(NamedTuple):
    """A block type. Digits of several planes make a number, the lowest first."""

    values: int  # of a block
    bytes: int
    codes: tuple[Plane, ...]  # of TQ1_0, whose digits are of base 3, none
    zero: int  # the number of code 0
    halves: tuple[int, ...]  # where the float16 step lies and, if any, that of offsets
    group: int = 32  # columns that share a multiple
    multiples: tuple[Plane, ...] = ()  # of steps, then those of offsets, which are subtracted
    low: int = 0  # what a multiple stored as 0 means
    table: tuple[int, ...] | None = None  # the codes by their numbers, where these are not numbers less `zero`

    @property
    def affine(self) -> bool:
        return len(self.halves) == 2

    @property
    def numbers(self) -> int:
        """How many a code can be stored as."""
        return 1 << sum(plane.bits for plane in self.codes) if self.codes else 3


# Twelve bytes hold 8 multiples of steps and 8 of offsets, of 6 bits each (get_scale_min_k4).
_SIXES = (Plane(4, 16, 4, 2, (0, 8, 4, 10)), Plane(4, 16, 4, 2, (1, 9, 5, 11)), Plane(4, 16, 4, 2, (2, 3, 6, 7)))
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # kvalues_mxfp4: half units
SPECS = {
    "Q4_0": Spec(32, 18, (Plane(2, 18, 16, 4),), 8, (0,)),
    "Q4_1": Spec(32, 20, (Plane(4, 20, 16, 4),), 0, (0, 2)),
    "Q5_0": Spec(32, 22, (Plane(6, 22, 16, 4), Plane(2, 6, 1, 1)), 16, (0,)),
    "Q5_1": Spec(32, 24, (Plane(8, 24, 16, 4), Plane(4, 8, 1, 1)), 0, (0, 2)),
    "Q8_0": Spec(32, 34, (Plane(2, 34, 32, 8),), 0, (0,)),
    "Q2_K": Spec(256, 84, (Plane(16, 80, 32, 2),), 0, (80, 82), 16, (Plane(0, 16, 16, 4),)),
    "Q3_K": Spec(
        256, 110, (Plane(32, 96, 32, 2), Plane(0, 32, 32, 1)), 4, (108,), 16,
        (Plane(96, 104, 8, 4), Plane(104, 108, 4, 2)), -32,
    ),
    "Q4_K": Spec(256, 144, (Plane(16, 144, 32, 4),), 0, (0, 2), 32, _SIXES),
    "Q5_K": Spec(256, 176, (Plane(48, 176, 32, 4), Plane(16, 48, 32, 1)), 0, (0, 2), 32, _SIXES),
    "Q6_K": Spec(
        256, 210, (Plane(0, 128, 64, 4), Plane(128, 192, 32, 2)), 32, (208,), 16, (Plane(192, 208, 16, 8),)
    ),
    "IQ4_NL": Spec(32, 18, (Plane(2, 18, 16, 4),), 0, (0,), table=_IQ4),
    "IQ4_XS": Spec(
        256, 136, (Plane(8, 136, 16, 4),), 0, (0,), 32, (Plane(4, 8, 1, 4), Plane(2, 4, 1, 2)), -32, _IQ4
    ),
    "MXFP4": Spec(32, 17, (Plane(1, 17, 16, 4),), 0, (), table=_E2M1),  # the first byte is a power of two
    "TQ1_0": Spec(256, 54, (), 1, (52,), 256),
    "TQ2_0": Spec(256, 66, (Plane(0, 64, 32, 2),), 1, (64,), 256),
}  # fmt: skip
# Where the float16 scales of a block are, which all its values are in proportion to. IQ1_M's is in four pieces.
HALVES = {name: spec.halves for name, spec in SPECS.items() if spec.halves}
HALVES |= dict.fromkeys(("Q1_0", "Q2_0", "IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,))
