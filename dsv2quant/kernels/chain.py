"""Programmatic dependent launch (CUDA programming guide, "Programmatic Dependent Launch and Synchronization"): a kernel
may start while the one before it in the stream still runs.

Every kernel that is launched so says at once that its successor may start, asks for its weights, which no kernel of the
stream makes, and waits until all before it has ended and is visible: only then may it read what others made, or write.
Since each of them waits, whatever is before a predecessor has ended, too.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from dsv2quant.kernels.checks import INTERPRETED

PDL = not INTERPRETED  # for `launch_pdl`
_ON: tl.constexpr = tl.constexpr(PDL)


@triton.jit
def start_next():
    if _ON:
        gdc_launch_dependents()


@triton.jit
def wait():
    if _ON:
        gdc_wait()
