"""Quantizing a model with calibration: layer by layer, each linear on what the ones before it left.

Two streams run side by side over all calibration tokens: `ideal`, through the unquantized model, and `real`, through
what has been quantized so far. A linear is refitted so that it gives on the real stream what its original gives on the
ideal one, rounded with GPTQ, and used at once for everything behind it. One window in 16 is held out, of fewer
windows the last 16th of each: there each matrix's codes compete with those of rounding, and the better ones stay.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.spec import Router
from dsv2quant.calib import gptq
from dsv2quant.calib.calibration import (
    MOMENT_BYTES,
    Calibration,
    Encoded,
    Outcome,
    Prepared,
    expert_bytes,
    work_weights,
)
from dsv2quant.calib.gptq import Split
from dsv2quant.calib.streams import Made, Spool, batches, through_layers
from dsv2quant.checkpoint.dtypes import torch_dtype
from dsv2quant.errors import InputError
from dsv2quant.formats.codec import Integers, TooLargeError, to_bf16, too_large
from dsv2quant.formats.fp8 import INPUT_SCALE
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.attention import Rope
from dsv2quant.model.layers import FFN, Linear, MoE, Stage, Stages, finish, route
from dsv2quant.model.load import DecoderLayer, Loader, LoadOptions
from dsv2quant.planning.plan import Entry, Plan
from dsv2quant.planning.recipe import CALIBRATED

HELD = 16  # one window in so many is held out, or one token
SIDES = (REAL, IDEAL) = (0, 1)

Parts = dict[str, np.ndarray]
Spools = tuple[Spool, Spool]  # of the real and of the ideal stream


@torch.inference_mode()
def quantize_layers(
    plan: Plan,
    folder: Path,
    calibration: Calibration,
    device: str = "cpu",
    progress: Callable[[int], object] = lambda weights: None,
    prepared: Prepared | None = None,
) -> Encoded:
    """Encode every entry whose method needs calibration, in `folder`, which keeps what is finished; `progress` is
    called with weights whose codes are chosen. Other entries may need statistics, in `prepared`."""
    prepared = prepared or Prepared(plan)
    config, ids = plan.checkpoint.config, calibration.ids
    loader = Loader(plan.checkpoint, LoadOptions(torch.float32, device, weight_only=True))
    windows, ctx = (int(n) for n in ids.shape)
    rope = Rope(config, torch.device(device)).table(torch.arange(ctx, device=device))
    width = config.num_attention_heads * config.v_head_dim

    def process(index: int, before: Sequence[Spool], behind: Sequence[Spool]) -> Made:
        ideal = loader.layer(index)
        real = copied(ideal)
        job = Job(_planned(plan, index, real, device, prepared), (real, ideal), rope, windows, ctx, progress)
        scratch = [Spool(folder / f"context-{side}", ids.size, width, device) for side in ("real", "ideal")]
        quantize_layer(job, (before[0], before[1]), (behind[0], behind[1]), (scratch[0], scratch[1]))
        for spool in scratch:
            spool.remove()
        tensors = {f"{module}.{suffix}": bits for module, parts in job.parts.items() for suffix, bits in parts.items()}
        return tensors, [asdict(outcome) for outcome in job.outcomes]

    through_layers(
        folder, loader, ids, ("real", "ideal"), process, lambda layers: progress(work_weights(plan, range(layers)))
    )
    return Encoded(folder, config.num_hidden_layers)


Choice = tuple[str, str, str]  # role, scheme and method of a matrix


def _planned(plan: Plan, index: int, layer: DecoderLayer, device: str, prepared: Prepared) -> dict[str, Choice]:
    """Quantize in `layer` what needs no calibration. Returns what is planned for each of its modules."""
    linears = {linear.module: linear for linear in every_linear(layer)}
    choices: dict[str, Choice] = {}
    for step in plan.steps:
        entries = [entry for entry in step.entries if entry.spec.layer == index and not entry.spec.keep]
        choices |= {entry.spec.module: (entry.spec.role, entry.scheme, entry.method) for entry in entries}
        for entry in entries:
            _check_finite(plan, entry, linears[entry.spec.module].weight)
        if not entries or entries[0].method in CALIBRATED or (entries[0].is_copy and entries[0].scheme == "bf16"):
            continue
        codec = CODECS[entries[0].scheme]
        try:
            if entries[0].is_kept:
                encoded = [codec.kept(plan.checkpoint.arrays(entry.weight)) for entry in entries]
            else:
                weights = [plan.checkpoint.encodable(entry.weight) for entry in entries]
                inputs = [prepared.inputs(entry) for entry in entries if entry.needs_inputs]
                encoded = codec.encode(weights, device, entries[0].encoding, inputs)
        except TooLargeError as error:
            entry = entries[error.which]
            raise too_large(entry.spec.module, entry.scheme) from None
        for entry, parts in zip(entries, encoded, strict=True):
            tensors = {
                part.suffix: torch.from_numpy(parts[part.suffix]).view(torch_dtype(part.dtype)).to(device)
                for part in codec.layout(entry.spec.shape)
            }
            linear = linears[entry.spec.module]
            linear.weight, linear.activation = codec.decode(tensors, torch.float32), codec.activation
            linear.input_scale = tensors.get(INPUT_SCALE)
    return choices


def _check_finite(plan: Plan, entry: Entry, weight: torch.Tensor) -> None:
    """Raise InputError where a weight is NaN, infinite or beyond BF16's range: GPTQ would round it to anything."""
    if not torch.stack(weight.aminmax()).bfloat16().isfinite().all():
        raise plan.checkpoint.not_finite(entry.weight, (~weight.bfloat16().isfinite()).nonzero()[0].tolist())


@dataclass
class Job:
    """One layer: what is planned for its modules, the real and the ideal model's layer, and what came out so far."""

    choices: Mapping[str, Choice]
    layers: tuple[DecoderLayer, DecoderLayer]
    rope: torch.Tensor
    windows: int
    ctx: int
    progress: Callable[[int], object] = lambda weights: None  # called with the weights whose codes are chosen
    parts: dict[str, Parts] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def held(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of these tokens are held out."""
        if self.windows >= HELD:
            return (tokens // self.ctx) % HELD == HELD // 2
        return tokens % self.ctx >= self.ctx - self.ctx // HELD

    def wanted(self, linears: Iterable[Linear]) -> list[Linear]:
        """Those of the layer's linears that need calibration."""
        return [linear for linear in linears if self.choices[linear.module][2] in CALIBRATED]

    def batches(self) -> list[slice]:
        """All tokens in turn."""
        return batches(self.windows * self.ctx, self.ctx)


def copied(part: Any) -> Any:
    """A copy of a layer's structure that shares its tensors."""
    if is_dataclass(part) and not isinstance(part, (ModelConfig, Router)):
        made = copy.copy(part)
        for item in fields(part):
            setattr(made, item.name, copied(getattr(part, item.name)))
        return made
    return [copied(item) for item in part] if isinstance(part, list) else part


def every_linear(part: Any) -> Iterator[Linear]:
    """The linears of a layer, its router among them."""
    if isinstance(part, Linear):
        yield part
    elif isinstance(part, list) or is_dataclass(part):
        for item in part if isinstance(part, list) else [getattr(part, item.name) for item in fields(part)]:
            yield from every_linear(item)


def quantize_layer(job: Job, streams: Spools, out: Spools, context: Spools) -> None:
    """Fill `job.parts`; hidden states go from `streams` to `out`. `context` is scratch."""
    layers, every = job.layers, list(itertools.product(SIDES, job.batches()))

    def attention(side: int, rows: slice) -> Stages[torch.Tensor]:
        x = layers[side].input_layernorm(streams[side][rows])
        return layers[side].attention.context(x.unflatten(0, (-1, job.ctx)), job.rope)

    def output(side: int, rows: slice) -> Stages[torch.Tensor]:
        return layers[side].attention.output(context[side][rows])

    _settle(job, attention)
    for side, rows in every:
        context[side][rows] = finish(attention(side, rows)).flatten(0, 1)
    _settle(job, output)
    for side, rows in every:
        out[side][rows] = streams[side][rows] + finish(output(side, rows))
    _feed_forward(job, lambda side, rows: layers[side].post_attention_layernorm(out[side][rows]))
    for side, rows in every:
        out[side][rows], _ = finish(layers[side].feed_forward(out[side][rows]))


Replay = Callable[[int, slice], Stages[torch.Tensor]]  # side, tokens → the stages that these go through there


def _settle(job: Job, replay: Replay) -> None:
    """Quantize the linears of one stage after the other; all tokens are replayed up to each."""
    found: list[Stage] = []
    finish(replay(REAL, slice(0, job.ctx)), found.append)  # a window shows what stages there are
    for index, stage in enumerate(found):
        linears = job.wanted(stage.linears)
        if not linears:
            continue
        moments = Split.zeros(1, stage.x.shape[-1], stage.x.device)
        for rows in job.batches():
            x, y = (_input(replay(side, rows), index).flatten(0, -2) for side in SIDES)
            moments.add(0, job.held(torch.arange(rows.start, rows.stop, device=x.device)), x, y)
        _choose(job, [linears], moments)


def _input(stages: Stages[torch.Tensor], index: int) -> torch.Tensor:
    """The input of one of the stages."""
    return next(itertools.islice(stages, index, None)).x


Inputs = Callable[[int, slice | np.ndarray], torch.Tensor]  # side, tokens → what the FFN is applied to there


def _feed_forward(job: Job, inputs: Inputs) -> None:
    """A dense FFN, or routed experts in batches and shared ones."""
    real, ideal = (layer.ffn for layer in job.layers)
    if isinstance(real, FFN):
        assert isinstance(ideal, FFN)
        _settle(job, lambda side, rows: (real, ideal)[side].stages(inputs(side, rows)))
        return
    assert isinstance(ideal, MoE)
    _routed(job, real, ideal, inputs)
    if real.shared is not None:
        assert ideal.shared is not None
        shared = real.shared, ideal.shared
        _settle(job, lambda side, rows: shared[side].stages(inputs(side, rows)))


def _routed(job: Job, real: MoE, ideal: MoE, inputs: Inputs) -> None:
    """The experts, in batches that fit into memory."""
    c, device = job.layers[REAL].attention.config, real.router.weight.device
    if not job.wanted(linear for expert in real.experts for linear in every_linear(expert)):
        return
    routes, pool = [], Split.zeros(1, c.hidden_size, device)
    for rows in job.batches():
        x, y = (inputs(side, rows) for side in SIDES)
        routes.append(route(x, real.router.weight, real.routing, real.router_bias))
        pool.add(0, job.held(torch.arange(rows.start, rows.stop, device=device)), x, y)
    weights, chosen = (torch.cat(r) for r in zip(*routes, strict=True))  # [tokens, k]
    stride = max(1, len(chosen) // (4 * c.moe_intermediate_size))
    sample = torch.arange(stride // 2, len(chosen), stride, device=device)
    gather = _gatherer(job, inputs, c.hidden_size)
    batch = max(1, MOMENT_BYTES // expert_bytes(c))
    for first in range(0, len(real.experts), batch):
        pairs = list(zip(real.experts, ideal.experts, strict=True))[first : first + batch]
        members = [(chosen == first + i).nonzero(as_tuple=True) for i in range(len(pairs))]
        _experts(job, pairs, [(tokens, weights[tokens, k]) for tokens, k in members], gather, pool, sample)


Gather = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # tokens → real and ideal FFN inputs


def _gatherer(job: Job, inputs: Inputs, hidden: int) -> Gather:
    """The FFN's inputs by token: held on the device if they fit into the budget, otherwise read from the spools."""
    if 2 * 4 * job.windows * job.ctx * hidden <= MOMENT_BYTES:
        x, y = (torch.cat([inputs(side, rows) for rows in job.batches()]) for side in SIDES)
        return lambda tokens: (x[tokens], y[tokens])

    def read(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = tokens.cpu().numpy()
        return inputs(REAL, index), inputs(IDEAL, index)

    return read


def _experts(
    job: Job,
    pairs: Sequence[tuple[FFN, FFN]],
    routed: Sequence[tuple[torch.Tensor, torch.Tensor]],
    gather: Gather,
    pool: Split,
    sample: torch.Tensor,
) -> None:
    """Quantize experts, real and ideal, to which tokens are routed with weights: gate and up on these tokens, drawn
    toward the `pool` of all; down with squared weights, drawn toward what the expert makes of a `sample` of all."""
    gate_up = [job.wanted((real.gate_proj, real.up_proj)) for real, _ in pairs]
    if gate_up[0]:
        found = Split.zeros(len(pairs), gate_up[0][0].weight.shape[1], sample.device)
        for i, (tokens, _) in enumerate(routed):
            found.add(i, job.held(tokens), *gather(tokens))
        _choose(job, gate_up, found.shrunk(pool))
    down = [job.wanted((real.down_proj,)) for real, _ in pairs]
    if not down[0]:
        return
    found, prior = (Split.zeros(len(pairs), pairs[0][REAL].down_proj.weight.shape[1], sample.device) for _ in range(2))
    for i, (pair, (tokens, weights)) in enumerate(zip(pairs, routed, strict=True)):
        for into, some, squared in ((found, tokens, weights.square()), (prior, sample, None)):
            x, y = (_input(expert.stages(z), 1) for expert, z in zip(pair, gather(some), strict=True))
            into.add(i, job.held(some), x, y, squared)
    _choose(job, down, found.shrunk(prior))


def _choose(job: Job, linears: Sequence[Sequence[Linear]], moments: Split) -> None:
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
                job.parts[linear.module] = codec.pack(*(x[i].cpu().numpy() for x in best))
            else:
                job.parts[linear.module] = {"weight": to_bf16(linear.weight.cpu().numpy())}
            seen = int(train.count[i])
            job.outcomes.append(Outcome(linear.module, role, seen, errors[0][i], errors[1][i], bool(worse[i])))
        job.progress(weight.numel())


def _stored(codec: Integers, scales: torch.Tensor) -> torch.Tensor:
    """The scales that the codec stores in place of these."""
    return torch.from_numpy(codec.storable(scales.cpu().numpy())).to(scales.device)
