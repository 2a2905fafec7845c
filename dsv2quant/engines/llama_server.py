"""A running llama-server, over HTTP: llama.cpp 0c1e57098, tools/server/README.md."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from dsv2quant.engines.answers import Generated, Prompt
from dsv2quant.errors import InputError

PATIENCE = 600  # seconds that an answer may take


@dataclass(frozen=True)
class LlamaServer:
    """The server at `url`, "http://HOST:PORT". Raises InputError for what it refuses, and where it is gone."""

    url: str

    def is_ready(self) -> bool:
        """Whether it answers, and its model is loaded."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=PATIENCE) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, http.client.HTTPException):
            return False  # HTTPError is one of these: 503 while it loads

    def complete(self, prompt: Prompt, max_new_tokens: int) -> Generated:
        """Continue a prompt greedily.

        Messages go through the model's chat template. The server tokenizes, as it does for its users: BOS comes first
        where the file says so, and control tokens that are spelled out become themselves.
        """
        text = prompt.get("text")
        if text is None:
            text = self._post("apply-template", {"messages": prompt["messages"]})["prompt"]
        ids = self._post("tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        request = {"prompt": text, "n_predict": max_new_tokens, "temperature": 0, "return_tokens": True,
                   "cache_prompt": False}  # fmt: skip
        found = self._post("completion", request)
        if found["tokens_evaluated"] != len(ids):
            raise InputError(f"read {found['tokens_evaluated']} tokens of a prompt of {len(ids)}", where=self.url)
        reason = "stop" if found["stop_type"] == "eos" else "length"
        return Generated(ids, found["tokens"], found["content"], reason)

    def _post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(content).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read(1000).decode(errors="replace")
            raise InputError(f"refuses /{path}: {said}", where=self.url, fix="is it llama-server?") from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise InputError(f"gives no answer to /{path}: {error}", where=self.url, fix="see its log") from None
        return found
