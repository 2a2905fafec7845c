"""Quantizing one decoder layer with calibration: its linears in order of the data, each on what the ones before left.

Two streams run side by side over all calibration tokens: `ideal`, through the unquantized model, and `real`, through
what has been quantized so far. A linear is refitted so that it gives on the real stream what its original gives on the
ideal one, rounded with GPTQ, and used at once for everything behind it. One window in 16 is held out, of fewer
windows the last 16th of each: there each matrix's codes compete with those of rounding, and the better ones stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.spec import Router
from dsv2quant.calib import gptq
from dsv2quant.calib.calibration import MOMENT_BYTES, Outcome, expert_bytes
from dsv2quant.calib.gptq import Moments
from dsv2quant.calib.streams import Spool, batches
from dsv2quant.errors import InputError
from dsv2quant.formats.codec import Integers, to_bf16, too_large
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.decoder import DecoderLayer
from dsv2quant.model.layers import FFN, Linear, MoE, route
from dsv2quant.planning.recipe import CALIBRATED

HELD = 16  # one window in so many is held out, or one token

Parts = dict[str, np.ndarray]


@dataclass
class Job:
    """One layer: schemes and methods by module, both models' layers, and what came out so far."""

    at: str
    choices: Mapping[str, tuple[str, str, str]]  # module → (role, scheme, method)
    ideal: DecoderLayer
    real: DecoderLayer
    rope: torch.Tensor
    windows: int
    ctx: int
    parts: dict[str, Parts] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    progress: Callable[[int], object] = lambda weights: None  # called with the weights whose codes are chosen

    def holdout(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of these tokens are held out."""
        if self.windows >= HELD:
            return (tokens // self.ctx) % HELD == HELD // 2
        return tokens % self.ctx >= self.ctx - self.ctx // HELD

    def wanted(self, names: Sequence[str]) -> list[str]:
        """Those of the layer's modules that need calibration."""
        return [name for name in names if self.choices[f"{self.at}.{name}"][2] in CALIBRATED]

    def linear(self, module: str) -> Linear:
        """A module of the quantized layer: '<at>.self_attn.o_proj', '<at>.mlp.experts.3.up_proj' …"""
        block, *path, leaf = module.removeprefix(f"{self.at}.").split(".")
        owner: Any = self.real.attention if block == "self_attn" else self.real.ffn
        if path == ["shared_experts"]:
            owner = owner.shared
        elif path:
            owner = owner.experts[int(path[1])]
        found = getattr(owner, leaf)
        assert isinstance(found, Linear)
        return found


def copied(layer: Any) -> Any:
    """A copy of a layer's structure that shares its tensors."""
    if is_dataclass(layer) and not isinstance(layer, (ModelConfig, Router)):
        made = copy.copy(layer)
        for item in fields(layer):
            setattr(made, item.name, copied(getattr(layer, item.name)))
        return made
    return [copied(item) for item in layer] if isinstance(layer, list) else layer


def quantize_layer(
    job: Job,
    streams: tuple[Spool, Spool],
    out: tuple[Spool, Spool],
    context: tuple[Spool, Spool],
) -> None:
    """Fill `job.parts`; (real, ideal) hidden states go from `streams` to `out`. `context` is scratch."""
    _attention(job, streams, context)
    for spool, x, c, layer in zip(out, streams, context, (job.real, job.ideal), strict=True):
        for rows in batches(len(x), job.ctx):
            spool[rows] = x[rows] + layer.attention.o_proj(c[rows])
    if isinstance(job.real.ffn, MoE):
        _moe(job, out)
    else:
        assert isinstance(job.real.ffn, FFN)
        assert isinstance(job.ideal.ffn, FFN)
        _ffn(job, "mlp", job.real.ffn, job.ideal.ffn, _normed(job, out))
    for spool, layer in zip(out, (job.real, job.ideal), strict=True):
        for rows in batches(len(spool), job.ctx):
            spool[rows], _ = layer.feed_forward(spool[rows])


Pair = tuple[slice, torch.Tensor, torch.Tensor]  # rows, real and ideal inputs [tokens, K]


def _normed(job: Job, streams: tuple[Spool, Spool]) -> Callable[[], Iterator[Pair]]:
    def pairs() -> Iterator[Pair]:
        for rows in batches(len(streams[0]), job.ctx):
            real, ideal = (
                layer.post_attention_layernorm(x[rows]) for x, layer in zip(streams, (job.real, job.ideal), strict=True)
            )
            yield rows, real, ideal

    return pairs


def _attention(job: Job, streams: tuple[Spool, Spool], context: tuple[Spool, Spool]) -> None:
    real, ideal = job.real.attention, job.ideal.attention

    def inputs() -> Iterator[Pair]:
        for rows in batches(len(streams[0]), job.ctx):
            yield rows, job.real.input_layernorm(streams[0][rows]), job.ideal.input_layernorm(streams[1][rows])

    def query_latents() -> Iterator[Pair]:
        for rows, x, y in inputs():
            assert real.q_a_layernorm is not None
            assert real.q_a_proj is not None
            assert ideal.q_a_proj is not None
            yield rows, real.q_a_layernorm(real.q_a_proj(x)), real.q_a_layernorm(ideal.q_a_proj(y))

    def latents() -> Iterator[Pair]:
        width = real.config.kv_lora_rank
        for rows, x, y in inputs():
            norm = real.kv_a_layernorm
            yield (
                rows,
                norm(real.kv_a_proj_with_mqa(x)[..., :width]),
                norm(ideal.kv_a_proj_with_mqa(y)[..., :width]),
            )

    first = "q_proj" if real.q_proj is not None else "q_a_proj"
    _settle(job, [f"self_attn.{first}", "self_attn.kv_a_proj_with_mqa"], inputs)
    if real.q_proj is None:
        _settle(job, ["self_attn.q_b_proj"], query_latents)
    _settle(job, ["self_attn.kv_b_proj"], latents)
    for rows, x, y in inputs():
        windows = (-1, job.ctx)
        context[0][rows] = real.context(x.unflatten(0, windows), job.rope).flatten(0, 1)
        context[1][rows] = ideal.context(y.unflatten(0, windows), job.rope).flatten(0, 1)

    def contexts() -> Iterator[Pair]:
        for rows in batches(len(context[0]), job.ctx):
            yield rows, context[0][rows], context[1][rows]

    _settle(job, ["self_attn.o_proj"], contexts)


def _ffn(job: Job, name: str, real: FFN, ideal: FFN, inputs: Callable[[], Iterator[Pair]]) -> None:
    def activations() -> Iterator[Pair]:
        for rows, x, y in inputs():
            yield rows, real.activation(x), ideal.activation(y)

    _settle(job, [f"{name}.gate_proj", f"{name}.up_proj"], inputs)
    _settle(job, [f"{name}.down_proj"], activations)


Split = tuple[Moments, Moments]  # of the tokens to fit on, and of those held out


def _split(batch: int, columns: int, device: torch.device) -> Split:
    return Moments.zeros(batch, columns, device), Moments.zeros(batch, columns, device)


def _add(
    job: Job,
    moments: Split,
    which: int,
    tokens: torch.Tensor,
    x: torch.Tensor,
    ideal: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> None:
    """`Moments.add` of some tokens' inputs, [n, K] each, to the part that each token belongs to."""
    held = job.holdout(tokens)
    for m, keep in zip(moments, (~held, held), strict=True):
        m.add(which, x[keep], ideal[keep], None if weight is None else weight[keep])


def _settle(job: Job, names: list[str], inputs: Callable[[], Iterator[Pair]]) -> None:
    """Quantize the linears `names`, which share their input."""
    names = job.wanted(names)
    if not names:
        return
    moments: Split | None = None
    for rows, x, y in inputs():
        moments = moments or _split(1, x.shape[1], x.device)
        _add(job, moments, 0, torch.arange(rows.start, rows.stop, device=x.device), x, y)
    assert moments is not None
    _choose(job, [names], moments)


def _moe(job: Job, streams: tuple[Spool, Spool]) -> None:
    """Routed experts in batches, and shared experts."""
    real, ideal = job.real.ffn, job.ideal.ffn
    assert isinstance(real, MoE)
    assert isinstance(ideal, MoE)
    inputs = _normed(job, streams)
    routes = []
    device = real.router.device
    hidden = streams[0].width
    pool = _split(1, hidden, device)
    needed = bool(job.wanted([f"mlp.experts.{e}.gate_proj" for e in range(len(real.experts))]))
    for rows, x, y in inputs():
        routes.append(route(x, real.router, real.routing))
        if needed:
            _add(job, pool, 0, torch.arange(rows.start, rows.stop, device=device), x, y)
    weights, chosen = (torch.cat(r) for r in zip(*routes, strict=True))  # [tokens, k]
    batch = max(1, MOMENT_BYTES // expert_bytes(job.real.attention.config))
    gather = _gatherer(job, streams)
    if job.wanted([f"mlp.experts.{e}.{p}_proj" for e in range(len(real.experts)) for p in ("gate", "up", "down")]):
        for first in range(0, len(real.experts), batch):
            members = range(first, min(first + batch, len(real.experts)))
            _experts(job, gather, members, weights, chosen, pool)
    if real.shared is not None:
        assert ideal.shared is not None
        _ffn(job, "mlp.shared_experts", real.shared, ideal.shared, inputs)


Gather = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # tokens → real and ideal FFN inputs


def _gatherer(job: Job, streams: tuple[Spool, Spool]) -> Gather:
    """The FFN's inputs by token: held on the device if they fit into the budget, otherwise read from the spools."""
    if 2 * 4 * len(streams[0]) * streams[0].width <= MOMENT_BYTES:
        _, real, ideal = zip(*_normed(job, streams)(), strict=True)
        x, y = torch.cat(real), torch.cat(ideal)
        return lambda tokens: (x[tokens], y[tokens])

    def read(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = tokens.cpu().numpy()
        x, y = streams[0][index], streams[1][index]
        return job.real.post_attention_layernorm(x), job.ideal.post_attention_layernorm(y)

    return read


def _experts(
    job: Job,
    gather: Gather,
    members: range,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    pool: Split,
) -> None:
    """Quantize the experts `members`: gate and up on the tokens routed to each, down with squared routing weights."""
    real, ideal = job.real.ffn, job.ideal.ffn
    assert isinstance(real, MoE)
    assert isinstance(ideal, MoE)
    device = weights.device
    config = job.real.attention.config
    stride = max(1, len(chosen) // (4 * config.moe_intermediate_size))
    sample = torch.arange(stride // 2, len(chosen), stride, device=device)

    routed = [(chosen == expert).nonzero(as_tuple=True) for expert in members]
    names = [job.wanted([f"mlp.experts.{e}.gate_proj", f"mlp.experts.{e}.up_proj"]) for e in members]

    if names[0]:
        found = _split(len(members), config.hidden_size, device)
        for i, (tokens, _) in enumerate(routed):
            _add(job, found, i, tokens, *gather(tokens))
        _choose(job, names, (found[0].shrunk(pool[0]), found[1].shrunk(pool[1] if pool[1].count else pool[0])))
    names = [[f"mlp.experts.{e}.down_proj"] for e in members]
    if not job.wanted(names[0]):
        return
    width = config.moe_intermediate_size
    found, prior = (_split(len(members), width, device) for _ in range(2))
    for i, ((tokens, specs), expert) in enumerate(zip(routed, members, strict=True)):
        for into, where, squared in ((found, tokens, weights[tokens, specs].square()), (prior, sample, None)):
            x, y = gather(where)
            x, y = real.experts[expert].activation(x), ideal.experts[expert].activation(y)
            _add(job, into, i, where, x, y, squared)
    holdout = prior[1] if prior[1].count.all() else prior[0]
    _choose(job, names, (found[0].shrunk(prior[0]), found[1].shrunk(holdout)))


def _choose(job: Job, names: Sequence[Sequence[str]], moments: Split) -> None:
    """Quantize linears by inputs: `names[i]` are those on input i, alike for every i; `moments` are of the tokens to
    fit on and of those held out, one batch entry per input."""
    train, held = moments
    held = held if held.count.sum() else train
    try:
        factored = gptq.factor(train.h, train.damping)
    except ValueError:
        fix = "the checkpoint is damaged, or its activations overflow float32"
        raise InputError("its inputs are not finite", where=f"{job.at}.{names[0][0]}", fix=fix) from None
    for k in range(len(names[0])):
        modules = [row[k] for row in names]
        role, scheme, _ = job.choices[f"{job.at}.{modules[0]}"]
        linears = [job.linear(f"{job.at}.{name}") for name in modules]
        weight = torch.stack([linear.weight for linear in linears])  # [batch, R, K]
        wished = gptq.fit(weight, train, factored)
        codec = CODECS[scheme].integers
        if codec is not None:
            group = codec.group_size or weight.shape[2]
            scales = _stored(codec, gptq.best_scales(wished, train.h.diagonal(dim1=-2, dim2=-1), group))
            codes = gptq.quantize(wished, scales, factored)
            plain_scales = gptq.best_scales(weight, torch.ones_like(weight[:, 0]), group)
            for name, needed in zip(modules, plain_scales, strict=True):
                if not codec.holds(needed.cpu().numpy()):
                    raise too_large(f"{job.at}.{name}", scheme)
            plain_scales = _stored(codec, plain_scales)
            plain_codes = gptq.nearest(weight, plain_scales)
            quantized, plain = gptq.dequantize(codes, scales), gptq.dequantize(plain_codes, plain_scales)
        else:
            quantized, plain = wished.bfloat16().float(), weight
        worse = gptq.output_error(weight, quantized, held) > gptq.output_error(weight, plain, held)
        errors = (
            gptq.relative_error(wished, quantized, held).tolist(),
            gptq.relative_error(weight, plain, held).tolist(),
        )
        for i, (name, linear) in enumerate(zip(modules, linears, strict=True)):
            module = f"{job.at}.{name}"
            linear.weight = (plain if worse[i] else quantized)[i]
            if codec is not None:
                best = (plain_codes, plain_scales) if worse[i] else (codes, scales)
                job.parts[module] = codec.pack(*(x[i].cpu().numpy() for x in best))
            else:
                job.parts[module] = {"weight": to_bf16(linear.weight.cpu().numpy())}
            seen = int(train.count[i])
            job.outcomes.append(Outcome(module, role, seen, errors[0][i], errors[1][i], bool(worse[i])))
        job.progress(weight.numel())


def _stored(codec: Integers, scales: torch.Tensor) -> torch.Tensor:
    """The scales that the codec stores in place of these."""
    return torch.from_numpy(codec.storable(scales.cpu().numpy())).to(scales.device)
