"""What specialized kernels compute of experts' products. Of gate's and up's in as few instructions as they can: no
other product is made while both warp groups of a program store theirs."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# 1 / (1 + 2^(x · −log₂ e)): off by a few units of float32's last place, and 0 where the power is infinite
_SIGMOID: gl.constexpr = gl.constexpr(
    """{
    .reg .f32 t;
    mul.f32 t, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 t, t;
    add.f32 t, t, 0f3F800000;
    rcp.approx.ftz.f32 $0, t;
    }"""
)
_BF16: gl.constexpr = gl.constexpr(
    """{
    .reg .b32 t;
    cvt.rn.bf16x2.f32 t, $3, $2;
    shl.b32 $0, t, 16;
    and.b32 $1, t, 0xffff0000;
    }"""
)


@gluon.jit
def gated(gate, up):
    """silu(gate) · up, float32."""
    return gate * gl.inline_asm_elementwise(_SIGMOID, "=f,f", [gate], gl.float32, is_pure=True, pack=1) * up


@gluon.jit
def rounded(values, DTYPE: gl.constexpr):
    """float32 values as DTYPE has them."""
    if DTYPE.is_bf16():
        return gl.inline_asm_elementwise(_BF16, "=r,=r,r,r", [values], gl.float32, is_pure=True, pack=2)
    return values.to(DTYPE).to(gl.float32)


@gluon.jit
def computed_here(values):
    """float32 values, made where this stands: not behind the next product, whose registers they are in."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [values], gl.float32, is_pure=False, pack=1)
