"""The torch references of the kernels: activation quantization and the quantized linear layer, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv2quant.formats.e4m3 import E4M3_VALUES
from dsv2quant.kernels.reference import dequantize_activation, linear, quantize_activation


def activations(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.exp2(
        torch.randint(-6, 3, (*shape[:-1], 1), generator=generator)
    )
    x[..., 0, :] = 0
    return x


@pytest.mark.parametrize(("granularity", "width"), [("token", 300), ("group128", 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_and_codes(granularity, width, dtype):
    x = activations(2, 5, 300).to(dtype)
    codes, scales = quantize_activation(x, granularity)
    assert codes.shape == x.shape
    assert codes.dtype == torch.float8_e4m3fn
    assert scales.shape == (2, 5, -(-300 // width))
    values = torch.from_numpy(E4M3_VALUES[:127]).double()
    for group in range(scales.shape[-1]):
        part = x[..., group * width : (group + 1) * width].float()
        amax = part.abs().amax(-1)
        assert torch.equal(scales[..., group], torch.where(amax > 0, amax / 448, 1.0))
        y = (part / scales[..., group, None]).double().abs()
        nearest = (y.unsqueeze(-1) - values).abs().amin(-1)
        got = codes[..., group * width : (group + 1) * width].double().abs()
        assert torch.equal((got - y).abs(), nearest)


@pytest.mark.parametrize(("granularity", "width"), [("q8_0", 32), ("q8_k", 256)])
def test_ggmls_codes_of_activations(granularity, width):
    """Against quantize_row_q8_0 (arch/x86/quants.c) and quantize_row_q8_K_ref (ggml-quants.c), step by step."""
    x = activations(2, 5, 512)
    codes, scales = quantize_activation(x, granularity)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.int8, x.shape, x.shape)
    for block, got in zip(x.view(-1, width).numpy(), dequantize_activation(codes, scales).view(-1, width), strict=True):
        extreme = block[np.abs(block).argmax()]
        if granularity == "q8_0":
            inverse = np.float32(127) / abs(extreme) if extreme else np.float32(0)
            step = np.float32(np.float16(abs(extreme) / np.float32(127)))
        else:  # its largest value has code −127, whatever its sign
            inverse = np.float32(-127) / extreme if extreme else np.float32(0)
            step = 1 / inverse if extreme else np.float32(0)
        np.testing.assert_allclose(got.numpy(), np.rint(block * inverse) * step, rtol=2e-7)


@pytest.mark.parametrize("granularity", ["token", "group128", "q8_0", "q8_k"])
def test_the_linear_layer_equals_float64_on_the_quantized_operands(granularity):
    columns = 512 if granularity.startswith("q8") else 300
    x, weight, bias = activations(7, columns), torch.randn(40, columns), torch.randn(40)
    served = dequantize_activation(*quantize_activation(x, granularity)).double()
    want = served @ weight.double().T + bias.double()
    got = linear(x, weight, bias, granularity)
    # 300 float32 products and sums: √300 · 2^-24
    assert (got.double() - want).norm() / want.norm() < 2e-6
    assert linear(x.to(torch.bfloat16), weight, None, granularity).dtype == torch.bfloat16


def test_per_token_quantization_is_compressed_tensors():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = activations(2, 5, 300)
    x[:, 0] = 1  # an all-zero token has scale 1 here and an epsilon there: both give zeros
    args = QuantizationArgs(num_bits=8, type="float", strategy="token", symmetric=True, dynamic=True)
    scale, zero_point = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    theirs = fake_quantize(x, scale, zero_point, args)
    assert torch.equal(dequantize_activation(*quantize_activation(x, "token")), theirs)
