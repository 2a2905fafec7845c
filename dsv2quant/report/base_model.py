"""What a card says of the model that an artifact was made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dsv2quant.checkpoint.checkpoint import HfCheckpoint
from dsv2quant.errors import printable
from dsv2quant.report.origin import Origin
from dsv2quant.report.prompt import has_template, prompt_format, sampling
from dsv2quant.report.tables import count, folded

_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class CardModel:
    """A base model and its checkpoint: whether it `chats`, by a template, the `prompt` that this makes of messages,
    where it can be shown, and how tokens are drawn."""

    base: Origin
    checkpoint: HfCheckpoint
    chats: bool
    prompt: str | None
    sampling: Mapping[str, float]

    @classmethod
    def of(cls, checkpoint: HfCheckpoint, base: Origin) -> CardModel:
        """Reads the small files that artifacts carry along. Raises InputError by the rules of `read_bytes`."""
        carried = checkpoint.carried_files()
        chats = has_template(carried)
        prompt = prompt_format(checkpoint.folder) if chats else None
        return cls(base, checkpoint, chats, prompt, sampling(checkpoint.folder, carried))

    @property
    def title(self) -> str:
        """Its name without an owner."""
        return self.base.name.rpartition("/")[2]

    @property
    def tags(self) -> list[str]:
        """For the hub."""
        return ["conversational"] * self.chats

    @property
    def said(self) -> str:
        """Its name and revision, with a link where it has an id."""
        link = f"[{self.base.id}]({_HUB}/{self.base.id})" if self.base.id else printable(self.base.name)
        return link + (f" at revision {self.base.revision}" if self.base.revision else "")

    def kind(self, parameters: int) -> list[list[str]]:
        """First rows of a card's table."""
        only = " of its language model" * (self.checkpoint.whole is not None)
        return [["architecture", self.checkpoint.config.architecture], ["parameters", f"{count(parameters)}{only}"]]

    def terms(self) -> list[list[str]]:
        """Last rows of that table."""
        rows = [["context", f"{self.checkpoint.config.max_position_embeddings:,} tokens"]]
        if self.sampling:
            rows.append(["sampling", ", ".join(f"{name} {value:g}" for name, value in self.sampling.items())])
        licence = self.base.carried.get("license_name", self.base.carried.get("license"))
        return rows + ([["licence", licence if isinstance(licence, str) else ", ".join(licence)]] if licence else [])

    def asked(self) -> list[str]:
        """A section about the prompt."""
        if self.prompt is None:
            return []
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", self.prompt))])
        return ["### Prompt", f"The chat template makes of messages:\n\n{fence}\n{self.prompt}\n{fence}"]

    def card(self) -> list[str]:
        """A section that leads to the model's own card, or has what that says where it is on no hub."""
        if self.base.id is not None:
            link = f"[the card of {self.base.id}]({_HUB}/{self.base.id})"
            return ["## Base model", f"What it is for, its limits, licence and citation: {link}."]
        if not self.base.text:
            return []
        return ["## Base model", folded(f"The card of {printable(self.base.name)}", printable(self.base.text))]
