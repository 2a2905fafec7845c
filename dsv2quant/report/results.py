"""An evaluation as text: the numbers, their errors, and what they rest on.

A verification as text.
"""

from __future__ import annotations

import math
from typing import Any

from dsv2quant.report.tables import table


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


_CHECKED = {
    "manifest": "{files} match the manifest, {tensors} tensors are as planned",
    "blocks": "{tensors} weights in {files} are as its metadata says, all scales finite; "
    "no manifest lies beside it, so other bytes are not checked",
    "nothing": "{tensors} tensors in {files} are as config.json says; it has no manifest, so no checksum is checked",
}


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
