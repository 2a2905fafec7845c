"""What was measured, as text: an evaluation and a verification; of calibration, errors against plain rounding by role,
and how many tokens each expert saw, also as JSON and as a figure."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean, median, pstdev
from typing import Any

from dsv2quant.calib.calibration import Outcome, Prepared
from dsv2quant.errors import listing
from dsv2quant.planning.plan import Plan
from dsv2quant.report.tables import table

_CHECKED = {
    "manifest": "{files} match the manifest, {tensors} tensors are as planned",
    "blocks": "{tensors} weights in {files} are as its metadata says, all scales finite; "
    "no manifest lies beside it, so other bytes are not checked",
    "nothing": "{tensors} tensors in {files} are as config.json says; it has no manifest, so no checksum is checked",
}
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.gate_proj")


def evaluation_text(r: dict[str, Any]) -> str:
    """What `dsv2quant eval-ppl` prints without --json."""
    lines = [f"{r['model']}: perplexity {_pm(r['perplexity'], 4)}"]
    if "reference" in r:
        ratio, error = r["delta"]["ln_ratio"], r["delta"]["stderr"]
        kld, floor = r["kld"], r["noise_floor"]
        lines += [
            f"reference {r['reference']['model']}: perplexity {_pm(r['reference']['perplexity'], 4)}",
            f"ln perplexity ratio  {ratio:+.5f} ± {error:.5f}  ({100 * math.expm1(ratio):+.3f}%)",
            f"KLD, nats            {kld['mean']:.5f} ± {kld['stderr']:.5f}  "
            f"median {kld['median']:.5f}, 99% {kld['p99']:.4f}, 99.9% {kld['p999']:.4f}, max {kld['max']:.3f}",
            f"same top-1           {100 * r['top1_agreement']:.2f}% ± {100 * r['top1_agreement_stderr']:.2f}",
        ]
        if r["router_agreement"] is not None:
            worst = min(r["router_agreement_by_layer"].items(), key=lambda item: item[1])
            lines.append(
                f"same routed experts  {100 * r['router_agreement']:.2f}% ± {100 * r['router_agreement_stderr']:.2f}  "
                f"lowest in layer {worst[0]}: {100 * worst[1]:.2f}%"
            )
        klds = {key.removeprefix("kld_").replace("_", " "): value for key, value in floor.items() if key != "windows"}
        others = ", ".join(f"{change} {value:.1e}" for change, value in klds.items())
        lines.append(f"noise floor, KLD     of the reference against itself, {floor['windows']} windows: {others}")
    activations = "unquantized" if r["weight_only"] else "as served"
    path = f", token by token with a KV cache in {r['kv_cache']}" if r["decode_path"] else ""
    lines.append(
        f"{r['tokens']:,} tokens in {r['windows']} windows of {r['ctx']} of {r['text']['source']} "
        f"(sha256 {r['text']['sha256'][:12]}), {r['protocol']} protocol, {r['dtype']} on {r['device']}, "
        f"activations {activations}{path}, {r['seconds']:.1f} s"
    )
    return "\n".join(lines)


def _pm(value: dict[str, float], digits: int) -> str:
    return f"{value['value']:.{digits}f} ± {value['stderr']:.{digits}f}"


def verification_text(r: dict[str, Any]) -> str:
    """What `dsv2quant verify` prints without --json."""
    files = f"{len(r['files'])} file{'s' * (len(r['files']) != 1)}"
    lines = [f"{r['model']}: {_CHECKED[r['checked']].format(files=files, tensors=r['tensors'])}"]
    if r["edited"]:
        lines.append(f"edited since (texts may be): {', '.join(r['edited'])}")
    if r["added"]:
        lines.append(f"not in the manifest, and loaded by no program: {', '.join(r['added'])}")
    if "roles" not in r:
        return "\n".join(lines)
    rows = [
        [x["role"], x["scheme"], x["tensors"], _db(x["sqnr_db"]), _db(x["lowest_sqnr_db"]), f"{x['max_error']:.3g}"]
        for x in r["roles"]
    ]
    lines.append(table(["role", "scheme", "tensors", "SQNR dB", "lowest dB", "max error"], rows))
    lines.append("worst tensors:")
    lines += [
        f"  {x['tensor']} ({x['scheme']}): {_db(x['sqnr_db'])} dB, max error {x['max_error']:.3g}" for x in r["worst"]
    ]
    return "\n".join(lines)


def _db(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.2f}"


def tokens_by_layer(counts: Mapping[str, int]) -> dict[int, list[int]]:
    """Tokens of each expert, by layer, from counts by module."""
    found: dict[int, dict[int, int]] = defaultdict(dict)
    for module, count in counts.items():
        if match := _EXPERT.fullmatch(module):
            found[int(match[1])][int(match[2])] = count
    return {layer: [experts[e] for e in sorted(experts)] for layer, experts in sorted(found.items())}


def coverage_json(tokens: Mapping[int, list[int]], full_rank: int) -> list[dict[str, Any]]:
    """Per layer: fewest, median and most tokens of an expert, their coefficient of variation, how many experts saw
    fewer than `full_rank`, which their Hessian needs, and which saw none."""
    return [
        {
            "layer": layer,
            "fewest": min(counts),
            "median": int(median(counts)),
            "most": max(counts),
            "variation": pstdev(counts) / (fmean(counts) or 1.0),
            "starved": sum(count < full_rank for count in counts),
            "unseen": [expert for expert, count in enumerate(counts) if not count],
        }
        for layer, counts in tokens.items()
    ]


def coverage_text(tokens: Mapping[int, list[int]], full_rank: int) -> str:
    """The same for people: a row per layer."""
    rows = [
        [
            str(row["layer"]),
            *(f"{row[key]:,}" for key in ("fewest", "median", "most")),
            f"{row['variation']:.2f}",
            f"{row['starved']} of {len(tokens[row['layer']])}",
            listing([str(expert) for expert in row["unseen"]], 8) or "none",
        ]
        for row in coverage_json(tokens, full_rank)
    ]
    head = ["layer", "fewest tokens", "median", "most", "variation", f"below {full_rank:,}", "unseen experts"]
    return table(head, rows)


def draw(tokens: Mapping[int, list[int]], full_rank: int, path: str) -> None:
    """A figure, layer × expert, of tokens on a logarithmic scale; experts that saw none are red."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    counts = np.array(list(tokens.values()))  # [layers, experts]
    seen = np.ma.masked_equal(counts, 0)
    figure = Figure(figsize=(min(16.0, 3 + 0.12 * counts.shape[1]), min(12.0, 2 + 0.2 * counts.shape[0])))
    axes = figure.add_subplot()
    axes.set_facecolor("red")
    drawn = axes.imshow(seen, aspect="auto", interpolation="nearest", norm=LogNorm(1, max(2, counts.max())))
    axes.set_yticks(range(len(tokens)), [str(layer) for layer in tokens])
    axes.set(xlabel="expert", ylabel="layer", title=f"calibration tokens per expert (full rank: {full_rank:,})")
    figure.colorbar(drawn, ax=axes)
    figure.savefig(path, bbox_inches="tight")


def expert_tokens(prepared: Prepared) -> dict[int, list[int]]:
    """Tokens of each routed expert, by layer: those that its matrices were fitted on, or that were measured."""
    experts = [outcome for outcome in prepared.outcomes if outcome.role.startswith("routed.")]
    fitted = {f"{outcome.module.rpartition('.')[0]}.gate_proj": outcome.tokens for outcome in experts}
    return tokens_by_layer(fitted or (prepared.statistics.counts if prepared.statistics is not None else {}))


def calibration_json(plan: Plan, outcomes: Sequence[Outcome], tokens: Mapping[int, list[int]]) -> dict[str, Any] | None:
    """Errors by layer and role, experts by tokens, and where plain rounding was kept; None without calibration."""
    if not outcomes and not tokens:
        return None
    layer_of = {line.spec.module: line.spec.layer for line in plan.entries}
    groups: dict[tuple[int | None, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[layer_of[outcome.module], outcome.role].append(outcome)
    return {
        "errors": [
            {"layer": layer, "role": role, "matrices": len(found), **_errors(found)}
            for (layer, role), found in groups.items()
        ],
        "experts": coverage_json(tokens, plan.checkpoint.config.hidden_size),
        "kept_rtn": [outcome.module for outcome in outcomes if outcome.kept_rtn],
    }


def calibration_text(plan: Plan, outcomes: Sequence[Outcome], tokens: Mapping[int, list[int]]) -> str:
    """The same for people: a row per role, and a row per layer of experts."""
    by_role: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_role[outcome.role].append(outcome)
    rows = []
    for role, found in by_role.items():
        errors = _errors(found)
        kept = sum(outcome.kept_rtn for outcome in found)
        ratio = errors["error"] / errors["rtn_error"] if errors["rtn_error"] else 1.0
        rows.append(
            [role, str(len(found)), f"{errors['error']:.2e}", f"{errors['rtn_error']:.2e}", f"{ratio:.2f}", str(kept)]
        )
    parts = []
    if rows:
        parts.append(table(["role", "matrices", "output error", "of rounding", "ratio", "rounding kept"], rows))
    if tokens:
        parts.append(coverage_text(tokens, plan.checkpoint.config.hidden_size))
    kept_names = [outcome.module for outcome in outcomes if outcome.kept_rtn]
    if kept_names:
        parts.append(f"plain rounding was better on windows held out, and is kept, in {listing(kept_names)}")
    return "\n".join(parts)


def _errors(found: Sequence[Outcome]) -> dict[str, float]:
    """Mean relative output errors."""
    return {
        "error": sum(o.error for o in found) / len(found),
        "rtn_error": sum(o.rtn_error for o in found) / len(found),
    }
