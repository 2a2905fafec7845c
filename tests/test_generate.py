"""Generating: which token follows, where it ends, and how tokens become text."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny
import torch

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError, UsageError
from dsv2quant.model.completion import Request, Sampling, complete, finish_reason, generate, sample
from dsv2quant.model.load import LoadOptions
from dsv2quant.model.runtime import Model
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.text.tokenizer import Detokenizer, Tokenizer

PROMPT = [0, 700, 800, 900]
GREEDY = Sampling()


@pytest.fixture(scope="module")
def mini():
    return Model(open_checkpoint(tiny.MINI))


def tokens_of(model: Model, prompt=PROMPT, stop=(), count=24, sampling=GREEDY) -> list[int]:
    return list(generate(model, prompt, stop=stop, max_new_tokens=count, sampling=sampling))


# --- tokens ---


def assert_greedy(model: Model, prompt: list[int], tokens: list[int]) -> None:
    """Each token is the likeliest by one expanded pass over the whole text, but for ties: logits of up to 20 that
    differ by 1e-5 of their norm, as in test_runtime."""
    logits = model.forward(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (logits.max(-1).values - chosen).max() < 20 * 1e-5


def test_greedy_tokens_are_the_likeliest_of_prefills_logits(mini, one_thread):
    for prompt in (PROMPT, [0]):
        tokens = tokens_of(mini, prompt)
        assert len(tokens) == 24
        assert len(set(tokens)) > 3
        assert_greedy(mini, prompt, tokens)


@pytest.mark.parametrize("layout", ["fp8-block", "fp8-tensor", "gptq", "awq", None])
def test_greedy_tokens_of_artifacts(layout, wordy, tmp_path, one_thread):
    chosen = recipe.builtin("int4-pure", method="rtn", group_size=32, layout=layout)
    if layout in ("fp8-block", "fp8-tensor"):
        chosen = recipe.builtin(layout)
    convert(make_plan(open_checkpoint(wordy), chosen, for_targets=("vllm",)), tmp_path / "out", command="")
    model = Model(open_checkpoint(tmp_path / "out"), LoadOptions(weight_only=True))
    assert_greedy(model, PROMPT, tokens_of(model))


def test_it_ends_with_a_stop_token_the_limit_or_the_context(mini, wordy, tmp_path):
    all_of_them = tokens_of(mini)
    stop = all_of_them[5]
    end = all_of_them.index(stop) + 1
    assert tokens_of(mini, stop={stop, 4000}) == all_of_them[:end]
    assert finish_reason(all_of_them[:end], {stop, 4000}, 24) == "stop"
    assert finish_reason(all_of_them[:end], {stop}, end) == "stop"
    assert tokens_of(mini, count=3) == all_of_them[:3]
    assert finish_reason(all_of_them[:3], {1}, 3) == "length"
    short = tiny.write_checkpoint(tmp_path / "short", tiny.WORDY | {"max_position_embeddings": 10})
    model = Model(open_checkpoint(short))
    tokens = tokens_of(model)
    assert tokens == tokens_of(Model(open_checkpoint(wordy)))[:6]
    assert finish_reason(tokens, {1}, 24) == "context"
    assert finish_reason(tokens_of(model, count=6), {1}, 6) == "length"
    with pytest.raises(UsageError, match="the prompt has 10 tokens, the context 10"):
        tokens_of(model, [0] * 10)
    assert len(tokens_of(model, [0] * 9)) == 1


def test_a_seed_gives_the_same_tokens(mini, one_thread):
    drawn = [tokens_of(mini, sampling=Sampling(1.0, 0.9, seed)) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert tokens_of(mini, sampling=Sampling(1.0, 1e-9, 3)) == tokens_of(mini)
    # So low that exp(logit / temperature) overflows.
    assert tokens_of(mini, sampling=Sampling(1e-300, 1.0, 3)) == tokens_of(mini)


def test_logits_that_are_not_finite_are_an_error(wordy):
    model = Model(open_checkpoint(wordy))
    model.ends.head.weight[7] = float("nan")
    for sampling in (GREEDY, Sampling(1.0)):
        with pytest.raises(InputError, match="the model's logits are not finite"):
            tokens_of(model, sampling=sampling)


# --- sampling ---


def nucleus(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The distribution that is drawn from: tokens in falling order join until they hold top_p of the probability."""
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    kept = np.zeros_like(p)
    for token in sorted(range(len(p)), key=lambda token: -p[token]):
        if kept.sum() >= top_p:
            break
        kept[token] = p[token]
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.5), (1.0, 0.01)])
def test_tokens_are_drawn_from_the_nucleus(temperature, top_p):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(24, generator=generator)
    want, draws = nucleus(logits.numpy(), temperature, top_p), 5000
    sampling = Sampling(temperature, top_p)
    drawn = np.bincount([sample(logits, sampling, generator) for _ in range(draws)], minlength=24)
    assert not drawn[want == 0].any()
    if (want > 0).sum() == 1:
        return
    seen = want * draws >= 5
    chi2 = (((drawn - want * draws) ** 2)[seen] / (want * draws)[seen]).sum()
    freedom = seen.sum() - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations, at a fixed seed


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_draw_inverts_the_cumulative_distribution(top_p):
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))
    p = nucleus(logits.numpy(), 0.9, top_p)
    order = sorted(range(50), key=lambda token: -p[token])
    generator = torch.Generator().manual_seed(5)
    uniform = [torch.rand(1, generator=generator, dtype=torch.float64).item() for _ in range(200)]
    bounds = np.cumsum(p[order])
    want = [order[int(np.argmax(bounds > u))] for u in uniform]
    generator = torch.Generator().manual_seed(5)
    assert [sample(logits, Sampling(0.9, top_p), generator) for _ in range(200)] == want


def test_tokens_that_are_equally_likely_are_kept_by_id():
    generator = torch.Generator().manual_seed(0)
    drawn = {sample(torch.zeros(10), Sampling(1.0, 0.25), generator) for _ in range(100)}
    assert drawn == {0, 1, 2}  # the third reaches 0.25


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ((-0.1, 1.0), "temperature -0.1 is out of range"),
        ((math.nan, 1.0), "temperature nan"),
        ((math.inf, 1.0), "temperature inf"),
        ((1.0, 0.0), "top-p 0 is out of range"),
        ((1.0, 1.01), "top-p 1.01"),
        ((1.0, math.nan), "top-p nan"),
    ],
)
def test_sampling_out_of_range(values, what):
    with pytest.raises(UsageError, match=what):
        Sampling(*values)


# --- text ---

TEXTS = {
    "emoji": "a 👩‍👧 and 🇫🇷🎉!",
    "cjk": "漢字かな交じり文。한국어",
    "accents": "naïve Ωmega е́",
    "replacement": "was \ufffd\ufffd before",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pieces_are_whole_characters(text):
    tokenizer = Tokenizer.open(tiny.MINI)
    detokenizer, ids = Detokenizer(tokenizer), tokenizer.encode(text).tolist()
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) + detokenizer.end() == text
    if "\ufffd" not in text:
        assert detokenizer.end() == ""
        assert "\ufffd" not in "".join(pieces)
        assert "" in pieces  # a character of several tokens
        # Each piece comes with the very token that completes it.
        for i in range(1, len(ids) + 1):
            assert tokenizer.decode(ids[:i]).rstrip("\ufffd") == "".join(pieces[:i])


def test_special_tokens_are_skipped_and_bytes_of_no_character_come_last():
    tokenizer = Tokenizer.open(tiny.MINI)
    half = tokenizer.encode("漢").tolist()[:1]
    ids = [0, *tokenizer.encode("Hi").tolist(), 1, *half, *tokenizer.encode(" there").tolist(), *half]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) == "Hi\ufffd there"
    assert detokenizer.end() == "\ufffd"
    assert "".join(pieces) + detokenizer.end() == tokenizer.decode(ids)


def requested(prompt: str = "It was a dark night, and", chat: bool = False, count: int = 20) -> Request:
    return Request([{"role": "user", "content": prompt}] if chat else prompt, count, GREEDY, LoadOptions())


def test_the_prompt_begins_with_bos_and_the_text_is_the_tokens(wordy):
    emitted: list[str] = []
    checkpoint, tokenizer = open_checkpoint(tiny.MINI), Tokenizer.open(tiny.MINI)
    result = complete(checkpoint, requested(), emitted.append)
    assert result.prompt_tokens == [0, *tokenizer.encode("It was a dark night, and").tolist()]
    assert result.tokens == tokens_of(Model(checkpoint), result.prompt_tokens, {1}, 20)
    assert "".join(emitted) == result.text == tokenizer.decode(result.tokens)
    assert len([piece for piece in emitted if piece]) > 5
    assert complete(checkpoint, requested("", count=1)).prompt_tokens == [0]
    # A special token that a prompt spells out is text.
    assert 1 not in complete(checkpoint, requested("<｜end▁of▁sentence｜>", count=1)).prompt_tokens


def test_a_chats_prompt_is_transformers(wordy):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny.MINI)
    messages = [{"role": "user", "content": "What is 漢字?"}]
    want = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    result = complete(open_checkpoint(wordy), requested("What is 漢字?", chat=True, count=2))
    assert result.prompt_tokens == want


def test_the_text_ends_before_the_stop_token(tmp_path, wordy):
    tokens = complete(open_checkpoint(wordy), requested()).tokens
    folder = tiny.write_checkpoint(tmp_path / "m", tiny.WORDY)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4001, tokens[4]]}))
    result = complete(open_checkpoint(folder), requested())
    end = tokens.index(tokens[4]) + 1
    assert (result.tokens, result.finish_reason) == (tokens[:end], "stop")
    assert result.text == Tokenizer.open(folder).decode(tokens[: end - 1])


@pytest.mark.parametrize(
    ("generation", "tokenizer", "config", "want"),
    [
        ({"eos_token_id": 5}, "<｜end▁of▁sentence｜>", 7, {5}),
        ({"eos_token_id": [5, 6]}, "<｜end▁of▁sentence｜>", 7, {5, 6}),
        ({}, "<｜end▁of▁sentence｜>", 7, {1}),
        (None, {"content": "<｜end▁of▁sentence｜>"}, 7, {1}),
        (None, None, 7, {7}),
        (None, "not a token", [7, 8], {7, 8}),
        (None, None, None, set()),
    ],
)
def test_stop_tokens_are_the_first_that_a_file_names(generation, tokenizer, config, want, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "m", tiny.WORDY | {"eos_token_id": config})
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.stop_ids(checkpoint.tokenizer()) == want
