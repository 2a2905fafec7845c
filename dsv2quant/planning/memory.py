"""What a model takes of a GPU's memory: weights, cache, logits and activations of a prefill, from headers alone.

`eager` is transformers of November 2023 (eager.py), `flash` this tool's runtime (flash.py). Every figure is that of the
fullest GPU, in bytes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsv2quant.arch.config import ModelConfig
from dsv2quant.arch.spec import TensorSpec
from dsv2quant.errors import UsageError
from dsv2quant.planning.allocator import Memory, OutOfMemory
from dsv2quant.planning.consumers import ENGINES, Parallel, check_parallel
from dsv2quant.planning.eager import Eager
from dsv2quant.planning.flash import Flash
from dsv2quant.planning.prefill import Share

GIB = 1 << 30
# What torch reports as a card's memory, in GiB ("total capacity" in its messages of memory that ran out).
CARDS = {"A100-40GB": 39.39, "A100-80GB": 79.15, "H100": 79.11, "H200": 139.80, "RTX-4090": 23.64}
REPORTED = 0.985  # of the size that a card is sold with: ECC and firmware have the rest (39.39 of 40, 23.64 of 24)
CONTEXT = 420 << 20  # bytes that a process has beside torch's: CUDA's context and code (418 MiB on an A100)
KV_BYTES = {"bf16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1, "float32": 4}  # of one number
LARGEST = {"batch": 65_536, "context": 16_777_216}


@dataclass(frozen=True)
class Workload:
    """What is asked: all pairs of `batches`, numbers of texts, and `contexts`, tokens of each. Matrices are split over
    `tp` GPUs and layers over `pp` times as many."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefill: str = "flash"
    kv_cache: str = "bf16"
    tp: int = 1
    pp: int = 1

    def check(self, config: ModelConfig) -> None:
        """Raise UsageError for what can't be had of such a model."""
        for name, values in (("batch", self.batches), ("context", self.contexts)):
            if odd := [value for value in values if not 0 < value <= LARGEST[name]]:
                raise UsageError(f"--{name} {odd[0]} is out of range", fix=f"it must be 1 to {LARGEST[name]:,}")
        if self.kv_cache not in KV_BYTES:
            raise UsageError(f"--kv-cache {self.kv_cache}", fix=f"it takes {', '.join(KV_BYTES)}")
        if self.prefill == "eager" and self.kv_cache != "bf16":
            raise UsageError(f"--kv-cache {self.kv_cache} goes with --prefill flash: eager caches in BF16")
        if not 0 < self.pp <= config.num_hidden_layers:
            raise UsageError(f"--pp {self.pp}", fix=f"it must be 1 to {config.num_hidden_layers}, the layers")
        check_parallel(config, Parallel(self.tp), ENGINES)


@dataclass(frozen=True)
class Cell:
    """Bytes of the fullest GPU: what is in use at the peak, and `unused`, which torch holds for what is gone. As
    `torch.cuda` counts, `allocated` is `max_memory_allocated` and `total` is `max_memory_reserved`. `fits` is None
    where no card is named."""

    batch: int
    context: int
    weights: int
    cache: int
    logits: int
    activations: int
    allocated: int
    total: int
    fits: bool | None

    @property
    def unused(self) -> int:
        return self.total - self.weights - self.cache - self.logits - self.activations


@dataclass(frozen=True)
class MemoryPlan:
    """A cell for each pair of the workload. `capacity` is what torch can have of the card; `cache_per_token` are bytes
    of a context's token on all GPUs, of one copy."""

    model: str
    workload: Workload
    card: str | None
    capacity: int | None
    cache_per_token: int
    cells: tuple[Cell, ...]


def plan_memory(
    model: str, config: ModelConfig, stored: Iterable[tuple[TensorSpec, int]], workload: Workload, card: str | None
) -> MemoryPlan:
    """The plan of a model whose tensors have so many bytes. Raises UsageError for a workload or card that can't be."""
    workload.check(config)
    capacity = None if card is None else card_capacity(card)
    shares = shares_of(config, list(stored), workload)
    pairs = [(batch, context) for batch in workload.batches for context in workload.contexts]
    cells = tuple(_cell(shares, workload, capacity, *pair) for pair in pairs)
    return MemoryPlan(model, workload, card, capacity, cache_per_token(config, workload), cells)


def card_capacity(card: str) -> int:
    """Bytes that torch can have of a card, by name or size ("40GB"). Raises UsageError for one that is not known."""
    named = {name.upper(): size for name, size in CARDS.items()}.get(card.upper())
    size = re.fullmatch(r"(\d{1,5})GB", card.upper())
    if named is None and size is None:
        raise UsageError(f"--gpu {card} is not known", fix=f"it takes {', '.join(CARDS)}, or a size, as 40GB")
    reported = named if named is not None else REPORTED * int(size[1]) if size else 0.0
    return max(0, int(reported * GIB) - CONTEXT)


def cache_per_token(config: ModelConfig, workload: Workload) -> int:
    """Bytes: eager caches full keys and values, also of latent attention."""
    widths = sum(config.cached_widths)
    if config.is_mla and workload.prefill == "eager":
        widths = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return config.num_hidden_layers * widths * KV_BYTES[workload.kv_cache]


def shares_of(config: ModelConfig, stored: Sequence[tuple[TensorSpec, int]], workload: Workload) -> list[Share]:
    """What each of `pp` GPUs has, those that are alike once; `tp` GPUs each have as much. Layers for multi-token
    prediction are not loaded."""
    tp, layers = workload.tp, config.num_hidden_layers
    units: list[Counter[str]] = [Counter() for _ in range(layers + 2)]  # embedding, layers, final norm and head
    for spec, nbytes in stored:
        if not spec.is_prediction:
            place = 0 if spec.role == "embed" else layers + 1 if spec.layer is None else spec.layer + 1
            # Experts of a layer are one stack.
            name = spec.name if spec.expert is None else f"{spec.layer}.{spec.role}"
            units[place][name] += -(-nbytes // tp) if spec.parallel else nbytes
    sizes = [unit.total() for unit in units]
    split = accelerate_split(sizes, workload.pp) if workload.prefill == "eager" else vllm_split(layers, workload.pp)
    shares: dict[object, Share] = {}
    for i, mine in enumerate(split):
        first, last = i == 0, i == len(split) - 1
        held = [*units[:1] * first, *(units[layer + 1] for layer in mine), *units[-1:] * last]
        if last and not first and config.tie_word_embeddings:
            held.append(units[0])
        weights = tuple(nbytes for unit in held for nbytes in unit.values())
        share = Share(config, mine, first, last, tp, weights)
        shares.setdefault((first, last, weights, tuple(map(config.is_moe, mine))), share)
    return list(shares.values())


def accelerate_split(sizes: Sequence[int], gpus: int) -> list[range]:
    """Layers by GPU, as transformers' device_map="auto" deals them out: `sizes` are bytes of the embedding, each layer,
    and the end (accelerate 0.24 utils/modeling.py, get_balanced_memory and infer_auto_device_map).

    A GPU takes what comes until it has an even share and 1.25 layers; the first leaves room for the largest part that
    is still to come, and the last takes the rest.
    """
    room = sum(sizes) // gpus + int(1.25 * sizes[1])
    layers, used = len(sizes) - 2, sizes[0]
    ends: list[int] = []
    for layer in range(layers):
        left = room - (0 if ends else max(sizes[layer + 2 :]))
        if used + sizes[layer + 1] > left and len(ends) < gpus - 1:
            ends.append(layer)
            used = 0
        used += sizes[layer + 1]
    ends += [layers] * (gpus - len(ends))
    return [range(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def vllm_split(layers: int, gpus: int) -> list[range]:
    """Layers by GPU: even shares, and of those left over one for each GPU from the last but one on, backwards
    (vllm/distributed/utils.py, get_pp_indices)."""
    counts = [layers // gpus] * gpus
    for i in range(2, layers % gpus + 2):
        counts[-i] += 1
    ends = [sum(counts[: i + 1]) for i in range(gpus)]
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _cell(shares: Sequence[Share], workload: Workload, capacity: int | None, batch: int, context: int) -> Cell:
    made, fits = [], True
    for share in shares:
        memory = _run(share, workload, capacity, batch, context)
        if memory is None:
            fits = False
            memory = _run(share, workload, None, batch, context)
        assert memory is not None
        made.append(memory)
    fullest = max(made, key=lambda memory: memory.most_reserved)
    return Cell(
        batch, context, **fullest.peak, allocated=fullest.most_allocated, total=fullest.most_reserved,
        fits=None if capacity is None else fits,
    )  # fmt: skip


def _run(share: Share, workload: Workload, capacity: int | None, batch: int, context: int) -> Memory | None:
    """A GPU's memory behind a prefill; None where it does not fit."""
    memory = Memory(capacity)
    try:
        weights = [memory(nbytes, "weights") for nbytes in share.weights]
        if workload.prefill == "eager":
            Eager(memory, share, batch, context).run()
        else:
            Flash(memory, share, batch, context, KV_BYTES[workload.kv_cache]).run()
    except OutOfMemory:
        return None
    del weights
    return memory
