"""Seconds and bytes of quantizing one layer with calibration, of the rank that has most to do.

It counts what layerwise.py, routed.py, choosing.py and gptq.py do, from the layer's entries: products by their FLOP,
elementwise work by its bytes, the loop over columns by its blocks. Every expert is taken to get as many tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from dsv2quant.arch.config import ModelConfig
from dsv2quant.calib.calibration import MOMENT_BYTES, ROWS, TURNS, expert_bytes
from dsv2quant.calib.gptq import BLOCK
from dsv2quant.calib.layer import HELD, SIDES
from dsv2quant.calib.rates import Rates
from dsv2quant.calib.routed import SAMPLE
from dsv2quant.formats.schemes import CODECS, UNQUANTIZED
from dsv2quant.planning.plan import Entry
from dsv2quant.planning.recipe import CALIBRATED

PHASES = ("read", "encode", "forward", "moments", "factor", "quantize", "exchange", "pack", "write")
FLOAT = 4  # bytes
MOMENTS = 2 * len(SIDES)  # matrices: H and S, of all tokens and of those held out
PRODUCTS = 11  # of a matrix and a square one in `choose`: 3 fit it, 8 tell its errors
TOUCHED = 40  # times that `choose` reads or writes a weight in float32
# How often numbers are read or written, elementwise: chosen so that V2-Lite's layers on an H200 come out.
PASSES = 4  # times that a number before or behind a product is read or written
SERVED = 12  # the same of an input that is quantized as when served
STATES = 12  # times that a part reads or writes a hidden state: its norm, and adding what it made
EXPERT_CALLS = 16  # operations that one expert takes for some tokens
CODE_BYTES = 3  # bytes of a weight that is encoded without calibration: it is read again, and its codes go both ways


@dataclass(frozen=True)
class Share:
    """What a rank has of `tokens`, in windows of `ctx`; of `ranks`, `local` are on its node. `room` are the bytes that
    suspended stages may take; `spilled` streams lie in the host's memory: the ideal one, the real one, and then what
    experts add."""

    tokens: int
    ctx: int
    ranks: int
    local: int
    room: int
    spilled: int

    @property
    def own(self) -> int:
        """Tokens of this rank."""
        return ceil(self.tokens / self.ranks)


@dataclass
class Spent:
    """Seconds by phase, and bytes by link: what the rank sends over "nvlink" and "network", what the first one gets
    over "gloo", what its node's "disk" reads and writes."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    links: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(frozen=True)
class Costs:
    """Of the layers of one model, on one share."""

    config: ModelConfig
    rates: Rates
    share: Share

    def layer(self, entries: Sequence[Entry]) -> Spent:
        """A layer's, of its entries; what comes out of the last is not computed."""
        spent, c = Spent(), self.config
        self._host(spent, entries)
        kinds = {"attention": _of(entries, lambda role: "." not in role), "dense": _of(entries, _starts("dense."))}
        routed, shared = _of(entries, _starts("routed.")), _of(entries, _starts("shared."))
        asked = entries[0].spec.layer != c.num_hidden_layers - 1
        self._part(spent, kinds["attention"], self._attention())
        self._part(spent, kinds["dense"], 0.0, asked=asked)
        if routed:
            experts = [e for e in routed if e.spec.expert == routed[0].spec.expert]
            wanted = any(e.method in CALIBRATED for e in (*routed, *shared))
            if wanted:  # the moments of all tokens, which every rank gets
                self._moments(spent, self.share.own, c.hidden_size)
                self._sent(spent, 2 * MOMENTS * FLOAT * c.hidden_size**2)
            self._routed(spent, experts, asked=asked)
            self._part(spent, shared, 0.0, known=wanted, asked=asked)
        if self.share.spilled:
            self._spilled(spent, routed=bool(routed))
        return spent

    def _host(self, spent: Spent, entries: Sequence[Entry]) -> None:
        """Reading, which every rank does; encoding what needs no calibration, as well; packing, which each does of its
        own; saving, which the first does of all."""
        r, ranks = self.rates, self.share.ranks
        stored = sum(e.weight.nbytes for e in entries)
        made = [e for e in entries if e.method in CALIBRATED]
        encoded = [e for e in entries if e.method not in CALIBRATED and e.scheme not in UNQUANTIZED and not e.is_copy]
        plain = sum(e.spec.size for e in encoded)
        written = sum(e.nbytes for e in made)
        spent.seconds["read"] += stored / min(r.loaded, r.disk)
        spent.seconds["encode"] += CODE_BYTES * plain / r.copied
        spent.seconds["pack"] += sum(e.spec.size for e in made) / r.packed / ranks
        spent.links["gloo"] += written * (ranks - 1) / ranks
        spent.seconds["exchange"] += spent.links["gloo"] / r.gathered
        spent.seconds["write"] += written / r.saved
        spent.links["disk"] += stored + written

    def _attention(self) -> float:
        """Seconds of scores and values of a token: half of the pairs in a window, of heads as wide as their keys."""
        c = self.config
        return c.num_attention_heads * self.share.ctx * 2 * c.qk_head_dim / self.rates.attention

    def _forward(self, entries: Sequence[Entry], *, real: bool) -> float:
        """Seconds of some linears on one token."""
        r = self.rates
        touched = 0.0
        for e in entries:
            rows, columns = e.spec.shape
            served = real and CODECS[e.scheme].activation is not None and e.method not in CALIBRATED
            touched += FLOAT * (PASSES * (rows + columns) + served * SERVED * columns)
        return sum(2 * e.spec.size for e in entries) / r.product + touched / r.memory

    def _part(
        self, spent: Spent, entries: Sequence[Entry], last: float, *, known: bool = False, asked: bool = True
    ) -> None:
        """`_through`: linears by the stage that they share; `last` are seconds a token before the last one. Tokens
        without room begin anew with every stage that is measured, and the ideal model's go through the last at once.
        Where nobody asked for the output, nothing is computed behind the input of what is measured last."""
        own, c = self.share.own, self.config
        stages = list(_by_site(entries).values())
        if not stages:
            return
        anew = 1 - min(1.0, self.share.room / (len(SIDES) * self._token_bytes() * own))
        measured = [i for i, stage in enumerate(stages) if any(e.method in CALIBRATED for e in stage)]
        if asked:
            whole = sum(self._forward(entries, real=real) + last for real in (True, False))
            spent.seconds["forward"] += whole * own + FLOAT * STATES * c.hidden_size * own / self.rates.memory
        elif measured:
            whole = sum(self._before(stages[: measured[-1]], real=real) for real in (True, False))
            spent.seconds["forward"] += (1 - anew) * whole * own
        for i in measured:
            columns = stages[i][0].spec.shape[1]
            if i or not known:
                beside = i + 1 in measured and self._goes_beside(stages[i + 1])
                ends = i + 1 == len(stages)
                models = (True,) if ends and asked else (True, False)
                before = sum(self._before(stages[:i], real=real) + ends * last for real in models)
                spent.seconds["forward"] += 0 if beside else before * anew * own
                self._moments(spent, own, columns)
                self._sent(spent, MOMENTS * FLOAT * columns**2)  # a subtree from each rank to the owner
            wanted = [e for e in stages[i] if e.method in CALIBRATED]
            self._choose(spent, wanted, 1)
            self._sent(spent, FLOAT * sum(e.spec.size for e in wanted))

    def _goes_beside(self, stage: Sequence[Entry]) -> bool:
        """Whether a stage is measured along with the one before it: `Stage.beside`."""
        return stage[0].spec.role == "kv_b_proj" and self.config.q_lora_rank is not None

    def _before(self, stages: Sequence[Sequence[Entry]], *, real: bool) -> float:
        """Seconds a token of what is computed before the stage behind these: latent attention makes queries behind the
        latents' stage."""
        entries = [e for stage in stages for e in stage]
        behind = not self.config.is_mla or any(e.spec.role == "kv_b_proj" for e in entries)
        late = () if behind else ("q_proj", "q_b_proj")
        return self._forward([e for e in entries if e.spec.role not in late], real=real)

    def _token_bytes(self) -> int:
        """`Job.token_bytes`."""
        c = self.config
        attention = c.num_attention_heads * c.v_head_dim + (c.q_lora_rank or 0) + sum(c.cached_widths)
        return FLOAT * (2 * c.hidden_size + max(attention, c.intermediate_size))

    def _routed(self, spent: Spent, expert: Sequence[Entry], *, asked: bool) -> None:
        """`quantize_experts`, of experts like this one: its owner's, of all ranks' tokens."""
        c, r, share = self.config, self.rates, self.share
        *gate_up, down = expert
        wanted = [e for e in gate_up if e.method in CALIBRATED]
        down_wanted = down.method in CALIBRATED
        pairs = share.tokens * c.num_experts_per_tok / c.n_routed_experts  # tokens of an expert
        sample = min(share.tokens, SAMPLE * c.moe_intermediate_size)
        together = self._together(pairs)
        turns = ceil(ceil(c.n_routed_experts / together) / share.ranks)
        own = turns * together
        first, second = self._forward(gate_up, real=False), self._forward([down], real=False)
        sides = len(SIDES)
        calls = EXPERT_CALLS * sides * own * r.launch
        # Both models up to down, and the real one through it where what it makes is asked for.
        seconds = pairs * own * ((sides if down_wanted else asked) * first + asked * second)
        if wanted:
            self._moments(spent, pairs * own, c.hidden_size)
            self._choose(spent, wanted, together, turns)
        if down_wanted:
            seconds += sides * sample * own * first
            self._moments(spent, (pairs + sample) * own, c.moe_intermediate_size)
            self._choose(spent, [down], together, turns)
        spent.seconds["forward"] += max(seconds, calls)
        # The ideal model's experts once more, batch by batch, on this rank's own tokens.
        routed = share.own * c.num_experts_per_tok
        batches = ceil(share.own / ROWS)
        calls = EXPERT_CALLS * batches * c.n_routed_experts * r.launch
        spent.seconds["forward"] += asked * max(routed * (first + second), calls)
        # Inputs of both models and outputs are gathered, sent and added.
        moved = (sides + asked) * FLOAT * c.hidden_size * routed
        spent.seconds["forward"] += 4 * moved / r.memory
        self._exchanged(spent, moved)

    def _together(self, pairs: float) -> int:
        """`_groups`: experts that are calibrated together."""
        c = self.config
        most = max(1, min(MOMENT_BYTES // expert_bytes(c), c.n_routed_experts // TURNS))
        room = MOMENT_BYTES // (len(SIDES) * FLOAT * (c.hidden_size + 2 * c.moe_intermediate_size))
        return max(1, min(most, int(room // max(1.0, pairs))))

    def _moments(self, spent: Spent, tokens: float, columns: int) -> None:
        """H and S of so many inputs, and of those held out among them."""
        flop = len(SIDES) * 2 * columns**2 * tokens * (1 + 1 / HELD)
        spent.seconds["moments"] += flop / self.rates.product + FLOAT * 8 * columns * tokens / self.rates.memory

    def _choose(self, spent: Spent, linears: Sequence[Entry], batch: int, turns: int = 1) -> None:
        """`choose` of `batch` inputs, each of these linears, so many times."""
        r, columns = self.rates, linears[0].spec.shape[1]
        cube = batch * columns**3
        spent.seconds["factor"] += turns * (cube / 3 / r.cholesky + cube / r.inverse + r.column * columns)
        for e in linears:
            rows = batch * e.spec.shape[0]
            weights = rows * columns
            seconds = PRODUCTS * 2 * weights * columns / r.product + FLOAT * TOUCHED * weights / r.memory
            seconds += weights / r.copied  # its codes, to the host
            if CODECS[e.scheme].integers is not None:
                seconds += 2 * weights / r.searched + ceil(columns / BLOCK) * r.block + weights / r.rounded
                # Behind each block what is left of the weights is read and written.
                seconds += FLOAT * weights * columns / BLOCK / r.memory
            spent.seconds["quantize"] += turns * seconds

    def _sent(self, spent: Spent, nbytes: float) -> None:
        """From every other rank to one, or from one to all, over the slowest link on the way."""
        others, near = self.share.ranks - 1, self.share.local - 1
        self._over(spent, nbytes * near, nbytes * (others - near))

    def _exchanged(self, spent: Spent, nbytes: float) -> None:
        """What a rank sends, to each alike."""
        each, near = nbytes / self.share.ranks, self.share.local - 1
        self._over(spent, each * near, each * (self.share.ranks - 1 - near))

    def _over(self, spent: Spent, nvlink: float, network: float) -> None:
        spent.links["nvlink"] += nvlink
        spent.links["network"] += network
        spent.seconds["exchange"] += nvlink / self.rates.nvlink + network / self.rates.network

    def _spilled(self, spent: Spent, *, routed: bool) -> None:
        """Streams in the host's memory: attention and FFN read each one and add to it. Where the device has no room for
        both normalised states either, experts' inputs are gathered from there. What experts make may be added up
        there."""
        c, r, share = self.config, self.rates, self.share
        state = FLOAT * c.hidden_size * share.own
        streams, choices = min(share.spilled, len(SIDES)), c.num_experts_per_tok
        spent.seconds["forward"] += 2 * 3 * streams * state / r.pinned
        if routed:
            gathered = streams * choices if len(SIDES) * state > share.room else 0
            spent.seconds["forward"] += gathered * state / r.gathered_rows
            if share.spilled > len(SIDES):
                spent.seconds["forward"] += choices * state / r.added + state / r.pinned


def added_up(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sums of what has the same name."""
    sums: defaultdict[str, float] = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            sums[name] += value
    return dict(sums)


def _of(entries: Sequence[Entry], wanted: Callable[[str], bool]) -> list[Entry]:
    return [e for e in entries if not e.spec.keep and wanted(e.spec.role)]


def _starts(prefix: str) -> Callable[[str], bool]:
    return lambda role: role.startswith(prefix)


def _by_site(entries: Sequence[Entry]) -> dict[str | None, list[Entry]]:
    """Linears by the input that they share."""
    found: dict[str | None, list[Entry]] = {}
    for e in entries:
        found.setdefault(e.spec.site, []).append(e)
    return found
