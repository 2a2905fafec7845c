"""What a release asks of an artifact, held against what was measured."""

from __future__ import annotations

from collections.abc import Iterator

from dsv2quant.publishing.wanted import Gates
from dsv2quant.report.measured import Measured
from dsv2quant.report.tasks import recovery


def failed(measured: Measured, gates: Gates) -> Iterator[str]:
    """What is wrong with an artifact, a line each."""
    scores, recovered = measured.scores, recovery(measured.tasks)
    if scores is not None:
        growth = 100 * (scores.perplexity.value / scores.reference_perplexity.value - 1)
        # A number that is none keeps to nothing.
        if gates.max_kld is not None and not scores.kld.value <= gates.max_kld:
            yield f"mean KLD is {scores.kld.value:.5f} nats, more than {gates.max_kld:g}"
        if gates.max_ppl_increase is not None and not growth <= gates.max_ppl_increase:
            yield f"perplexity grew by {growth:.3f}%, more than {gates.max_ppl_increase:g}%"
        if gates.min_top1 is not None and not scores.top1.value >= gates.min_top1:
            yield f"the likeliest token is the same for {scores.top1.value:.2%}, less than {gates.min_top1:.2%}"
    if gates.min_recovery is not None:
        if recovered is None:
            yield "no task has a score that a mean can be of"
        elif not recovered >= gates.min_recovery:
            yield f"the mean over tasks is {recovered:.2f}% of the model's, less than {gates.min_recovery:g}%"
    for engine in measured.engines:
        yield from (f"in {engine.engine}: {fault}" for fault in engine.faults)
