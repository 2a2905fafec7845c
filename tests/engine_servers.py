"""Servers that answer as vLLM's and SGLang's do, of a model that is a table: the logits behind a token are its row."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from typing import Any

import numpy as np

VOCABULARY, END = 50, 7
TABLE = np.random.default_rng(0).normal(0, 3, (VOCABULARY, VOCABULARY))
LOGPROBS = TABLE - np.log(np.exp(TABLE).sum(1, keepdims=True))  # [token, the next]
Json = dict[str, Any]


def tokens_of(text: str) -> list[int]:
    """Letters are tokens, behind BOS."""
    return [1, *(ord(letter) % VOCABULARY for letter in text)]


def tokens_of_chat(messages: list[Json]) -> list[int]:
    return [1, 2, *tokens_of("".join(m["content"] for m in messages))[1:], 3]


def greedy(prompt: list[int], most: int) -> list[int]:
    found: list[int] = []
    while len(found) < most and found[-1:] != [END]:
        found.append(int(LOGPROBS[[*prompt, *found][-1]].argmax()))
    return found


def reason(ids: list[int]) -> str:
    return "stop" if ids[-1:] == [END] else "length"


def top(token: int, k: int) -> list[int]:
    """The k likeliest tokens behind one."""
    return [int(each) for each in np.argsort(-LOGPROBS[token])[:k]]


def vllm(path: str, body: Json | None, allowed: int = 20) -> Any:
    """vLLM 0.32: entrypoints/openai/completion/serving.py and chat_completion/serving.py."""
    if path in ("/version", "/v1/models"):
        return {"version": "0.32.0"} if path == "/version" else {"object": "list", "data": [{"id": "m", "root": "/m"}]}
    assert body is not None
    assert body["model"] == "m"
    asked = body.get("prompt_logprobs") or 0
    if asked > allowed:
        said = f"Requested prompt logprobs of {asked}, which is greater than max allowed: {allowed}"
        return 400, {"error": {"message": said, "type": "BadRequestError", "param": None, "code": 400}}
    if path == "/v1/chat/completions":
        prompt = tokens_of_chat(body["messages"])
    else:
        prompt = tokens_of(body["prompt"]) if isinstance(body["prompt"], str) else body["prompt"]
    ids = greedy(prompt, body["max_tokens"])
    choice: Json = {"index": 0, "finish_reason": reason(ids), "stop_reason": None, "token_ids": None, "logprobs": None}
    if body.get("return_token_ids"):
        choice["token_ids"] = ids
    if path == "/v1/chat/completions":
        message = {"role": "assistant", "content": "said"}
        return {"choices": [choice | {"message": message}], "prompt_token_ids": prompt, "usage": {}}
    if k := body.get("prompt_logprobs"):
        choice["prompt_logprobs"] = [None, *(_row(a, b, k) for a, b in pairwise(prompt))]
    return {"choices": [choice | {"text": "said", "prompt_token_ids": prompt}], "usage": {}}


def _row(before: int, true: int, k: int) -> Json:
    """The likeliest k and the true token, which comes first."""
    found = dict.fromkeys([true, *top(before, k)])
    ranks = {token: rank for rank, token in enumerate(top(before, VOCABULARY), 1)}
    return {str(t): {"logprob": LOGPROBS[before, t], "rank": ranks[t], "decoded_token": "x"} for t in found}


def sglang(path: str, body: Json | None) -> Any:
    """SGLang 0.5.16: srt/managers/tokenizer_manager.py, srt/entrypoints/http_server.py."""
    if path == "/server_info":
        return {"version": "0.5.16", "attention_backend": "triton", "kv_cache_dtype": "auto", "internal_states": []}
    assert body is not None
    if path == "/tokenize":
        found = tokens_of_chat(body["messages"]) if "messages" in body else tokens_of(body["prompt"])
        return {"tokens": found, "count": len(found), "max_model_len": 512}
    prompt, k = body["input_ids"], body.get("top_logprobs_num")
    ids = greedy(prompt, body["sampling_params"]["max_new_tokens"])
    meta: Json = {"finish_reason": {"type": reason(ids)}, "prompt_tokens": len(prompt)}
    if body.get("return_logprob"):
        pairs = [*pairwise(prompt)][body["logprob_start_len"] :]
        meta["input_token_logprobs"] = [[None, prompt[0], None], *([LOGPROBS[a, b], b, None] for a, b in pairs)]
        meta["input_top_logprobs"] = [None, *([[LOGPROBS[a, t], t, None] for t in top(a, k)] for a, _ in pairs)]
    return {"text": "said", "output_ids": ids, "meta_info": meta}


@contextmanager
def serving(answer: Callable[[str, Json | None], Any]) -> Iterator[str]:
    """The address of a server that answers what a function makes of path and body: an object, bytes, or a status and
    one of these."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(answer(self.path, None))

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._say(answer(self.path, json.loads(self.rfile.read(length))))

        def _say(self, found: Any) -> None:
            status, said = found if isinstance(found, tuple) else (200, found)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(said if isinstance(said, bytes) else json.dumps(said).encode())

        def log_message(self, *args: object) -> None:
            """Nothing is logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
