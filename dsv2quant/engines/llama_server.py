"""A running llama-server: llama.cpp 0c1e57098, tools/server/README.md."""

from __future__ import annotations

from dataclasses import dataclass

from dsv2quant.engines.answers import Generated, Prompt
from dsv2quant.engines.http import Server
from dsv2quant.errors import InputError


@dataclass(frozen=True)
class LlamaServer:
    """Raises InputError for what it refuses, for an answer in another form, and where it is gone."""

    server: Server

    def is_ready(self) -> bool:
        """Whether it answers, and its model is loaded: it refuses before."""
        try:
            self.server.get("/health")
        except InputError:
            return False
        return True

    def complete(self, prompt: Prompt, max_new_tokens: int, vocabulary: int) -> Generated:
        """Continue a prompt greedily.

        Messages go through the model's chat template. The server tokenizes, as it does for its users: BOS comes first
        where the file says so, and control tokens that are spelled out become themselves.
        """
        text = prompt.get("text")
        if text is None:
            text = self.server.post("/apply-template", {"messages": prompt["messages"]})["prompt"].text()
        asked = {"content": text, "add_special": True, "parse_special": True}
        ids = self.server.post("/tokenize", asked)["tokens"].tokens(vocabulary)
        request = {"prompt": text, "n_predict": max_new_tokens, "temperature": 0, "return_tokens": True,
                   "cache_prompt": False}  # fmt: skip
        found = self.server.post("/completion", request)
        if (read := found["tokens_evaluated"].value) != len(ids):
            raise InputError(f"read {read} tokens of a prompt of {len(ids)}", where=self.server.root)
        reason = "stop" if found["stop_type"].text() == "eos" else "length"
        return Generated(ids, found["tokens"].tokens(vocabulary), found["content"].text(), reason)
