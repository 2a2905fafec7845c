"""What kernels in Gluon share: tiles of matrices as the tensor memory accelerator fetches and stores them, and the
barriers of their stages."""

from __future__ import annotations

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

KINDS = {
    torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16,
    torch.float32: gl.float32, torch.int32: gl.int32,
}  # fmt: skip
barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.7 has it by its new name


def described(matrix: torch.Tensor, *block: int) -> TensorDescriptor:
    """A matrix or a vector in blocks of this shape."""
    return TensorDescriptor.from_tensor(matrix, list(block), layout(matrix.dtype, *block))


@functools.cache
def layout(dtype: torch.dtype, *block: int) -> gl.NVMMASharedLayout:
    """Of such a block in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(block), KINDS[dtype])


@gluon.jit
def stage_barriers(STAGES: gl.constexpr, READERS: gl.constexpr):
    """Of each stage, one for when it is full, and one for when all its readers have left it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)
    return full, empty
