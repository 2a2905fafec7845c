"""The codes of matrices by their inputs' moments: fitted and rounded by GPTQ, unless plain rounding does better on the
tokens that are held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dsv2quant.calib import gptq
from dsv2quant.calib.calibration import Outcome
from dsv2quant.calib.gptq import Split
from dsv2quant.calib.layer import Job
from dsv2quant.errors import InputError
from dsv2quant.formats.codec import Integers, to_bf16, too_large
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.layers import Linear


def choose(job: Job, linears: Sequence[Sequence[Linear]], moments: Split) -> None:
    """Quantize linears by inputs: `linears[i]` are those on input i, alike for every i; `moments` are of the tokens to
    fit on and of those held out, one batch entry per input."""
    train, held = moments
    held = held if held.count.sum() else train
    try:
        factored = gptq.factor(train.h, train.damping)
    except ValueError:
        fix = "the checkpoint is damaged, or its activations overflow float32"
        raise InputError("its inputs are not finite", where=linears[0][0].module, fix=fix) from None
    for alike in zip(*linears, strict=True):
        role, scheme, _ = job.choices[alike[0].module]
        weight = torch.stack([linear.weight for linear in alike])  # [batch, R, K]
        wished = gptq.fit(weight, train, factored)
        codec = CODECS[scheme].integers
        if codec is not None:
            group, bits = codec.group_size or weight.shape[2], codec.bits
            scales = _stored(codec, gptq.best_scales(wished, train.h.diagonal(dim1=-2, dim2=-1), group, bits))
            codes = gptq.quantize(wished, scales, factored, bits)
            plain_scales = gptq.best_scales(weight, torch.ones_like(weight[:, 0]), group, bits)
            for linear, needed in zip(alike, plain_scales, strict=True):
                if not codec.holds(needed.cpu().numpy()):
                    raise too_large(linear.module, scheme)
            plain_scales = _stored(codec, plain_scales)
            plain_codes = gptq.nearest(weight, plain_scales, bits)
            quantized, plain = gptq.dequantize(codes, scales), gptq.dequantize(plain_codes, plain_scales)
        else:
            quantized, plain = wished.bfloat16().float(), weight
        worse = gptq.output_error(weight, quantized, held) > gptq.output_error(weight, plain, held)
        errors = [gptq.relative_error(*pair, held).tolist() for pair in ((wished, quantized), (weight, plain))]
        for i, linear in enumerate(alike):
            linear.weight = (plain if worse[i] else quantized)[i]
            if codec is not None:
                best = (plain_codes, plain_scales) if worse[i] else (codes, scales)
                packed = job.packing.submit(codec.pack, *(x[i].cpu().numpy() for x in best))
            else:
                packed = job.packing.submit(_as_bf16, linear.weight.cpu().numpy())
            job.parts[linear.module] = packed
            seen = int(train.count[i])
            job.outcomes.append(Outcome(linear.module, role, seen, errors[0][i], errors[1][i], bool(worse[i])))
        job.progress(weight.numel())


def _as_bf16(weight: np.ndarray) -> dict[str, np.ndarray]:
    return {"weight": to_bf16(weight)}


def _stored(codec: Integers, scales: torch.Tensor) -> torch.Tensor:
    """The scales that the codec stores in place of these."""
    return torch.from_numpy(codec.storable(scales.cpu().numpy())).to(scales.device)
