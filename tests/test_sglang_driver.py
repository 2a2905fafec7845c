"""SGLang's driver, on an engine that makes its logits as SGLang does: one call for a prompt, one for each token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
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


class Engine:
    """`wrong` is added to what it says."""

    def __init__(self, wrong: float = 0.0) -> None:
        self.wrong, self.processor = wrong, SimpleNamespace(_get_logits=lambda tokens: TABLE[tokens])

    def generate(self, *, input_ids: list[int], sampling_params: dict[str, Any], **asked: Any) -> dict[str, Any]:
        start = asked.get("logprob_start_len")
        rows = self.processor._get_logits(torch.tensor(input_ids if start == 0 else input_ids[-1:]))
        of_prompt = self._said(rows[:-1], input_ids[1:]) if start == 0 else []
        said = {"input_token_logprobs": [(None, input_ids[0], None), *of_prompt]}
        made = [int(rows[-1, :VOCABULARY].argmax())]
        given = self._said(rows[-1:], made)
        while len(made) < sampling_params["max_new_tokens"]:
            rows = self.processor._get_logits(torch.tensor(made[-1:]))
            made.append(int(rows[-1, :VOCABULARY].argmax()))
            given += self._said(rows, made[-1:])
        return {"output_ids": made, "meta_info": said | {"output_token_logprobs": given}}

    def _said(self, rows: torch.Tensor, tokens: list[int]) -> list[tuple[float, int, None]]:
        found = rows[:, :VOCABULARY].log_softmax(-1)[torch.arange(len(tokens)), tokens] + self.wrong
        return [(float(x), token, None) for x, token in zip(found, tokens, strict=True)]


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DRIVERS)
        import sglang_driver

        yield sglang_driver


def ran(driver: Any, folder: Path, decode: int, wrong: float = 0.0) -> Any:
    """The exchange after all windows went through an engine."""
    request = {
        "model": "", "dtype": "float32", "tp": 1, "kv_cache": "auto", "first": FIRST, "decode": decode,
        "vocab_size": VOCABULARY, "prompts": [], "max_new_tokens": 4,
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request))
    np.save(folder / "windows.npy", WINDOWS)
    exchange, engine = driver.Exchange(folder), Engine(wrong)
    driver.keep_logits(exchange, engine.processor)
    exchange.each_window(partial(driver.score, exchange, engine), partial(driver.decode, exchange, engine))
    return exchange


def expected(tokens: np.ndarray) -> np.ndarray:
    return TABLE[torch.from_numpy(tokens), :VOCABULARY].log_softmax(-1).numpy()


def test_whole_distributions_of_scored_positions(driver, tmp_path):
    ran(driver, tmp_path, 0)
    kept = np.load(tmp_path / "logprobs.npy")
    assert kept.shape == (2, CTX - 1 - FIRST, VOCABULARY)
    np.testing.assert_array_equal(kept, expected(WINDOWS[:, FIRST:-1]))
    assert (tmp_path / "progress").read_bytes() == b".."


def test_tokens_that_are_decoded_and_what_they_were_chosen_from(driver, tmp_path):
    ran(driver, tmp_path, 3)
    decoded = np.load(tmp_path / "decoded.npy")
    before = np.concatenate([WINDOWS[:, -1:], decoded[:, :-1]], 1)
    np.testing.assert_array_equal(np.load(tmp_path / "logprobs.npy"), expected(before))
    assert (decoded == expected(before).argmax(-1)).all()


@pytest.mark.parametrize("decode", [0, 3])
def test_logits_that_it_does_not_answer_from_are_an_error(decode, driver, tmp_path):
    with pytest.raises(ValueError, match=r"0\.01 nats from those of the logits"):
        ran(driver, tmp_path, decode, wrong=0.01)
