"""vLLM's driver, on an engine that makes its logits in the order in which vLLM's two model runners do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dsv2quant.engines.process import DRIVERS

VOCABULARY, PADDED, CTX, FIRST = 50, 64, 9, 2
TABLE = torch.randn(PADDED, PADDED, generator=torch.Generator().manual_seed(0))  # the logits behind a token
WINDOWS = np.random.default_rng(0).integers(2, VOCABULARY, (2, CTX))


class Model:
    def compute_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return TABLE[tokens, :VOCABULARY]


class Engine:
    """Like vLLM's `LLM`, over two workers that compute alike. V1 makes logits of a prompt but for its last token at
    once; V2 of all of it, in chunks; both of the token to sample first. `wrong` is added to what it says."""

    def __init__(self, runner: str, wrong: float = 0.0) -> None:
        self.runner, self.wrong = runner, wrong
        self.workers = [SimpleNamespace(rank=rank, model=Model()) for rank in range(2)]
        for worker in self.workers:
            worker.get_model = lambda worker=worker: worker.model

    def collective_rpc(self, function: Callable[[Any], Any]) -> list[Any]:
        return [function(worker) for worker in self.workers]

    def generate(self, prompts: list[Any], sampling: Any, use_tqdm: bool) -> list[Any]:
        (prompt,), made, said = (each["prompt_token_ids"] for each in prompts), [], []
        for _ in range(sampling.max_tokens):
            rows = self._computed(torch.tensor([*prompt, *made])[-1:])
            made.append(int(rows.argmax()))
            said.append(self._said(rows, made[-1:])[0])
        of_prompt = None
        if hasattr(sampling, "prompt_logprobs"):
            tokens = torch.tensor(prompt)
            for chunk in (tokens[:-1],) if self.runner == "V1" else tokens.split(3):
                self._computed(chunk)
            of_prompt = [None, *self._said(Model().compute_logits(torch.tensor(prompt[:-1])), prompt[1:])]
        return [SimpleNamespace(
            prompt_logprobs=of_prompt, outputs=[SimpleNamespace(token_ids=made, logprobs=said)],
        )]  # fmt: skip

    def _computed(self, tokens: torch.Tensor) -> torch.Tensor:
        rows, *_ = (worker.model.compute_logits(tokens) for worker in self.workers)
        return rows

    def _said(self, rows: torch.Tensor, tokens: list[int]) -> list[dict[int, Any]]:
        found = rows.log_softmax(-1)[torch.arange(len(tokens)), tokens] + self.wrong
        return [{token: SimpleNamespace(logprob=float(x))} for token, x in zip(tokens, found, strict=True)]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    """The driver's functions: it imports exchange.py from its folder, and vLLM when it needs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DRIVERS)
        patch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace, TokensPrompt=dict))
        import vllm_driver

        yield vllm_driver


@pytest.fixture
def exchange(driver, tmp_path):
    """Make a folder with a request."""

    def make(decode: int = 0) -> Any:
        asked = {"model": "m", "prompts": [], "decode": decode, "first": FIRST, "vocab_size": VOCABULARY}
        (tmp_path / "request.json").write_text(json.dumps(asked | {"max_new_tokens": 32}))
        np.save(tmp_path / "windows.npy", WINDOWS)
        return driver.Exchange(tmp_path)

    return make


def expected(tokens: np.ndarray) -> torch.Tensor:
    return TABLE[torch.from_numpy(tokens), :VOCABULARY].log_softmax(-1)


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_windows_are_scored(runner: str, driver, exchange, tmp_path) -> None:
    engine, given = Engine(runner), exchange()
    engine.collective_rpc(driver.keep_logits)
    for window, ids in enumerate(WINDOWS.tolist()):
        driver.score(given, engine, window, ids)
    found = np.load(tmp_path / "logprobs.npy")
    np.testing.assert_allclose(found, expected(WINDOWS[:, FIRST:-1]), atol=1e-6)


def test_tokens_are_decoded(driver, exchange, tmp_path) -> None:
    engine, given = Engine("V1"), exchange(decode=4)
    engine.collective_rpc(driver.keep_logits)
    tokens = np.array([driver.decode(given, engine, window, ids) for window, ids in enumerate(WINDOWS.tolist())])
    before = np.concatenate([WINDOWS[:, -1:], tokens[:, :-1]], 1)
    np.testing.assert_array_equal(tokens, expected(before).argmax(-1))
    np.testing.assert_allclose(np.load(tmp_path / "logprobs.npy"), expected(before), atol=1e-6)


@pytest.mark.parametrize("decode", [0, 4])
def test_logits_that_vllm_does_not_answer_from_are_an_error(decode: int, driver, exchange) -> None:
    engine, given = Engine("V1", wrong=0.01), exchange(decode)
    engine.collective_rpc(driver.keep_logits)
    with pytest.raises(ValueError, match=r"0\.01 nats from those of the logits"):
        (driver.decode if decode else driver.score)(given, engine, 0, WINDOWS[0].tolist())


def test_the_first_worker_alone_keeps_logits(driver) -> None:
    engine = Engine("V1")
    engine.collective_rpc(driver.keep_logits)
    driver.answered(engine, [1, 2, 3], max_tokens=1)
    for worker in engine.workers:
        worker.model.compute_logits(torch.tensor([1]))
    assert [len(kept) for kept in engine.collective_rpc(driver.take_logits)] == [1, 0]


@pytest.mark.parametrize(
    ("config", "disabled"),
    [
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, False),
        ({"kv_lora_rank": 128, "qk_rope_head_dim": 16}, True),
        ({"language_config": {"kv_lora_rank": 128, "qk_rope_head_dim": 64}}, True),
        ({"kv_lora_rank": None}, False),
        ({}, False),
    ],
)
def test_mla_is_disabled_for_latents_it_has_no_kernel_for(
    config: dict[str, Any], disabled: bool, driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {"VLLM_USE_DEEP_GEMM": "1"})  # as the user has it
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = driver.environment(str(tmp_path))
    assert settings == {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_USE_DEEP_GEMM": "1"} | (
        {"VLLM_MLA_DISABLE": "1"} if disabled else {}
    )
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
