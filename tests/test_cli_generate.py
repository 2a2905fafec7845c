"""`dsv2quant generate`: what it prints where, GGUF files, and bad input."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from gguf_files import CONFIG, stacked, write_gguf

from dsv2quant.arch.deepseek_v2 import SEQUENCE_CLASSIFICATION

PROMPT = ("--prompt", "It was a dark night, and", "--max-new-tokens", "12")


def test_stdout_has_the_text_and_stderr_the_speed(cli):
    ran = cli("generate", tiny.MINI, *PROMPT)
    result = json.loads(cli("generate", tiny.MINI, *PROMPT, "--json", "-q").out)
    assert ran.code == 0
    assert ran.out == result["text"] + "\n"
    speed = (
        r"8 prompt tokens \([\d.]+ per second\), 12 tokens \([\d.]+ per second\), ended by length, [\d.]+ s in all\n"
    )
    assert re.fullmatch(speed, ran.err)
    assert cli("generate", tiny.MINI, *PROMPT, "-q") == (0, ran.out, "")


def test_json_is_one_object(cli):
    ran = cli("generate", tiny.MINI, *PROMPT, "--json", "--temperature", "0.8", "--top-p", "0.9", "--seed", "7")
    assert ran.out.count("\n") == 1
    assert ran.err.count("\n") == 1
    result = json.loads(ran.out)
    assert set(result) == {
        "schema", "model", "prompt_tokens", "tokens", "text", "finish_reason", "temperature", "top_p", "seed", "dtype",
        "kv_cache", "device", "backend", "versions", "prefill_tokens_per_s", "decode_tokens_per_s", "seconds",
    }  # fmt: skip
    assert (result["schema"], result["model"]) == ("dsv2quant.generate/1", "dsv2-mini")
    assert (result["temperature"], result["top_p"], result["seed"]) == (0.8, 0.9, 7)
    assert [result[key] for key in ("dtype", "kv_cache", "device", "backend")] == ["float32", "float32", "cpu", "torch"]
    assert (len(result["prompt_tokens"]), len(result["tokens"]), result["finish_reason"]) == (8, 12, "length")
    one = json.loads(cli("generate", tiny.MINI, *PROMPT[:-1], "1", "--json", "-q", "--dtype", "bfloat16").out)
    assert (one["decode_tokens_per_s"], one["dtype"], one["kv_cache"]) == (None, "bfloat16", "bf16")


def test_the_text_comes_in_pieces(cli, monkeypatch):
    written: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *args, end="\n", **_: written.append("".join(args) + end))
    cli("generate", tiny.MINI, *PROMPT, "-q")
    assert written[-1] == "\n"
    assert len([piece for piece in written if piece]) == 13  # twelve tokens, each of whole characters
    assert not any("\n" in piece for piece in written[:-1])


def test_a_prompt_from_a_file_or_stdin(cli, tmp_path, monkeypatch):
    want = cli("generate", tiny.MINI, *PROMPT, "-q").out
    (tmp_path / "prompt.txt").write_text(PROMPT[1])
    assert cli("generate", tiny.MINI, "--prompt", f"@{tmp_path / 'prompt.txt'}", *PROMPT[2:], "-q").out == want
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(PROMPT[1].encode())))
    assert cli("generate", tiny.MINI, "--prompt", "-", *PROMPT[2:], "-q").out == want
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff")))
    ran = cli("generate", tiny.MINI, "--prompt", "-", "-q")
    assert (ran.code, ran.err.startswith("error: stdin: can't be read")) == (3, True)


def test_the_contexts_end_is_told(cli, tmp_path):
    folder = tiny.write_checkpoint(tmp_path / "m", tiny.WORDY | {"max_position_embeddings": 12})
    ran = cli("generate", folder, "--prompt", "It was a dark night, and")
    assert ran.code == 0
    assert "8 prompt tokens (" in ran.err
    assert ", 4 tokens (" in ran.err
    assert "ended by context" in ran.err
    assert ran.err.endswith("\nwarning: the model's context of 12 tokens is full\n")
    assert cli("generate", folder, "--prompt", "It was a dark night, and", "-q").err == ""


@pytest.mark.parametrize("kind", ["float32", "bf16", "fp8_e4m3", "fp8_e5m2"])
def test_the_cache_is_what_was_asked_for(kind, cli):
    result = json.loads(cli("generate", tiny.MINI, *PROMPT, "--kv-cache", kind, "--json", "-q").out)
    assert result["kv_cache"] == kind
    assert len(result["tokens"]) == 12


# --- GGUF ---

TEMPLATE = "{{ bos_token }}{% for m in messages %}User: {{ m['content'] }}{{ eos_token }}{% endfor %}Assistant:"


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """A checkpoint and its GGUF file in float32, with a chat template, and EOS and end of turn of the file's own."""
    folder = tmp_path_factory.mktemp("gguf")
    weights = tiny.random_weights(CONFIG)
    source = tiny.write_checkpoint(folder / "source", CONFIG, weights)

    def change(writer) -> None:
        writer.add_chat_template(TEMPLATE)
        writer.add_eot_token_id(2)

    write_gguf(folder / "m.gguf", CONFIG, stacked(CONFIG, weights), lambda name: "F32", change=change)
    return source, folder / "m.gguf"


def test_a_gguf_file_gives_its_checkpoints_tokens(twins, cli):
    source, file = (json.loads(cli("generate", path, *PROMPT, "--json", "-q").out) for path in twins)
    assert file["prompt_tokens"] == source["prompt_tokens"]
    assert (file["tokens"], file["text"]) == (source["tokens"], source["text"])
    assert file["model"] == "m.gguf"


def test_a_gguf_files_template_and_stop_tokens(twins, cli):
    from dsv2quant.checkpoint.open import open_checkpoint
    from dsv2quant.text.tokenizer import Tokenizer

    ran = cli("generate", twins[1], "--chat", "--prompt", "Who?", "--max-new-tokens", "2", "--json", "-q")
    assert ran.code == 0, ran.err
    encode = Tokenizer.open(tiny.MINI).encode
    want = [0, *encode("User: Who?").tolist(), 1, *encode("Assistant:").tolist()]
    assert json.loads(ran.out)["prompt_tokens"] == want
    checkpoint = open_checkpoint(twins[1])
    assert checkpoint.stop_ids(checkpoint.tokenizer()) == {1, 2}


def test_a_gguf_file_without_a_template_or_bos(twins, cli, tmp_path):
    def no_bos(writer) -> None:
        writer.kv_data[0]["tokenizer.ggml.add_bos_token"].value = False

    arrays = stacked(CONFIG, tiny.random_weights(CONFIG))
    write_gguf(tmp_path / "m.gguf", CONFIG, arrays, lambda name: "F32", change=no_bos)
    ran = cli("generate", tmp_path / "m.gguf", "--chat", *PROMPT)
    assert (ran.code, ran.out) == (3, "")
    assert ran.err == "error: m.gguf: no chat template (give plain text, or use a checkpoint that has one)\n"
    assert json.loads(cli("generate", tmp_path / "m.gguf", *PROMPT, "--json", "-q").out)["prompt_tokens"][0] != 0
    ran = cli("generate", tmp_path / "m.gguf", "--prompt", "")
    assert (ran.code, "the prompt is empty" in ran.err) == (2, True)


FIM = "<｜fim▁begin｜>def f():<｜fim▁hole｜><｜fim▁end｜>"


def test_special_tokens_of_a_prompt_are_text_unless_asked_for(twins, cli):
    for path in twins:
        plain, special = (
            json.loads(cli("generate", path, "--prompt", FIM, *PROMPT[2:], *option, "--json", "-q").out)[
                "prompt_tokens"
            ]
            for option in ((), ("--special",))
        )
        assert [number for number in plain if number < 8] == [0]
        assert [number for number in special if number < 8] == [0, 3, 2, 4]
        again = cli("generate", path, "--prompt", "<｜begin▁of▁sentence｜>a", *PROMPT[2:], "--special", "--json", "-q")
        assert json.loads(again.out)["prompt_tokens"].count(0) == 1  # not a second one before it
    ran = cli("generate", twins[0], *PROMPT, "--special", "--chat")
    assert (ran.code, "--special goes with a plain prompt" in ran.err) == (2, True)


def test_a_folder_that_does_not_say_whether_bos_is_added(cli, wordy, tmp_path, caplog):
    """As transformers 5 saves DeepSeek's tokenizers."""
    folder = shutil.copytree(wordy, tmp_path / "m")
    for name, key in (("tokenizer_config.json", "add_bos_token"), ("tokenizer.json", "post_processor")):
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(raw | {key: None}))
    ran = cli("generate", folder, *PROMPT, "--json")
    assert json.loads(ran.out)["prompt_tokens"][0] != 0
    assert "has no add_bos_token" in caplog.text


# --- bad input ---


def no_tokenizer(folder) -> None:
    (folder / "tokenizer.json").unlink()


def no_template(folder) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": None}))


def bad_eos(folder) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ["</s>"]}))


def classifier(folder) -> None:
    config = tiny.WORDY | {"architectures": [SEQUENCE_CLASSIFICATION]}
    tiny.write_checkpoint(folder, config)


def small_vocabulary(folder) -> None:
    tiny.write_checkpoint(folder, tiny.LITE)
    shutil.copy(tiny.MINI / "tokenizer.json", folder)


def not_finite(folder) -> None:
    tiny.write_checkpoint(
        folder, tiny.WORDY, tiny.random_weights(tiny.WORDY) | {"model.norm.weight": torch.full((128,), torch.nan)}
    )


ANY = ("--prompt", "Hi there", "--max-new-tokens", "2")
CASES = [
    ("no tokenizer", no_tokenizer, ANY, 3, "tokenizer.json"),
    ("no template", no_template, (*ANY, "--chat"), 3, "tokenizer_config.json: no chat template (give plain text"),
    ("EOS is text", bad_eos, ANY, 3, "generation_config.json: eos_token_id is ['</s>'] (it must be a token's id"),
    ("classifier", classifier, ANY, 3, f"is a {SEQUENCE_CLASSIFICATION} (generating needs a language model)"),
    ("other vocabulary", small_vocabulary, ANY, 3, "knows ids beyond the model's vocabulary of 160"),
    ("NaN", not_finite, ANY, 3, "the model's logits are not finite"),
    ("long prompt", None, ("--prompt", "night " * 1300), 2, "tokens, the context 1280 (give a shorter prompt)"),
    ("negative temperature", None, (*ANY, "--temperature", "-1"), 2, "temperature -1 is out of range"),
    ("temperature is NaN", None, (*ANY, "--temperature", "nan"), 2, "temperature nan is out of range"),
    ("top-p of 0", None, (*ANY, "--temperature", "1", "--top-p", "0"), 2, "top-p 0 is out of range"),
    ("top-p beyond 1", None, (*ANY, "--temperature", "1", "--top-p", "1.5"), 2, "top-p 1.5 is out of range"),
    ("no new tokens", None, ("--prompt", "Hi", "--max-new-tokens", "0"), 2, "'--max-new-tokens'"),
    ("no prompt", None, (), 2, "Missing option '--prompt'"),
    ("unknown cache", None, (*ANY, "--kv-cache", "int8"), 2, "'--kv-cache'"),
    ("no such file", None, ("--prompt", "@nowhere.txt"), 3, "nowhere.txt: can't be read"),
    ("not UTF-8", None, ("--prompt", "\udcff"), 2, "--prompt is not UTF-8"),
    ("no such device", None, (*ANY, "--device", "cuda:99"), 2, "--device cuda:99 can't be used"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "args", "code", "message"), CASES, ids=[case[0] for case in CASES])
def test_bad_input(name, damage, args, code, message, cli, wordy, tmp_path):
    folder = wordy
    if damage is not None:
        folder = tiny.write_checkpoint(tmp_path / "m", tiny.WORDY)
        damage(folder)
    ran = cli("generate", folder, *args)
    assert ran.code == code, ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
