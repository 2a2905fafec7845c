"""What accompanies the weights of an artifact: copied files, the manifest, and the model card.

Nothing here depends on when or where the conversion ran, so that the same plan gives the same bytes.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from dsv2quant import __version__
from dsv2quant.checkpoint.checkpoint import Checkpoint
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning.plan import Plan
from dsv2quant.report.plans import serving_notes
from dsv2quant.report.tables import gigabytes, roles_table, summarize
from dsv2quant.storage.files import read_bytes

MAX_CARD_BYTES = 16 << 20


def source_card(checkpoint: Checkpoint) -> bytes | None:
    """The source's own model card, if it has one. Raises InputError by the rules of `read_bytes`."""
    card = checkpoint.file("README.md")
    return None if card is None else read_bytes(card, MAX_CARD_BYTES)


# How activations are quantized, by type.
_SERVED = {
    "FP8": {"token": "per token", "group128": "per 1×128 group", "static": "with calibrated scales"},
    "INT8": {"token-int8": "per token"},
}


def model_card(plan: Plan, command: str) -> str:
    """README.md of the artifact: front matter for the hub, then base model, recipe, command and sizes."""
    base = plan.checkpoint.model
    front: dict[str, Any] = _licence(source_card(plan.checkpoint))
    front |= {"base_model": base, "base_model_relation": "quantized", "quantized_by": "dsv2quant"}
    front["tags"] = ["deepseek_v2", *sorted(plan.schemes)]
    summary = summarize((line.spec, line.scheme, line.weight.nbytes, line.nbytes) for line in plan.entries)
    sizes = roles_table(summary, before=True, markdown=True)
    activations = {a for a in (CODECS[scheme].activation for scheme in plan.schemes) if a}
    quantized = [
        f"to {kind} {' and '.join(how)}"
        for kind, ways in _SERVED.items()
        if (how := [words for activation, words in sorted(ways.items()) if activation in activations])
    ]
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {base.rpartition('/')[2]}, {plan.recipe.name}",
        f"{base}"
        + (f" at revision {plan.checkpoint.revision}" if plan.checkpoint.revision else "")
        + f", quantized with dsv2quant {__version__} for {', '.join(plan.targets)}{plan.parallel}.",
        f"Activations are quantized {' and '.join(quantized)} when it is served."
        if quantized
        else "Activations are not quantized.",
        *(f"{note[0].upper()}{note[1:]}." for note in serving_notes(plan)),
        f"```\n{command}\n```",
        f"{gigabytes(plan.bytes_in)} became {gigabytes(plan.bytes_out)}: "
        f"{8 * plan.bytes_out / plan.parameters:.2f} bits per weight.",
        sizes,
        f"The recipe:\n\n```yaml\n{plan.recipe.text.strip()}\n```",
    ]
    return "\n\n".join(lines) + "\n"


def _licence(card: bytes | None) -> dict[str, Any]:
    """The base model's licence keys from its own card, if it has one that can be read."""
    # With a byte order mark and line ends of any kind, as the hub takes it.
    text = (card or b"").decode("utf-8-sig", "replace")
    parts = re.split("^---[ \t]*\n", text.replace("\r\n", "\n"), maxsplit=2, flags=re.M)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        front = yaml.load(parts[1], yaml.BaseLoader)  # every scalar a text: a language is "no"
    except (yaml.YAMLError, RecursionError):
        return {}
    if not isinstance(front, dict):
        return {}
    wanted = ("license", "license_name", "license_link", "language")
    return {key: front[key] for key in wanted if _is_text(front.get(key))}


def _is_text(value: object) -> bool:
    """Whether this is a text, or a list of them."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
