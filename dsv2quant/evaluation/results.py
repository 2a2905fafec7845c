"""What an evaluation and a verification found: as dataclasses, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dsv2quant.errors import GateError, listing
from dsv2quant.report.measured import Estimate, Scores, Stretch
from dsv2quant.report.tables import gigabytes, table, values_of


@dataclass(frozen=True)
class Kld:
    """KL divergence of a model from its reference over tokens, in nats; `stderr` is the mean's."""

    mean: float
    stderr: float
    median: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True)
class Scored:
    """Which weights were measured, and their perplexity: the hub's commit, the digest of an artifact's plan and the
    sha256 of its manifest, which holds that of every file, each None where there is none; and `identity`, of samples
    of each tensor."""

    model: str
    revision: str | None
    digest: str | None
    manifest_sha256: str | None
    identity: str
    perplexity: Estimate


@dataclass(frozen=True)
class NoiseFloor:
    """Mean KLD, in nats, of the reference against itself on its first windows: batched otherwise, and computed in
    another dtype."""

    windows: int
    kld_other_batch: float
    dtype: str
    kld_other_dtype: float


@dataclass(frozen=True)
class Distance:
    """How far a model is from another. `ln_ratio` is the natural logarithm of the ratio of perplexities; agreements are
    shares, of tokens whose likeliest next one is the same and of routed experts, None without any. `by_position` cuts
    windows into stretches: whether the distance grows with the context."""

    ln_ratio: Estimate
    kld: Kld
    top1_agreement: Estimate
    router_agreement: Estimate | None
    router_agreement_by_layer: Mapping[int, float]
    by_position: Sequence[Stretch]


@dataclass(frozen=True)
class Comparison(Distance):
    """How far a model is from its reference, and from where on such numbers mean something."""

    reference: Scored
    noise_floor: NoiseFloor


@dataclass(frozen=True)
class Gate:
    """A limit that was set, and whether what was measured keeps to it: percent that perplexity grew by, or mean KLD in
    nats. A value that is no number doesn't pass."""

    limit: float
    value: float
    passed: bool


@dataclass(frozen=True)
class Saved:
    """A file that was written, and its size in bytes."""

    file: str
    size: int


@dataclass(frozen=True)
class Evaluation:
    """A model's perplexity and, with a reference, its distance from that, with all they rest on: `tokens` in `windows`
    of `ctx`, the text by its hash, and how it was computed. `kv_cache` is what the cache stored on the decode path.
    `saved` is the reference that was kept of the model."""

    scored: Scored
    comparison: Comparison | None
    tokens: int
    windows: int
    ctx: int
    protocol: str
    text: str
    text_sha256: str
    dtype: str
    weight_only: bool
    serving: str | None
    decode_path: bool
    kv_cache: str | None
    device: str
    backend: str
    stream: bool
    torch: str
    seconds: float
    gates: Mapping[str, Gate]
    saved: Saved | None

    @property
    def perplexity(self) -> Estimate:
        return self.scored.perplexity

    def check_gates(self) -> None:
        """Raise GateError at the first gate that failed."""
        for name, gate in self.gates.items():
            if not gate.passed and name == "max_ppl_increase":
                raise GateError(f"perplexity grew by {gate.value:.3f}%, more than --max-ppl-increase {gate.limit:g}%")
            if not gate.passed:
                raise GateError(f"mean KLD is {gate.value:.5f} nats, more than --max-kld {gate.limit:g}")


def scores_of(e: Evaluation) -> Scores:
    """What cards and reports tell of an evaluation with a reference."""
    c = e.comparison
    assert c is not None
    return Scores(
        c.reference.model, e.perplexity, c.reference.perplexity, c.ln_ratio, Estimate(c.kld.mean, c.kld.stderr),
        c.kld.p99, c.top1_agreement, tuple(c.by_position), e.tokens, e.windows, e.ctx, e.protocol, e.text,
        e.text_sha256, e.dtype, e.weight_only,
    )  # fmt: skip


def evaluation_json(e: Evaluation) -> dict[str, Any]:
    """The object of `dsv2quant eval-ppl --json`."""
    result: dict[str, Any] = {"schema": "dsv2quant.eval-ppl/1"} | asdict(e.scored)
    if (c := e.comparison) is not None:
        floor = c.noise_floor
        result |= {
            "reference": asdict(c.reference),
            "delta": {"ln_ratio": c.ln_ratio.value, "stderr": c.ln_ratio.stderr},
            "kld": asdict(c.kld),
            "kld_by_position": [
                {"first": s.first, "last": s.last, "mean": s.kld.value, "stderr": s.kld.stderr} for s in c.by_position
            ],
            "top1_agreement": c.top1_agreement.value,
            "top1_agreement_stderr": c.top1_agreement.stderr,
            "router_agreement": None if c.router_agreement is None else c.router_agreement.value,
            "noise_floor": {
                "windows": floor.windows,
                "kld_other_batch": floor.kld_other_batch,
                f"kld_{floor.dtype}": floor.kld_other_dtype,
            },
        }
        if c.router_agreement is not None:
            result["router_agreement_stderr"] = c.router_agreement.stderr
            result["router_agreement_by_layer"] = {str(k): v for k, v in c.router_agreement_by_layer.items()}
    as_they_are = (
        "tokens", "windows", "ctx", "protocol", "dtype", "weight_only", "serving", "decode_path", "kv_cache", "device",
        "backend", "stream", "seconds",
    )  # fmt: skip
    return result | values_of(e, *as_they_are) | {
        "text": {"source": e.text, "sha256": e.text_sha256},
        "versions": {"torch": e.torch},
        "gates": {name: asdict(gate) for name, gate in e.gates.items()},
        "saved": None if e.saved is None else asdict(e.saved),
    }  # fmt: skip


def evaluation_text(e: Evaluation) -> str:
    """What `dsv2quant eval-ppl` prints without --json."""
    lines = [f"{e.scored.model}: perplexity {_pm(e.perplexity, 4)}"]
    if (c := e.comparison) is not None:
        ratio, kld, floor = c.ln_ratio, c.kld, c.noise_floor
        lines += [
            f"reference {c.reference.model}: perplexity {_pm(c.reference.perplexity, 4)}",
            f"ln perplexity ratio  {ratio.value:+.5f} ± {ratio.stderr:.5f}  ({100 * math.expm1(ratio.value):+.3f}%)",
            f"KLD, nats            {kld.mean:.5f} ± {kld.stderr:.5f}  "
            f"median {kld.median:.5f}, 99% {kld.p99:.4f}, 99.9% {kld.p999:.4f}, max {kld.max:.3f}",
            f"same top-1           {_percent(c.top1_agreement)}",
        ]
        if c.router_agreement is not None:
            layer, lowest = min(c.router_agreement_by_layer.items(), key=lambda item: item[1])
            lines.append(
                f"same routed experts  {_percent(c.router_agreement)}  lowest in layer {layer}: {100 * lowest:.2f}%"
            )
        others = f"other batch {floor.kld_other_batch:.1e}, {floor.dtype} {floor.kld_other_dtype:.1e}"
        lines.append(f"noise floor, KLD     of the reference against itself, {floor.windows} windows: {others}")
    activations = "unquantized" if e.weight_only else f"as {e.serving} has them" if e.serving else "as served"
    path = f", token by token with a KV cache in {e.kv_cache}" if e.decode_path else ""
    lines.append(
        f"{e.tokens:,} tokens in {e.windows} windows of {e.ctx} of {e.text} (sha256 {e.text_sha256[:12]}), "
        f"{e.protocol} protocol, {e.dtype} on {e.device}, activations {activations}{path}, {e.seconds:.1f} s"
    )
    if e.saved is not None:
        a_token = f"{e.saved.size / e.tokens:,.0f} bytes a token"
        lines.append(f"kept as a reference in {e.saved.file}: {gigabytes(e.saved.size)}, {a_token}")
    return "\n".join(lines)


def _pm(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} ± {estimate.stderr:.{digits}f}"


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.2f}% ± {100 * share.stderr:.2f}"


LEAST_SQNR = 3.0  # dB: noise of half the signal; one bit a weight leaves more
MOST_OF_SCALES = 0.4  # of the noise: see evaluation/verify.py
# dB. Rounding to BF16 alone leaves 55, and that may be common to all that share a scale and have few codes.
ROUNDED = 49.0
# Of the signal. Tuning moves a scale by a factor of at most e^0.1 (calib/trained.py), which leaves noise of its own.
TUNED = math.expm1(0.1) ** 2


@dataclass(frozen=True)
class TensorError:
    """Error of one decoded weight against its source: signal and noise are sums of squares. `scale_share` is the share
    of the noise that other scales would take away. `bits` are those of an element as it is stored."""

    name: str
    role: str
    layer: int | None
    scheme: str
    bits: float
    signal: float
    noise: float
    max_error: float
    scale_share: float

    def is_wrong(self, *, tuned: bool) -> bool:
        """Whether no method of quantizing, or of tuning it, leaves such an error: these are other weights, or their
        scales are."""
        beyond = (self.scale_share - MOST_OF_SCALES) * self.noise
        of_scales = beyond > (TUNED * self.signal if tuned else 0.0) and self.sqnr < ROUNDED
        return self.sqnr < LEAST_SQNR or of_scales

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise in dB; infinite where the weight is exact."""
        return sqnr(self.signal, self.noise)


def sqnr(signal: float, noise: float) -> float:
    """10 · log10(signal / noise); infinite without noise."""
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


@dataclass(frozen=True)
class RoleErrors:
    """The errors of all tensors of one role and scheme. SQNR is in dB, and infinite of what is `exact`."""

    role: str
    scheme: str
    tensors: int
    exact: bool
    sqnr_db: float
    lowest_sqnr_db: float
    max_error: float


@dataclass(frozen=True)
class SourceErrors:
    """An artifact's errors against its source, as consumers decode it to `decoded_dtype`: of roles, of every weight, in
    the model's order, of the worst, and of those that can't be right."""

    decoded_dtype: str
    roles: list[RoleErrors]
    weights: list[TensorError]
    worst: list[TensorError]
    wrong: list[TensorError]


@dataclass(frozen=True)
class Checked:
    """What of an artifact was checked: its files by the 'manifest', a GGUF file's 'blocks' or, of a checkpoint that
    isn't ours, 'nothing'. `files` are the manifest's entries, or sizes alone; `edited` are texts that differ from it,
    `added` names of files that it does not list and no consumer loads; `digest` is the plan's."""

    by: Literal["manifest", "blocks", "nothing"]
    files: dict[str, dict[str, Any]]
    digest: str | None = None
    edited: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verification:
    """An artifact of so many `tensors` that is as it must be and, with its source, how far from that."""

    model: str
    checked: Checked
    tensors: int
    errors: SourceErrors | None

    @property
    def wrong(self) -> list[TensorError]:
        """Weights that can't be what the source's were quantized to."""
        return self.errors.wrong if self.errors is not None else []

    def check(self) -> None:
        """Raise GateError where a weight is wrong."""
        if self.wrong:
            names = listing([f"{e.name} ({_db(e.sqnr)} dB)" for e in self.wrong])
            raise GateError(f"{self.model}: other weights than the source's, or wrong scales: {names}")


VERIFY_SCHEMA = "dsv2quant.verify/2"


def verification_json(v: Verification) -> dict[str, Any]:
    """The object of `dsv2quant verify --json`. What is `exact` has infinite SQNR, which JSON shows as null."""
    result: dict[str, Any] = {
        "schema": VERIFY_SCHEMA,
        "model": v.model,
        "checked": v.checked.by,
        **values_of(v.checked, "digest", "files", "edited", "added"),
        "tensors": v.tensors,
    }
    if v.errors is not None:
        result["decoded_dtype"] = v.errors.decoded_dtype
        result["roles"] = [asdict(role) for role in v.errors.roles]
        result["weights"] = [
            {"tensor": e.name, "sqnr_db": e.sqnr} | values_of(e, "role", "layer", "scheme", "bits", "max_error")
            for e in v.errors.weights
        ]
        result["worst"] = [
            {"tensor": e.name, "sqnr_db": e.sqnr} | values_of(e, "scheme", "max_error") for e in v.errors.worst
        ]
        result["wrong"] = [e.name for e in v.errors.wrong]
    return result


_CHECKED = {
    "manifest": "{files} {match} the manifest, {tensors} tensors are as planned",
    "blocks": "{tensors} weights in {files} are as its metadata says, all scales finite; "
    "no manifest lies beside it, so other bytes are not checked",
    "nothing": "{tensors} tensors in {files} are as config.json says; it has no manifest, so no checksum is checked",
}


def verification_text(v: Verification) -> str:
    """What `dsv2quant verify` prints without --json."""
    checked = v.checked
    several = len(checked.files) != 1
    files, match = f"{len(checked.files)} file{'s' * several}", "match" if several else "matches"
    lines = [f"{v.model}: {_CHECKED[checked.by].format(files=files, match=match, tensors=v.tensors)}"]
    if checked.edited:
        lines.append(f"edited since (texts may be): {', '.join(checked.edited)}")
    if checked.added:
        lines.append(f"not in the manifest, and loaded by no program: {', '.join(checked.added)}")
    if v.errors is None:
        return "\n".join(lines)
    rows = [
        [x.role, x.scheme, x.tensors, _db(x.sqnr_db), _db(x.lowest_sqnr_db), f"{x.max_error:.3g}"]
        for x in v.errors.roles
    ]
    lines.append(table(["role", "scheme", "tensors", "SQNR dB", "lowest dB", "max error"], rows))
    lines.append("worst tensors:")
    lines += [f"  {x.name} ({x.scheme}): {_db(x.sqnr)} dB, max error {x.max_error:.3g}" for x in v.errors.worst]
    return "\n".join(lines)


def _db(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.2f}"
