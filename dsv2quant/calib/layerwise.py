"""Quantizing a model with calibration: layer by layer, each linear on what the ones before it left.

Two streams run side by side over all calibration tokens: `ideal`, through the unquantized model, and `real`, through
what has been quantized so far. A linear is refitted so that it gives on the real stream what its original gives on the
ideal one, rounded with GPTQ, and used at once for everything behind it. One window in 16 is held out, of fewer
windows the last 16th of each: there each matrix's codes compete with those of rounding, and the better ones stay.

Of several ranks each has some of the tokens. Moments are summed in an order that doesn't depend on their number, each
matrix is quantized by one rank, an expert by the one that all its tokens go to, and everybody gets the weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from dsv2quant.calib.calibration import (
    Calibration,
    Encoded,
    Prepared,
    batch_bytes,
    layer_file,
    work_memory,
    work_weights,
)
from dsv2quant.calib.choosing import choose
from dsv2quant.calib.distributed import ALONE, Ranks, TreeSum
from dsv2quant.calib.gptq import Moments, Split, Sums
from dsv2quant.calib.hidden import Stream, lanes, make_streams, room_on
from dsv2quant.calib.layer import IDEAL, REAL, SIDES, Choice, Job, Walk, copied, every_linear
from dsv2quant.calib.routed import Routed, quantize_experts
from dsv2quant.calib.streams import Made, through_layers
from dsv2quant.calib.threads import MOST, in_turn, kept_heap
from dsv2quant.checkpoint.dtypes import tensors_of
from dsv2quant.errors import UsageError
from dsv2quant.formats.codec import TooLargeError, too_large
from dsv2quant.formats.fp8 import INPUT_SCALE
from dsv2quant.formats.schemes import CODECS
from dsv2quant.model.attention import Rope
from dsv2quant.model.layers import FFN, MoE, RMSNorm, Stage, Stages, finish, route
from dsv2quant.model.load import DecoderLayer, Loader, LoadOptions
from dsv2quant.planning.plan import Entry, Plan
from dsv2quant.planning.recipe import CALIBRATED

PACKERS = 2  # threads
STREAMS = 3  # of hidden states: real, ideal, and what real experts add


@torch.inference_mode()
def quantize_layers(
    plan: Plan,
    folder: Path | None,
    calibration: Calibration,
    device: str = "cpu",
    progress: Callable[[int], object] = lambda weights: None,
    prepared: Prepared | None = None,
    ranks: Ranks = ALONE,
) -> Encoded | None:
    """Encode every entry whose method needs calibration, in `folder`, which keeps what is finished and is the first
    rank's alone; `progress` is called with weights whose codes are chosen. Other entries may need statistics, in
    `prepared`. Returns what was encoded to the first rank. Raises UsageError for more ranks than batches of tokens."""
    prepared = prepared or Prepared(plan)
    telling = Lock()

    def tell(weights: int) -> None:
        with telling:  # experts' codes are chosen by several threads
            progress(weights)

    config, ids = plan.checkpoint.config, calibration.ids
    loader = Loader(plan.checkpoint, LoadOptions(torch.float32, device, weight_only=True, calibrates=device == "cpu"))
    windows, ctx = (int(n) for n in ids.shape)
    count = len(lanes(ids.size, ctx))
    if ranks.size > count:
        what = f"{ranks.size} ranks for {windows} windows of {ctx} tokens, which go in {count} parts"
        raise UsageError(what, fix=f"start {count} at most, or calibrate on more tokens")
    rope = Rope(config, torch.device(device)).table(torch.arange(ctx, device=device))
    packing = ThreadPoolExecutor(PACKERS)
    job = partial(Job, rope=rope, windows=windows, ctx=ctx, ranks=ranks, packing=packing)
    own = job({}, (None, None), room=0, threads=0).tokens  # type: ignore[arg-type]
    threads = _threads(plan, len(own)) if device == "cpu" else 0
    beside = work_memory(plan) + max(0, threads - 1) * batch_bytes(config)
    job = partial(job, threads=threads)
    # Experts' outputs are added to more often than states are asked for.
    added, real, ideal = make_streams(STREAMS, len(own), config.hidden_size, device, folder, beside)

    def room() -> int:
        """What suspended stages may take."""
        taken = real.nbytes + ideal.nbytes + added.nbytes if device == "cpu" else 0
        return max(0, room_on(device) - beside - taken)

    def begun(index: int) -> tuple[tuple[DecoderLayer, DecoderLayer], dict[str, Choice]]:
        """Both models' layer, and what is planned for its modules."""
        layer = loader.layer(index)
        layers = copied(layer), layer
        return layers, _planned(plan, index, layers[REAL], device, prepared)

    def process(index: int) -> Made:
        layers, choices = begun(index)
        asked = job(choices, layers, room=room(), progress=tell, is_last=index == config.num_hidden_layers - 1)
        quantize_layer(asked, (real, ideal), added)
        parts = _joined(ranks.gather({module: packed.result() for module, packed in asked.parts.items()}))
        outcomes = {outcome.module: outcome for some in ranks.gather(asked.outcomes) or [] for outcome in some}
        tensors = {f"{module}.{suffix}": bits for module, some in parts.items() for suffix, bits in some.items()}
        return tensors, [asdict(outcomes[module]) for module in choices if module in outcomes]

    def again(index: int) -> None:
        layers, choices = begun(index)
        saved = ranks.agreed({} if folder is None else load_file(layer_file(folder, index)))
        done = _restored(plan, index, layers[REAL], device, saved)
        settled = {module: (*choice[:2], "settled") if module in done else choice for module, choice in choices.items()}
        quantize_layer(job(settled, layers, room=room()), (real, ideal), added)

    mine = ids.reshape(-1)[own.start : own.stop].reshape(-1, ctx)
    streams = {"real": real, "ideal": ideal}
    with fast_products(device), kept_heap() if device == "cpu" else nullcontext(), packing:
        through_layers(
            folder, loader, mine, streams, process, lambda layers: progress(work_weights(plan, range(layers))), again,
            ranks,
        )  # fmt: skip
    for stream in (real, ideal, added):
        stream.remove()
    return None if folder is None else Encoded(folder, config.num_hidden_layers)


def _threads(plan: Plan, tokens: int) -> int:
    """That take batches of tokens on a CPU: as many as there is memory for, beside the streams of so many tokens."""
    config = plan.checkpoint.config
    left = room_on("cpu") - work_memory(plan) - STREAMS * 4 * tokens * config.hidden_size
    return min(torch.get_num_threads(), MOST, 1 + max(0, left) // batch_bytes(config))


@contextmanager
def fast_products(device: str) -> Iterator[None]:
    """Products of float32 on a GPU in TF32, whose 11 bits are more than BF16's 8 that the model is served in; on a CPU
    by oneDNN, which rounds to BF16 first where the processor multiplies that in tiles (AMX). Sums stay in float32:
    moments that are rounded could lose their definiteness."""
    backends: Any
    backends, precision = (torch.backends.mkldnn, "bf16") if device == "cpu" else (torch.backends.cuda, "tf32")
    before = backends.matmul.fp32_precision
    backends.matmul.fp32_precision = precision
    try:
        yield
    finally:
        backends.matmul.fp32_precision = before


def _joined(parts: list[dict[str, dict[str, np.ndarray]]] | None) -> dict[str, dict[str, np.ndarray]]:
    return {module: arrays for some in parts or [] for module, arrays in some.items()}


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
            tensors = tensors_of(codec.layout(entry.spec.shape), parts, device)
            linear = linears[entry.spec.module]
            linear.weight, linear.activation = codec.decode(tensors, torch.float32), codec.activation
            linear.input_scale = tensors.get(INPUT_SCALE)
    return choices


def _check_finite(plan: Plan, entry: Entry, weight: torch.Tensor) -> None:
    """Raise InputError where a weight is NaN, infinite or beyond BF16's range: GPTQ would round it to anything."""
    if not torch.stack(weight.aminmax()).bfloat16().isfinite().all():
        raise plan.checkpoint.not_finite(entry.weight, (~weight.bfloat16().isfinite()).nonzero()[0].tolist())


def _restored(plan: Plan, index: int, layer: DecoderLayer, device: str, saved: Mapping[str, np.ndarray]) -> set[str]:
    """Give `layer` the weights of what calibration `saved` of it. Returns their modules."""
    linears = {linear.module: linear for linear in every_linear(layer)}
    done = set()
    for entry in plan.entries:
        if entry.spec.layer != index or entry.method not in CALIBRATED:
            continue
        codec, module = CODECS[entry.scheme], entry.spec.module
        layout = codec.layout(entry.spec.shape)
        parts = {part.suffix: saved[f"{module}.{part.suffix}"] for part in layout}
        linears[module].weight = codec.decode(tensors_of(layout, parts, device), torch.float32)
        done.add(module)
    return done


def quantize_layer(job: Job, streams: Sequence[Stream], added: Stream) -> None:
    """Fill `job.parts`; hidden states in `streams` go through the layer, into the last. `added` is scratch."""
    layers = job.layers

    def deliver(side: int, rows: slice, output: torch.Tensor) -> None:
        streams[side][rows] = streams[side][rows] + output

    def attention(side: int, rows: slice) -> Stages[torch.Tensor]:
        x = layers[side].input_layernorm(streams[side][rows])
        return layers[side].attention.stages(x.unflatten(0, (-1, job.ctx)), job.rope)

    _through(job, Walk(attention, job.token_bytes, job.room), deliver)
    norms = [layer.post_attention_layernorm for layer in layers]
    states = None
    if 2 * streams[REAL].nbytes <= job.room:  # experts ask for a token as often as it goes to one
        states = [_normed(job, norm, stream) for norm, stream in zip(norms, streams, strict=True)]

    def inputs(side: int, rows: slice | torch.Tensor) -> torch.Tensor:
        if states is None:
            return norms[side](streams[side][rows])
        return states[side][rows] if isinstance(rows, slice) else states[side].index_select(0, rows)

    real, ideal = (layer.ffn for layer in layers)
    if isinstance(real, FFN):
        assert isinstance(ideal, FFN)
        dense = Walk(lambda side, rows: (real, ideal)[side].stages(inputs(side, rows)), job.token_bytes, job.room)
        _through(job, dense, None if job.is_last else deliver)
        return
    assert isinstance(ideal, MoE)
    _experts(job, (real, ideal), inputs, added, deliver)


def _normed(job: Job, norm: RMSNorm, stream: Stream) -> torch.Tensor:
    """All of the rank's tokens, [tokens, hidden]."""
    made = torch.empty(len(job.tokens), job.config.hidden_size, device=job.device)
    parts = in_turn(job.threads, lambda rows: norm(stream[rows]), job.batches)
    for rows, some in zip(job.batches, parts, strict=True):
        made[rows] = some
    return made


Deliver = Callable[[int, slice, torch.Tensor], None]  # side, tokens, what the part made of them


def _through(job: Job, walk: Walk, deliver: Deliver | None, known: Split | None = None) -> None:
    """Quantize the linears of one stage after the other; what comes out behind the last is delivered, of the ideal
    model as soon as it can be, or not computed. `known` are the moments of the first stage's input."""
    found = walk.stages(slice(0, job.ctx))
    groups = [[0]]
    for index, stage in enumerate(found[1:], 1):
        if stage.beside:
            groups[-1].append(index)
        else:
            groups.append([index])
    delivered = False
    for group in groups:
        wanted = [index for index in group if job.wanted(found[index].linears)]
        unknown = [index for index in wanted if index or known is None]
        last = group is groups[-1]

        def summed(batches: list[slice], unknown: list[int] = unknown, last: bool = last) -> list[Sums]:
            sums = [Sums.zeros(1, found[index].x.shape[-1], job.device) for index in unknown]
            for rows in batches:
                held = job.held_in(rows)
                for index, some in zip(unknown, sums, strict=True):
                    some.add(0, held, *(walk.input(side, rows, index) for side in SIDES))
                if last and deliver is not None:
                    deliver(IDEAL, rows, walk.output(IDEAL, rows))
                walk.leave(rows)
            return sums

        trees = dict(zip(unknown, _trees(job, summed, len(unknown)), strict=True)) if unknown else {}
        delivered = last and bool(unknown)
        _settle(job, [(found[index], trees.get(index)) for index in wanted], known)

    if deliver is None:
        return

    def left(rows: slice, deliver: Deliver = deliver) -> None:
        for side in SIDES[: 1 if delivered else 2]:
            deliver(side, rows, walk.output(side, rows))

    deque(in_turn(job.threads, left, job.batches), maxlen=0)


def _trees(job: Job, summed: Callable[[list[slice]], Sequence[Sums]], count: int) -> list[TreeSum]:
    """So many sums of all the rank's tokens, of which `summed` gives those of a lane's batches."""
    trees, own = [TreeSum(len(job.lanes)) for _ in range(count)], job.own
    for lane, sums in zip(own, in_turn(job.threads, summed, own.values()), strict=True):
        for tree, some in zip(trees, sums, strict=True):
            tree.add(lane, [*some.every.parts, *some.held.parts])
    return trees


def _total(job: Job, tree: TreeSum, owner: int) -> Split | None:
    """The moments at the rank `owner`, None elsewhere."""
    total = tree.total(job.ranks, owner)
    return None if total is None else Sums.of(total).split()


def _settle(job: Job, stages: Sequence[tuple[Stage, TreeSum | None]], known: Split | None) -> None:
    """Quantize the linears of stages that don't depend on each other, each by another rank."""
    ranks = job.ranks
    totals = [
        known if summed is None else _total(job, summed, number % ranks.size)
        for number, (_, summed) in enumerate(stages)
    ]
    for number, ((stage, _), moments) in enumerate(zip(stages, totals, strict=True)):
        if ranks.rank == number % ranks.size:
            assert moments is not None
            choose(job, [job.wanted(stage.linears)], moments)
    for number, (stage, _) in enumerate(stages):
        for linear in job.wanted(stage.linears):
            if ranks.size > 1:
                own = linear.weight if ranks.rank == number % ranks.size else torch.empty_like(linear.weight)
                linear.weight = ranks.broadcast(own, number % ranks.size)


Inputs = Callable[[int, slice | torch.Tensor], torch.Tensor]  # side, tokens → what the FFN is applied to there


def _experts(job: Job, moes: tuple[MoE, MoE], inputs: Inputs, added: Stream, deliver: Deliver) -> None:
    """Routed experts, each on all its tokens, and shared ones. `added` takes what the real routed ones make."""
    real, ideal = moes
    wanted = bool(job.wanted(linear for part in (*real.experts, real.shared) for linear in every_linear(part)))
    routes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by a batch's first token

    def seen(batches: list[slice]) -> list[Sums]:
        sums = Sums.zeros(1, job.config.hidden_size, job.device)
        for rows in batches:
            x = inputs(REAL, rows)
            routes[rows.start] = route(x, real.router.weight, real.routing, real.router_bias)
            if wanted:
                sums.add(0, job.held_in(rows), x, inputs(IDEAL, rows))
        return [sums] if wanted else []

    trees = _trees(job, seen, wanted)
    pool = _everywhere(job, trees[0]) if wanted else None  # of all tokens, which shared experts see
    weights, chosen = (torch.cat(r) for r in zip(*(routes[rows.start] for rows in job.batches), strict=True))
    added.zero()
    for tokens, made in quantize_experts(job, Routed(real.experts, ideal.experts, weights, chosen), inputs, pool):
        added.add(tokens, made)

    def behind(side: int, rows: slice, output: torch.Tensor) -> None:
        routed = added[rows] if side == REAL else finish(ideal.routed(inputs(IDEAL, rows)))[0]
        deliver(side, rows, routed + output)

    if real.shared is None:
        for rows in job.batches if not job.is_last else ():
            for side in SIDES:
                behind(side, rows, torch.zeros((), device=job.device))
        return
    assert ideal.shared is not None
    shared = real.shared, ideal.shared
    walk = Walk(lambda side, rows: shared[side].stages(inputs(side, rows)), job.token_bytes, job.room)
    _through(job, walk, None if job.is_last else behind, pool)


def _everywhere(job: Job, tree: TreeSum) -> Split:
    """The moments of all ranks' sums, at each."""
    split = _total(job, tree, 0) or Split(*Sums.zeros(1, job.config.hidden_size, job.device))
    return Split(*(Moments(*(job.ranks.broadcast(part) for part in moments.parts)) for moments in split))
