"""What calibrating with GPTQ and converting takes on some machines: seconds by phase, memory, bytes over each link, and
what saturates; from headers alone.

Layers are read and computed one after the other; codes are packed while more are chosen, by `PACKERS` threads, and a
layer is saved while the next one is computed. Behind the last the artifact is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from dsv2quant.calib.calibration import LANES, needs_calibration, window_length, work_memory
from dsv2quant.calib.costs import PHASES, Costs, Share, Spent, added_up
from dsv2quant.calib.hidden import lanes
from dsv2quant.calib.layerwise import PACKERS, STREAMS
from dsv2quant.calib.rates import RATES, Rates
from dsv2quant.errors import UsageError
from dsv2quant.planning.memory import card_capacity
from dsv2quant.planning.options import check_values
from dsv2quant.planning.plan import Entry, Plan

FILES = 5  # that conversion writes side by side on 16 cores
COMPUTED = ("encode", "forward", "moments", "factor", "quantize")


@dataclass(frozen=True)
class Machines:
    """`nodes` alike, of `gpus` each, of a kind that RATES has."""

    gpu: str = "H200"
    gpus: int = 1
    nodes: int = 1

    @property
    def ranks(self) -> int:
        """One for each GPU."""
        return self.gpus * self.nodes


# What is told where none are named: GPUs of a node, nodes. No more ranks than LANES share tokens.
USUAL = ((1, 1), (2, 1), (8, 1), (min(8, LANES // 4), 4))


@dataclass(frozen=True)
class Forecast:
    """Of one choice of machines. `seconds` are those of all layers by phase, of the rank that has most to do; `layers`
    seconds of each, `artifact` of what follows. Bytes are a rank's: of `device` memory, beside what suspended stages
    take where there is room, of `host` memory for its streams, and what it sends over `nvlink` and `network`; `disk` is
    what a node reads and writes. `busy` are the seconds that each resource is at work, of which the first is the one
    that saturates."""

    machines: Machines
    seconds: dict[str, float]
    layers: tuple[float, ...]
    artifact: float
    device: int
    host: int
    nvlink: int
    network: int
    disk: int
    busy: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of it all."""
        return sum(self.layers) + self.artifact


@dataclass(frozen=True)
class Forecasts:
    """Those of one plan on `samples` windows of `length` tokens; `experts` says which layer has experts, the last that
    does but the model's last one, or None."""

    plan: Plan
    samples: int
    length: int
    experts: int | None
    each: tuple[Forecast, ...]


def forecast(
    plan: Plan, *, gpu: str = "H200", gpus: int | None = None, nodes: int | None = None, samples: int = 512,
    length: int | None = None,
) -> Forecasts:  # fmt: skip
    """What calibrating by a plan on `samples` windows of `length` tokens takes, and converting: seconds, memory, bytes
    over each link, from headers alone.

    It is told of `nodes` machines of `gpus` GPUs each, of a kind "H200" or "H100"; without both, of those of USUAL
    whose ranks can share the windows. Raises UsageError for a plan that GPTQ has no part in, a GPU without rates, and
    more GPUs than share the windows.
    """
    check_values({"gpus": gpus, "nodes": nodes, "samples": samples, "length": length})
    if not needs_calibration(plan):
        what = f"--time tells what GPTQ takes, and recipe {plan.recipe.name} has none"
        raise UsageError(what, fix="take a scheme of integers by --method gptq, as --int4")
    if gpu not in RATES:
        raise UsageError(f"--gpu {gpu}: --time has no rates of it", fix=f"it takes {', '.join(RATES)}")
    length = window_length(plan.checkpoint, length)
    tokens, most = samples * length, len(lanes(samples * length, length))
    if gpus or nodes:
        machines = [Machines(gpu, gpus or 1, nodes or 1)]
    else:
        machines = [some for some in (Machines(gpu, *usual) for usual in USUAL) if some.ranks <= most]
    if machines[0].ranks > most:
        what = f"{machines[0].ranks} ranks for {samples} windows of {length} tokens, which go in {most} parts"
        raise UsageError(what, fix=f"take {most} GPUs at most, or more tokens")
    config = plan.checkpoint.config
    last = config.num_hidden_layers - 1
    experts = [layer for layer in range(last + 1) if config.is_moe(layer)]
    usual = [layer for layer in experts if layer < last] or experts  # what comes out of the last is not computed
    each = tuple(_forecast(plan, some, tokens, length) for some in machines)
    return Forecasts(plan, samples, length, usual[-1] if usual else None, each)


def _forecast(plan: Plan, machines: Machines, tokens: int, ctx: int) -> Forecast:
    rates, config = RATES[machines.gpu], plan.checkpoint.config
    beside, capacity = work_memory(plan), card_capacity(machines.gpu)
    state = 4 * ceil(tokens / machines.ranks) * config.hidden_size
    on_device = max(0, min(STREAMS, (capacity - beside) // state))
    spilled = STREAMS - on_device
    layers: dict[int, list[Entry]] = defaultdict(list)
    for entry in plan.entries:
        if entry.spec.layer is not None and not entry.spec.is_prediction:
            layers[entry.spec.layer].append(entry)
    made: dict[object, Spent] = {}
    found = []
    for layer, entries in sorted(layers.items()):
        is_last = layer == config.num_hidden_layers - 1
        kind = is_last, *((e.spec.role, e.spec.shape, e.scheme, e.method, e.spec.expert) for e in entries)
        if kind not in made:
            held = sum(4 * e.spec.size for e in entries)
            room = max(0, capacity - beside - held - on_device * state)
            share = Share(tokens, ctx, machines.ranks, machines.gpus, room, spilled)
            made[kind] = Costs(config, rates, share).layer(entries)
        found.append(made[kind])
    # Embeddings are read before the first layer, and the head beside them.
    ends = sum(e.weight.nbytes for e in plan.entries if e.spec.layer is None) / rates.loaded
    artifact = plan.bytes_out / rates.saved / FILES
    links = added_up([{"disk": 2 * plan.bytes_out}, *(spent.links for spent in found)])
    seconds = added_up([dict.fromkeys(PHASES, 0.0), {"read": ends}, *(spent.seconds for spent in found)])
    return Forecast(
        machines, seconds, _finished(found, ends), artifact,
        device=beside + on_device * state, host=spilled * state,
        nvlink=int(links["nvlink"]), network=int(links["network"]), disk=int(links["disk"]),
        busy=_busy(seconds, links, artifact, rates),
    )  # fmt: skip


def _finished(found: Sequence[Spent], begin: float) -> tuple[float, ...]:
    """Seconds from one layer's file to the next, the first of which begins so much later: a layer is saved while the
    next is computed, and before that is."""
    layers, computed, saved = [], begin, 0.0
    for spent in found:
        s = spent.seconds
        took = s["read"] + max(sum(s[phase] for phase in COMPUTED), s["pack"] / PACKERS) + s["exchange"]
        computed = max(computed + took, saved)
        layers.append(computed + s["write"] - saved)
        saved = computed + s["write"]
    return tuple(layers)


def _busy(seconds: Mapping[str, float], links: Mapping[str, float], artifact: float, rates: Rates) -> dict[str, float]:
    """Seconds that each resource is at work, the busiest first."""
    busy = {
        "GPU": sum(seconds[phase] for phase in COMPUTED),
        "reading": seconds["read"],
        "packing": seconds["pack"] / PACKERS,
        "saving": seconds["write"] + artifact,
        "disk": links["disk"] / rates.disk,
        "gloo": links["gloo"] / rates.gathered,
        "NVLink": links["nvlink"] / rates.nvlink,
        "network": links["network"] / rates.network,
    }
    return dict(sorted(busy.items(), key=lambda item: -item[1]))
