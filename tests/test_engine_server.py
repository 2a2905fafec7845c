"""--engine-url: what is made of the answers of vLLM's and SGLang's servers, and what of answers that are none."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from engine_servers import LOGPROBS, VOCABULARY, Json, greedy, reason, serving, sglang, tokens_of, tokens_of_chat, vllm

from dsv2quant.engines import http
from dsv2quant.engines.answers import Answer, Generated, Request
from dsv2quant.engines.server import MOST, ask
from dsv2quant.errors import InputError, UsageError
from dsv2quant.progress import no_progress
from dsv2quant.text.tokenizer import Windows

IDS = np.random.default_rng(1).integers(2, VOCABULARY, (2, 12))
SERVERS: dict[str, Callable[..., Any]] = {"vllm": vllm, "sglang": sglang}
MESSAGES = [{"role": "user", "content": "Why?"}]


def asked(engine: str, url: str, **more: Any) -> Answer:
    return ask(engine, url, Request(Windows(IDS, 3), VOCABULARY, **more), no_progress)


def expected(rows: np.ndarray, targets: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Likeliest tokens and their log-probabilities, [windows, scored, k], and the true tokens', behind tokens."""
    logprobs = LOGPROBS[rows]
    ids = np.argsort(-logprobs, -1)[..., :k]
    true = np.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
    return ids, np.take_along_axis(logprobs, ids, -1), true


def check_scores(answer: Answer, rows: np.ndarray, targets: np.ndarray, k: int) -> None:
    ids, logprobs, true = expected(rows, targets, k)
    scores = answer.scores
    np.testing.assert_array_equal(scores.ids, ids)
    np.testing.assert_allclose(scores.logprobs, logprobs, rtol=1e-6)
    np.testing.assert_allclose(scores.targets, true, rtol=1e-6)
    assert (scores.logprobs.dtype, scores.ids.dtype, scores.targets.dtype) == (np.float32, np.int32, np.float32)


@pytest.mark.parametrize(("engine", "k"), [("vllm", 20), ("sglang", VOCABULARY)])
def test_windows_are_scored(engine: str, k: int) -> None:
    """vLLM's server says how many it allows; the vocabulary ends SGLang's."""
    with serving(SERVERS[engine]) as url:
        answer = asked(engine, url)
    assert answer.windows.ids is IDS
    check_scores(answer, IDS[:, 3:-1], IDS[:, 4:], k)


def test_a_server_that_allows_more_gives_more() -> None:
    with serving(lambda path, body: vllm(path, body, allowed=MOST)) as url:
        assert asked("vllm", f"{url}/v1/").scores.likeliest == VOCABULARY


@pytest.mark.parametrize("engine", SERVERS)
def test_prompts_are_continued(engine: str) -> None:
    with serving(SERVERS[engine]) as url:
        answer = asked(engine, url, prompts=[{"text": "abc"}, {"messages": MESSAGES}], max_new_tokens=6)
    made = []
    for prompt in (tokens_of("abc"), tokens_of_chat(MESSAGES)):
        ids = greedy(prompt, 6)
        made.append(Generated(prompt, ids, "said", reason(ids)))
    assert answer.generated == made


@pytest.mark.parametrize(
    ("engine", "versions", "attention"),
    [("vllm", {"vllm": "0.32.0"}, None), ("sglang", {"sglang": "0.5.16"}, "triton")],
)
def test_a_server_says_its_version(engine: str, versions: dict[str, str], attention: str | None) -> None:
    with serving(SERVERS[engine]) as url:
        report = asked(engine, url).report
    assert (report.versions, report.attention, report.device) == (versions, attention, url)


def changed(engine: str, at: str, *path: str | int, to: Any) -> Callable[[str, Json | None], Any]:
    """A server one member of whose answers at a path is another."""

    def answer(where: str, body: Json | None) -> Any:
        found = SERVERS[engine](where, body)
        if where != at or isinstance(found, tuple):
            return found
        part = found
        for step in path[:-1]:
            part = part[step]
        if to is None:
            del part[path[-1]]
        else:
            part[path[-1]] = to
        return found

    return answer


of_vllm = partial(changed, "vllm", "/v1/completions", "choices")
row = partial(of_vllm, 0, "prompt_logprobs", 5)
of_sglang = partial(changed, "sglang", "/generate")
tops = partial(of_sglang, "meta_info", "input_top_logprobs", 5)
FAULTS = {
    "no choices": ("vllm", of_vllm(to=None), "'choices' belongs"),
    "two choices": ("vllm", of_vllm(to=[{}, {}]), "a list of 1 belongs"),
    "no logprobs": ("vllm", of_vllm(0, "prompt_logprobs", to=None), "'prompt_logprobs' belongs"),
    "few logprobs": ("vllm", of_vllm(0, "prompt_logprobs", to=[None] * 3), "a list of 12 belongs"),
    "null row": ("vllm", row(to=[1]), "[1] where an object belongs"),
    "no target": ("vllm", row(to={"3": {"logprob": -1}}), "among 20 belongs"),
    "target alone": ("vllm", row(to={str(IDS[0, 5]): {"logprob": -1}}), f"token {IDS[0, 5]} among 20 belongs"),
    "token beyond": ("vllm", row(to={"50": {"logprob": -1}}), "tokens below 50"),
    "token of words": ("vllm", row(to={"²": {"logprob": -1}}), "tokens below 50"),
    "positive": ("vllm", row(to={"3": {"logprob": 2}}), "2 where a log-prob"),
    "text for number": ("vllm", row(to={"3": {"logprob": "a"}}), '"a" where'),
    "version of number": ("vllm", changed("vllm", "/version", "version", to=3), "3 where a text belongs"),
    "no model": ("vllm", changed("vllm", "/v1/models", "data", to=[]), "serves no model"),
    "two models": ("vllm", changed("vllm", "/v1/models", "data", to=[{"id": "a"}, {"id": "b"}]), "2 models: a, b"),
    "not found": ("vllm", lambda path, body: (404, {"detail": "Not Found"}), "is not found"),
    "no such model": ("vllm", lambda path, body: (404, {"error": {"message": "no m"}}), "answers 404: no m"),
    "overloaded": ("vllm", lambda path, body: (503, b"busy"), "answers 503: busy"),
    "no JSON": ("vllm", lambda path, body: b"<html>", "answers no JSON"),
    "deep JSON": ("vllm", lambda path, body: b"[" * 100_000, "answers no JSON"),
    "limit of none": ("vllm", lambda path, body: vllm(path, body, allowed=0), "max allowed: 0"),
    "few tokens": ("sglang", tops(to=[[-1, 2, None]]), "a list of 50 belongs"),
    "short pair": ("sglang", tops(to=[[-1, 2]] * 50), "a list of 3 belongs"),
    "other tokens": (
        "sglang", of_sglang("meta_info", "input_token_logprobs", 5, to=[-1, 1, None]),
        "the log-probabilities of the tokens that it was asked for belongs",
    ),
    "NaN": ("sglang", tops(to=[[float("nan"), 2, None]] * 50), "NaN where"),
    "aborted": ("sglang", of_sglang("meta_info", "finish_reason", to={"type": "abort"}), '"abort"'),
    "no ids": ("vllm", of_vllm(0, "token_ids", to=None), "'token_ids' belongs"),
    "true for a token": ("sglang", of_sglang("output_ids", to=[True]), "a token below 50"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_is_none_is_an_error(fault: str) -> None:
    engine, answer, said = FAULTS[fault]
    with serving(answer) as url, pytest.raises(InputError) as raised:
        asked(engine, url, prompts=[{"text": "abc"}])
    assert said in str(raised.value)
    assert str(raised.value).startswith(url)


def test_a_server_that_is_not_there() -> None:
    with serving(vllm) as url:
        pass
    with pytest.raises(InputError, match="can't be reached: Connection refused"):
        asked("vllm", url)


def test_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listening, pytest.raises(InputError, match="no answer in"):
        asked("vllm", f"http://127.0.0.1:{listening.getsockname()[1]}")


def test_an_answer_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_BYTES", 1 << 20)
    with serving(lambda path, body: b" " * (2 << 20)) as url, pytest.raises(InputError, match="more than 1 MiB"):
        asked("vllm", url)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "file:///etc/passwd", "http://", "http://h/?a=1", ""])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UsageError, match="is no server's address"):
        asked("vllm", url)
