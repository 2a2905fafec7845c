"""The torch references of the kernels: activation quantization and the quantized linear layer, against float64."""

from __future__ import annotations

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


@pytest.mark.parametrize("granularity", ["token", "group128"])
def test_the_linear_layer_equals_float64_on_the_quantized_operands(granularity):
    x, weight, bias = activations(7, 300), torch.randn(40, 300), torch.randn(40)
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
