"""What was measured of an artifact, as plain numbers that cards show and reports draw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Stretch:
    """Mean KLD, in nats, of the scored tokens `first` to `last` of every window, counted from 0."""

    first: int
    last: int
    kld: Estimate


@dataclass(frozen=True)
class Scores:
    """An artifact's distance from the `reference` on `tokens` in `windows` of `ctx` of a text, which its hash names.
    `ln_ratio` is ln of the ratio of perplexities, KLD is in nats, `top1` a share. `weight_only` says whether
    activations were left unquantized, whatever the scheme."""

    reference: str
    perplexity: Estimate
    reference_perplexity: Estimate
    ln_ratio: Estimate
    kld: Estimate
    kld_p99: float
    top1: Estimate
    by_position: tuple[Stretch, ...]
    tokens: int
    windows: int
    ctx: int
    protocol: str
    text: str
    text_sha256: str
    dtype: str
    weight_only: bool


@dataclass(frozen=True)
class EngineRun:
    """What an engine made of the artifact beside the runtime: the mean KLD between them in nats, what may lie between
    them, and what is wrong, a line each. `versions` are by name, the engine's own among them."""

    engine: str
    versions: Mapping[str, str]
    device: str
    tp: int
    kld: Estimate
    limit: float
    top1: Estimate
    faults: tuple[str, ...]

    @property
    def version(self) -> str:
        """The engine's own, '' where it says none."""
        return self.versions.get(self.engine, "")


@dataclass(frozen=True)
class Measured:
    """All of an artifact: `scores` are None where it was not scored."""

    scores: Scores | None = None
    engines: tuple[EngineRun, ...] = ()
