"""What running an engine on an artifact found: as dataclasses, as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dsv2quant.engines.answers import Report
from dsv2quant.engines.compare import Apart
from dsv2quant.engines.generation import Continued
from dsv2quant.errors import GateError, listing
from dsv2quant.evaluation.results import (
    VERIFY_SCHEMA,
    Distance,
    Estimate,
    Verification,
    verification_json,
    verification_text,
)
from dsv2quant.report.measured import EngineRun
from dsv2quant.report.tables import values_of

BEYOND = 2  # times the noise floor is what may lie between engine and runtime,
ERRORS = 3  # and standard errors of what is measured
LEAST = 1e-6  # nats: where both compute in float32 the floor is rounding alone, and codes near a tie flip beyond it


@dataclass(frozen=True)
class Floor:
    """How far the engine is from the runtime on the unquantized `source`; and where not other tokens were decoded, what
    the artifact cost, by the runtime its distance from the source, and how much more in the engine (mean KLD, nats)."""

    source: str
    apart: Apart
    cost: Distance | None = None
    extra: Estimate | None = None

    @property
    def most_extra(self) -> float:
        """What the extra cost may be: what the engine's noise is on the source, beside its own error."""
        return BEYOND * max(self.apart.distance.kld.mean, LEAST) + ERRORS * (self.extra.stderr if self.extra else 0.0)


@dataclass(frozen=True)
class Verdict:
    """An engine beside the runtime on one artifact: `apart`, in `tokens` of `windows` of `ctx`, or `decoded` behind
    each. `own_noise` is the mean KLD in nats of the runtime in `own_dtype` from itself in float32. `likeliest`
    is k where the engine gave the k likeliest tokens alone, `storage_error` what a file of distributions rounded, in
    nats. `artifact_faults` are about the artifact's tokenizer and cache scales, those of `continued` about what was
    generated."""

    model: str
    engine: str
    report: Report
    apart: Apart
    own_noise: float
    own_dtype: str
    floor: Floor | None
    max_kld: float | None
    continued: list[Continued]
    artifact_faults: list[str]
    windows: int
    ctx: int
    decoded: int
    tokens: int
    likeliest: int | None
    storage_error: float
    text: str
    text_sha256: str
    dtype: str
    kv_cache: str
    tp: int
    device: str
    torch: str
    seconds: float

    @property
    def limit(self) -> float:
        """The mean KLD, in nats, that may lie between engine and runtime."""
        if self.max_kld is not None:
            return self.max_kld
        source = self.floor.apart.distance.kld.mean if self.floor else 0.0
        return BEYOND * max(source, self.own_noise, LEAST) + ERRORS * self.apart.kld_error + self.storage_error

    @property
    def faults(self) -> list[str]:
        """What is wrong, a line each."""
        kld = self.apart.distance.kld.mean
        found = [] if kld <= self.limit else [f"mean KLD from the runtime is {kld:.3g} nats, beyond {self.limit:.3g}"]
        if self.floor is not None and self.floor.extra is not None and self.floor.extra.value > self.floor.most_extra:
            more, most = self.floor.extra.value, self.floor.most_extra
            found.append(f"it is {more:.3g} nats further from the source than the runtime is, beyond {most:.3g}")
        found += self.artifact_faults
        return found + [f"of {_shown(c)} it {fault}" for c in self.continued for fault in c.faults]

    def check(self) -> None:
        """Raise GateError where anything is wrong."""
        if self.faults:
            raise GateError(f"{self.model} in {self.engine}: {listing(self.faults)}")


def _shown(c: Continued) -> str:
    prompt = c.prompt.get("text")
    return repr(prompt[:24]) if isinstance(prompt, str) else "the chat"


def engine_run(v: Verdict) -> EngineRun:
    """What cards and reports tell of a verdict."""
    d = v.apart.distance
    return EngineRun(
        v.engine, dict(v.report.versions), v.report.device, v.tp, Estimate(d.kld.mean, v.apart.kld_error), v.limit,
        d.top1_agreement, tuple(v.faults),
    )  # fmt: skip


Found = tuple[Verification | None, Verdict | None]


def report_json(found: Found) -> dict[str, Any]:
    """The object of `dsv2quant verify --json`: of a checkpoint that isn't ours, what an engine made of it alone."""
    verification, verdict = found
    result = {"schema": VERIFY_SCHEMA} if verification is None else verification_json(verification)
    return result | ({} if verdict is None else {"model": verdict.model, "engine": verdict_json(verdict)})


def report_text(found: Found) -> str:
    """What `dsv2quant verify` prints without --json."""
    verification, verdict = found
    lines = [] if verification is None else [verification_text(verification)]
    return "\n".join([*lines, *([] if verdict is None else _lines(verdict))])


def verdict_json(v: Verdict) -> dict[str, Any]:
    """What `dsv2quant verify --engine --json` has under `engine`."""
    as_they_are = (
        "engine", "own_noise", "own_dtype", "limit", "max_kld", "artifact_faults", "windows", "ctx", "decoded",
        "tokens", "likeliest", "storage_error", "dtype", "kv_cache", "tp", "device", "seconds", "faults",
    )  # fmt: skip
    floor = None
    if v.floor is not None:
        cost = v.floor.cost
        floor = {"source": v.floor.source, **_apart_json(v.floor.apart)}
        floor["cost"] = None if cost is None else {"kld": asdict(cost.kld), "ln_ratio": asdict(cost.ln_ratio)}
        floor["extra_cost"] = None if v.floor.extra is None else asdict(v.floor.extra)
    return {
        **values_of(v, *as_they_are), "report": asdict(v.report),
        **_apart_json(v.apart), "floor": floor,
        "generated": [asdict(c) | {"prompt": dict(c.prompt)} for c in v.continued],
        "text": {"source": v.text, "sha256": v.text_sha256}, "versions": {"torch": v.torch, **v.report.versions},
    }  # fmt: skip


def _apart_json(a: Apart) -> dict[str, Any]:
    d = a.distance
    return {
        "perplexity": asdict(a.engine), "runtime_perplexity": asdict(a.runtime), "ln_ratio": asdict(d.ln_ratio),
        "kld": asdict(d.kld), "top1_agreement": asdict(d.top1_agreement), "p999_difference": a.p999,
        "kld_error": a.kld_error,
    }  # fmt: skip


def _lines(v: Verdict) -> Iterator[str]:
    r = v.report
    versions = ", ".join(f"{name} {version}" for name, version in r.versions.items())
    yield f"{v.model} in {v.engine} ({versions}; {r.device})"
    if r.attention:
        yield f"attention  {r.attention}, KV cache {r.kv_cache or v.kv_cache}"
    if r.kernels:
        yield f"kernels    {', '.join(f'{name} × {count}' for name, count in r.kernels.items())}"
    if r.settings:
        yield f"set        {', '.join(f'{name}={value}' for name, value in r.settings.items())}"
    yield from _apart_lines(v.apart)
    noise = f"the runtime in {v.own_dtype} from itself in float32 {v.own_noise:.2e}"
    if v.floor is not None:
        kld = v.floor.apart.distance.kld
        noise = f"{v.engine} on {v.floor.source} {kld.mean:.2e} ± {kld.stderr:.1e}; {noise}"
        if v.floor.cost is not None and v.floor.extra is not None:
            cost, more = v.floor.cost.kld, v.floor.extra
            yield (
                f"cost, KLD  {cost.mean:.5f} ± {cost.stderr:.5f} from {v.floor.source}, in {v.engine} "
                f"{more.value:+.5f} ± {more.stderr:.5f}"
            )
    yield f"noise floor, KLD  {noise}"
    for c in v.continued:
        yield f"{_shown(c)} → {c.text[:60]!r} ({c.tokens} tokens, {c.finish_reason}, {c.regret:.3f} nats short at most)"
    scored = f"{v.decoded} tokens decoded behind each" if v.decoded else f"{v.tokens:,} tokens"
    whole = "whole distributions" if v.likeliest is None else f"the {v.likeliest} likeliest tokens and the rest as one"
    yield (
        f"{scored} in {v.windows} windows of {v.ctx} of {v.text} (sha256 {v.text_sha256[:12]}), {whole}; "
        f"the runtime in float32 on {v.device}; {v.seconds:.1f} s"
    )
    yield f"verdict: {'as the runtime computes it' if not v.faults else '; '.join(v.faults)} (limit {v.limit:.2e})"


def _apart_lines(a: Apart) -> Iterator[str]:
    d, top = a.distance, a.distance.top1_agreement
    ratio = f"{d.ln_ratio.value:+.6f} ± {d.ln_ratio.stderr:.6f}"
    yield f"perplexity {_pm(a.engine)}, the runtime's {_pm(a.runtime)}, ln ratio {ratio}"
    yield f"KLD, nats  {d.kld.mean:.3e} ± {d.kld.stderr:.1e}  99% {d.kld.p99:.2e}, max {d.kld.max:.2e}"
    yield f"same top-1 {100 * top.value:.2f}% ± {100 * top.stderr:.2f}"


def _pm(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} ± {estimate.stderr:.4f}"
