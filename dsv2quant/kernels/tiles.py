"""Tiles of matrices as the tensor memory accelerator fetches and stores them, for kernels in Gluon."""

from __future__ import annotations

import functools

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

KINDS = {
    torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16, torch.float16: gl.float16,
    torch.float32: gl.float32, torch.int32: gl.int32,
}  # fmt: skip


def described(matrix: torch.Tensor, *block: int) -> TensorDescriptor:
    """A matrix or a vector in blocks of this shape."""
    return TensorDescriptor.from_tensor(matrix, list(block), layout(matrix.dtype, *block))


@functools.cache
def layout(dtype: torch.dtype, *block: int) -> gl.NVMMASharedLayout:
    """Of such a block in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(block), KINDS[dtype])
