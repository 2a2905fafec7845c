"""A running server as an engine: vLLM's, which speaks OpenAI's protocol with additions, or SGLang's own.

Such a server gives the likeliest tokens of a position, not whole distributions. Windows are sent as tokens; prompts as
the texts and messages that they are. Read in vLLM 0.26 and 0.32 (entrypoints/openai/completion, chat_completion) and
SGLang 0.5.16 (srt/managers/io_struct.py, srt/entrypoints/http_server.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dsv2quant.engines.answers import Answer, Generated, Prompt, Report, Request, Scores
from dsv2quant.engines.http import Answered, Server
from dsv2quant.errors import InputError, listing
from dsv2quant.progress import Progress

MOST = 100  # of the likeliest tokens, where the server allows that many
ALLOWED = re.compile(r"max allowed: (\d+)")  # vLLM's _validate_logprobs; 20 unless it was started with --max-logprobs
Likeliest = list[tuple[float, int]]  # log-probabilities and tokens


@dataclass(frozen=True)
class Scored:
    """Of a window's scored positions: the likeliest tokens, likeliest first, and the true ones' log-probabilities."""

    tops: list[Likeliest]
    targets: list[float]


def ask(engine: str, url: str, request: Request, progress: Progress) -> Answer:
    """Have a server of "vllm" or "sglang" answer. How it computes was chosen where it was started: `dtype`, `kv_cache`,
    `decode` and `tp` don't count. Raises UsageError for an address that is none, and InputError where it can't be
    reached, refuses, serves several models, or answers what was not asked."""
    server, vocabulary = Server(engine, url), request.vocabulary
    asking: Vllm | Sglang = Vllm(server, _model(server)) if engine == "vllm" else Sglang(server)
    report = asking.report()
    windows, likeliest = request.windows, min(MOST, vocabulary)
    scored: list[Scored] = []
    generated = []
    with progress(len(windows.ids) + len(request.prompts), "steps", engine) as advance:
        for ids in windows.ids.tolist():
            found, likeliest = _within_limit(partial(asking.score, ids, request), likeliest)
            scored.append(found)
            advance(1)
        for prompt in request.prompts:
            generated.append(asking.generate(prompt, request.max_new_tokens, vocabulary))
            advance(1)
    return Answer(windows, _scores(scored, request, likeliest), report, generated)


def _model(server: Server) -> str:
    """The name of the one model that is served."""
    served = [card["id"].text() for card in server.get("/v1/models")["data"].items()]
    if len(served) != 1:
        what = f"serves {len(served)} models: {listing(served)}" if served else "serves no model"
        raise InputError(what, where=server.root, fix="start it on the artifact alone")
    return served[0]


def _within_limit(score: Callable[[int], Scored], likeliest: int) -> tuple[Scored, int]:
    """What is scored of so many of the likeliest tokens, or of as many as the server says it allows; and how many."""
    try:
        return score(likeliest), likeliest
    except InputError as refused:
        allowed = ALLOWED.search(str(refused))
        if allowed is None or not 0 < int(allowed[1]) < likeliest:
            raise
        return score(int(allowed[1])), int(allowed[1])


def _scores(scored: list[Scored], request: Request, likeliest: int) -> Scores:
    shape = (len(scored), request.scored)
    both = np.array([each.tops for each in scored], np.float64).reshape(*shape, likeliest, 2)
    targets = np.array([each.targets for each in scored], np.float32).reshape(shape)
    return Scores(both[..., 0].astype(np.float32), both[..., 1].astype(np.int32), targets)


@dataclass(frozen=True)
class Vllm:
    """vLLM's additions: `prompt_logprobs`, of each position the likeliest k tokens and the true one; token ids."""

    server: Server
    model: str

    def report(self) -> Report:
        return Report({"vllm": self.server.get("/version")["version"].text()}, {}, None, None, self.server.root)

    def score(self, ids: list[int], request: Request, likeliest: int) -> Scored:
        asked = {"model": self.model, "prompt": ids, "temperature": 0, "max_tokens": 1, "prompt_logprobs": likeliest}
        choice = self._choice("/v1/completions", asked)
        rows = choice["prompt_logprobs"].items(len(ids))[request.windows.first + 1 :]
        tops, targets = [], []
        for row, true in zip(rows, ids[request.windows.first + 1 :], strict=True):
            found = {_numbered(key, row, request.vocabulary): each["logprob"].logprob() for key, each in row.pairs()}
            if true not in found or len(found) < likeliest:
                raise row.not_a(f"token {true} among {likeliest}")
            tops.append(_most((x, token) for token, x in found.items())[:likeliest])
            targets.append(found[true])
        return Scored(tops, targets)

    def generate(self, prompt: Prompt, limit: int, vocabulary: int) -> Generated:
        asked = {"model": self.model, "max_tokens": limit, "temperature": 0, "return_token_ids": True}
        if "text" in prompt:
            choice = self._choice("/v1/completions", asked | {"prompt": prompt["text"]})
            given, text = choice["prompt_token_ids"], choice["text"].text()
        else:
            answer = self.server.post("/v1/chat/completions", asked | {"messages": prompt["messages"]})
            (choice,) = answer["choices"].items(1)
            content = choice["message"]["content"]
            given, text = answer["prompt_token_ids"], "" if content.value is None else content.text()
        ids = choice["token_ids"].tokens(vocabulary)
        return Generated(given.tokens(vocabulary), ids, text, _reason(choice["finish_reason"]))

    def _choice(self, path: str, asked: dict[str, Any]) -> Answered:
        (choice,) = self.server.post(path, asked)["choices"].items(1)
        return choice


@dataclass(frozen=True)
class Sglang:
    """SGLang's /generate. Log-probabilities come as [logprob, token, text], of the first token of a prompt without."""

    server: Server

    def report(self) -> Report:
        info = self.server.get("/server_info")
        names = ("attention_backend", "kv_cache_dtype")
        attention, cache = (info[name].text() if info.has(name) else None for name in names)
        return Report({"sglang": info["version"].text()}, {}, attention, cache, self.server.root)

    def score(self, ids: list[int], request: Request, likeliest: int) -> Scored:
        asked = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 1}, "return_logprob": True,
                 "logprob_start_len": 0, "top_logprobs_num": likeliest}  # fmt: skip
        answer = self.server.post("/generate", asked)
        begin = request.windows.first + 1
        of_true = answer["meta_info"]["input_token_logprobs"].items(len(ids))[begin:]
        of_top = answer["meta_info"]["input_top_logprobs"].items(len(ids))[begin:]
        targets = [_pair(each, request.vocabulary) for each in of_true]
        # It names the last tokens of the vocabulary 0 here: logprob_result_processor.py, _process_input_token_logprobs.
        if any(token not in (true, 0) for (_, token), true in zip(targets, ids[begin:], strict=True)):
            raise answer.not_a("the log-probabilities of the tokens that it was asked for")
        tops = [_most(_pair(each, request.vocabulary) for each in row.items(likeliest)) for row in of_top]
        return Scored(tops, [x for x, _ in targets])

    def generate(self, prompt: Prompt, limit: int, vocabulary: int) -> Generated:
        """The chat template is applied by /tokenize, which takes messages."""
        words = {"prompt": prompt["text"]} if "text" in prompt else {"messages": prompt["messages"]}
        given = self.server.post("/tokenize", words)["tokens"].tokens(vocabulary)
        asked = {"input_ids": given, "sampling_params": {"temperature": 0, "max_new_tokens": limit}}
        answer = self.server.post("/generate", asked)
        ids = answer["output_ids"].tokens(vocabulary)
        return Generated(given, ids, answer["text"].text(), _reason(answer["meta_info"]["finish_reason"]["type"]))


def _most(found: Iterable[tuple[float, int]]) -> Likeliest:
    return sorted(found, reverse=True)


def _pair(entry: Answered, vocabulary: int) -> tuple[float, int]:
    logprob, token, _ = entry.items(3)
    return logprob.logprob(), token.token(vocabulary)


def _numbered(key: str, row: Answered, vocabulary: int) -> int:
    """A token that is the key of an object."""
    if not key.isascii() or not key.isdigit() or int(key) >= vocabulary:
        raise row.not_a(f"tokens below {vocabulary}")
    return int(key)


def _reason(part: Answered) -> str:
    if part.text() not in ("stop", "length"):
        raise part.not_a('"stop" or "length"')
    return part.text()
