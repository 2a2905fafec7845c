"""The model card: what it says of the base model, how the artifact is run, what was measured; and whose it is."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tracemalloc
from dataclasses import replace

import gguf_tiny
import pytest
import tiny
from huggingface_hub import ModelCard
from measured_cases import MEASURED

import dsv2quant as dq
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError, UsageError
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.planning.sizes import tensor_parallel_sizes
from dsv2quant.report.card import CalibratedOn, GgufFile, folder_card, gguf_card
from dsv2quant.report.measured import Cell, Estimate, Measured
from dsv2quant.report.origin import origin
from dsv2quant.storage.card import addressed, is_persons, write_card

MIT = {"license": "mit", "language": ["en", "no"]}
BODY = "---\nlicense: mit\nlanguage:\n- en\n- no\n{}---\n# Model\n"
CARDS = {
    "plain": (BODY.format("").encode(), MIT),
    "byte order mark": (b"\xef\xbb\xbf" + BODY.format("").encode(), MIT),
    "CRLF": (BODY.format("").replace("\n", "\r\n").encode(), MIT),
    "a date that is none": (BODY.format("date: 2024-02-30\n").encode(), MIT),
    "not UTF-8": (BODY.format("author: ").encode()[:-12] + b"\xff\n---\n", MIT),
    "explicit types": (b"---\nlicense: !!bool x\n---\n", {"license": "x"}),
    "a number of 5,000 digits": (b"---\nlicense: mit\nn: !!int " + b"9" * 5000 + b"\n---\n", {"license": "mit"}),
    "no mapping": (b"---\n- license: mit\n---\n", {}),
    "a licence that is no text": (b"---\nlicense: {a: b}\n---\n", {}),
    "nested": (b"---\nlicense: mit\nx: " + b"[" * 20_000 + b"\n---\n", {}),
    "aliases": (b"---\nlicense: mit\na: &a [x, x]\nb: &b [*a, *a]\nlanguage: [*b, *b]\n---\n", {"license": "mit"}),
    "no front matter": (b"# Model\n---\nlicense: mit\n---\n", {}),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("card") / "model", tiny.LITE | {"num_hidden_layers": 2})


def with_card(small, folder, content):
    shutil.copytree(small, folder)
    (folder / "README.md").write_bytes(content)
    return open_checkpoint(folder)


@pytest.mark.parametrize("name", CARDS)
def test_the_licence_of_a_card_is_carried_along_whatever_else_stands_in_it(name, small, tmp_path):
    content, expected = CARDS[name]
    assert origin(with_card(small, tmp_path / "model", content)).carried == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda card: os.truncate(os.open(card, os.O_CREAT | os.O_WRONLY), 3 << 30), "larger than 16,777,216 bytes"),
        (lambda card: card.symlink_to("/dev/zero"), "is a link out of its folder"),
        (os.mkfifo, "is a device, a pipe or a socket"),
    ],
)
def test_a_card_that_is_none_is_not_read(make, message, tmp_path):
    checkpoint = open_checkpoint(tiny.write_checkpoint(tmp_path / "model", tiny.LITE | {"num_hidden_layers": 2}))
    make(tmp_path / "model" / "README.md")
    plan = make_plan(checkpoint, recipe.builtin("fp8-channel"))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            convert(plan, tmp_path / "out", command="")
        assert tracemalloc.get_traced_memory()[1] < 1 << 30
    finally:
        tracemalloc.stop()
    assert not (tmp_path / "out").exists()


def test_the_base_model_is_what_is_given_or_downloaded_or_snapshot_or_named(small, tmp_path):
    named = with_card(small, tmp_path / "model", b"---\nbase_model: [nonsense, one/base]\n---\n")
    assert (origin(named).id, origin(named).name, origin(named).revision) == ("one/base", "one/base", None)
    assert origin(named, "my/base").id == "my/base"
    downloaded = replace(named, model="owner/name", revision="0123abcd")
    assert (origin(downloaded).id, origin(downloaded).revision) == ("owner/name", "0123abcd")
    assert (origin(downloaded, "my/base").id, origin(downloaded, "my/base").revision) == ("my/base", None)
    folder = tmp_path / "hub/models--deepseek-ai--DeepSeek-V2-Lite/snapshots/604d5664dddd88a0433dbae533b7fe9472482de0"
    snapshot = with_card(small, folder, b"---\nbase_model: one/base\n---\n")
    assert origin(snapshot).id == "deepseek-ai/DeepSeek-V2-Lite"
    assert origin(snapshot).revision == folder.name
    nameless = origin(open_checkpoint(small))
    assert (nameless.id, nameless.name, nameless.revision) == (None, "model", None)


def front_of(card):
    """The metadata as the hub's own library reads it; its check of a card against the hub's rules needs the hub."""
    return ModelCard(card.decode()).data.to_dict()


def test_the_front_matter_is_what_the_hub_reads(tmp_path, fox, cli):
    source = tmp_path / "source"
    shutil.copytree(tiny.MINI, source)
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: deepseek\nlicense_link: LICENSE\nlanguage: [en, 'no']\n---\n"
    )
    (source / "LICENSE").write_text("Be kind.")
    ran = cli("convert", source, "--fp8", "--base-model", "deepseek-ai/DeepSeek-V2", "-o", tmp_path / "out", "-q")
    assert ran.code == 0, ran.err
    assert front_of((tmp_path / "out/README.md").read_bytes()) == {
        "base_model": "deepseek-ai/DeepSeek-V2", "base_model_relation": "quantized", "quantized_by": "dsv2quant",
        "license": "other", "license_name": "deepseek", "license_link": "LICENSE", "language": ["en", "no"],
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["deepseek_v2", "fp8", "fp8-block", "conversational"],
    }  # fmt: skip
    assert (tmp_path / "out/LICENSE").read_text() == "Be kind."
    assert cli("convert", source, "--fp8", "--base-model", "DeepSeek-V2", "-o", tmp_path / "no").code == 2
    with pytest.raises(UsageError, match="--base-model does not go with --gguf"):
        dq.plan(source, gguf="Q8_0", base_model="deepseek-ai/DeepSeek-V2")


def test_a_data_set_that_calibrated_is_named_by_its_id(small):
    checkpoint = open_checkpoint(small)
    plan = make_plan(checkpoint, recipe.builtin("fp8-channel"))
    for source, expected in (("org/chats@0123abcd:train#messages", ["org/chats"]), ("my chats.jsonl", None)):
        card = folder_card(plan, "", origin(checkpoint), calibrated=CalibratedOn(source, "0" * 64, 8, 512))
        assert front_of(card).get("datasets") == expected
        assert f"On 4,096 tokens, 8 windows of 512, of {source} (sha256 {'0' * 64})." in card.decode()


def test_without_a_base_model_none_is_named(small):
    checkpoint = open_checkpoint(small)
    front = front_of(folder_card(make_plan(checkpoint, recipe.builtin("fp8-channel")), "", origin(checkpoint)))
    assert front.keys() & {"base_model", "base_model_relation", "license"} == set()


def test_a_card_leads_to_the_models_own_or_has_its_text(small, tmp_path):
    own = with_card(small, tmp_path / "model", BODY.format("").encode() + b"Made in a \x1b[2J lab.\n")
    plan = make_plan(own, recipe.builtin("fp8-channel"))
    told = folder_card(plan, "", origin(own)).decode()
    assert "<summary>The card of model</summary>\n\n# Model\nMade in a \\x1b[2J lab.\n\n</details>" in told
    linked = folder_card(plan, "", origin(own, "one/base")).decode()
    assert "citation: [the card of one/base](https://huggingface.co/one/base)." in linked
    assert "Made in" not in linked
    assert "| licence      | mit " in linked


TEMPLATES = {
    "with a system prompt": (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
        "```<model>{% endif %}",
        "\n````\n<s><system>{system prompt}<user>{prompt}```<model>\n````\n",
    ),
    "without": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}[{{ messages[0].content }}]",
        "\n```\n[{prompt}]\n```\n",
    ),
    "that names the day": ("{{ strftime_now('%d') }}{{ messages[0].content }}{{ messages[1].content }}", None),
    "that fails": ("{{ raise_exception('no') }}", None),
    "broken": ("{% if %}", None),
    "long": ("{{ 'x' * 5000 }}{{ messages[1].content }}", None),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_what_the_chat_template_makes(name, small, tmp_path):
    template, expected = TEMPLATES[name]
    shutil.copytree(small, tmp_path / "model")
    settings = {"chat_template": template, "bos_token": "<s>"}
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = open_checkpoint(tmp_path / "model")
    card = folder_card(make_plan(checkpoint, recipe.builtin("fp8-channel")), "", origin(checkpoint)).decode()
    assert "client.chat.completions" in card
    assert ("### Prompt" in card) == (expected is not None)
    assert expected is None or expected in card


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (b'{"temperature": 0.6, "top_p": 0.95, "top_k": true, "do_sample": true}', "temperature 0.6, top_p 0.95"),
        (b'{"temperature": NaN, "top_k": 20}', "top_k 20"),
        (b"{", None),
    ],
)
def test_how_tokens_are_drawn_is_the_models_own(content, row, small, tmp_path):
    shutil.copytree(small, tmp_path / "model")
    (tmp_path / "model/tokenizer_config.json").unlink()
    (tmp_path / "model/generation_config.json").write_bytes(content)
    checkpoint = open_checkpoint(tmp_path / "model")
    card = folder_card(make_plan(checkpoint, recipe.builtin("fp8-channel")), "", origin(checkpoint)).decode()
    assert (f"| sampling     | {row} " in card) if row else ("| sampling" not in card)
    assert "client.completions.create" in card  # without a chat template


def test_commands_are_for_the_targets_and_their_parallel_sizes(small):
    checkpoint = open_checkpoint(small)
    rules = recipe.builtin("fp8-channel")
    plan = make_plan(checkpoint, rules, for_targets=["vllm", "sglang"], tp=2, ep=4)
    card = addressed(folder_card(plan, "", origin(checkpoint)), "me/tiny").decode()
    assert "\nvllm serve me/tiny --tensor-parallel-size 2 --data-parallel-size 2 --enable-expert-parallel\n" in card
    sglang = "--tp-size 4 --ep-size 4 --dp-size 2 --enable-dp-attention"
    assert f"\npython -m sglang.launch_server --model-path me/tiny {sglang}\n" in card
    assert "from transformers" not in card
    assert "from vllm" not in card  # one process has no data parallelism
    alone = folder_card(make_plan(checkpoint, rules), "", origin(checkpoint)).decode()
    assert "\nvllm serve OWNER/NAME\n" in alone
    assert 'from_pretrained("OWNER/NAME", dtype="bfloat16", device_map="auto")' in alone
    assert "pip install transformers accelerate compressed-tensors\n" in alone


def test_sizes_are_those_that_the_consumer_takes_the_schemes_at(tmp_path):
    tiny.write_headers(tmp_path, gguf_tiny.PUBLISHED["v2"])
    checkpoint = open_checkpoint(tmp_path)
    # Experts of 1536, in groups of 128, of which a share must hold more than one: 6 over 2 GPUs, 3 over 4, not 1.5.
    plan = make_plan(checkpoint, recipe.builtin("int4-experts"), for_targets=["vllm"])
    assert tensor_parallel_sizes(plan, "vllm") == [1, 2, 4]
    assert tensor_parallel_sizes(plan, "transformers") == [1]
    fp8 = make_plan(checkpoint, recipe.builtin("fp8-channel"))
    assert tensor_parallel_sizes(fp8, "vllm") == [1, 2, 4, 8, 16]
    assert "split over 1, 2, 4, 8 or 16 GPUs" in folder_card(fp8, "", origin(checkpoint)).decode()


def test_a_card_tells_what_was_measured(small):
    checkpoint = open_checkpoint(small)
    plan = make_plan(checkpoint, recipe.builtin("fp8-channel"))
    assert "## Evaluation" not in folder_card(plan, "", origin(checkpoint)).decode()
    card = folder_card(plan, "", origin(checkpoint, "a/b"), measured=MEASURED).decode()
    assert re.search(r"\| reference base +\| +\| +\| 15.0023 ± 0.5545 \|", card)
    row = next(line for line in card.splitlines() if line.startswith("| fp8-channel  ") and "kB" in line)
    assert [cell.strip() for cell in row.split("|")[4:-1]] == [
        "15.0848 ± 0.5573", "+0.00548 ± 0.00121", "0.01309 ± 0.00026", "0.1060", "94.08% ± 0.15",
    ]  # fmt: skip
    assert "30,660 tokens in 60 windows of 512 of a text (sha256 71f2ff5d99bd" in card.replace("\n", " ").lower()
    assert "Perplexity grew by: fp8-channel +0.550%." in card
    (engine,) = [line for line in card.splitlines() if line.startswith("| vllm")]
    assert [cell.strip() for cell in engine.split("|")[1:-1]] == [
        "vllm", "0.26.0", "NVIDIA H200", "2", "1.20e-04 ± 1e-05", "3.00e-04", "99.80% ± 0.10",
        "as the runtime computes it",
    ]  # fmt: skip
    assert "eval-ppl ARTIFACT --reference a/b --ctx 512 --limit 60" in card
    drawn = folder_card(plan, "", origin(checkpoint), figures={"figures/sqnr.svg": "Signal to noise"}).decode()
    assert "\n![Signal to noise](figures/sqnr.svg)\n" in drawn


def test_the_hub_gets_the_numbers_that_were_measured(small, tmp_path):
    checkpoint = open_checkpoint(small)
    plan = make_plan(checkpoint, recipe.builtin("fp8-channel"))
    unmeasured = ModelCard(folder_card(plan, "", origin(checkpoint)).decode()).data
    assert (unmeasured.eval_results, unmeasured.metrics) == (None, None)
    data = ModelCard(folder_card(plan, "", origin(checkpoint), measured=MEASURED).decode()).data
    assert (data.model_name, data.metrics) == ("model, fp8-channel", ["perplexity"])
    assert {(x.dataset_type, x.dataset_name, x.dataset_args["ctx"]) for x in data.eval_results} == {
        ("a-text", "a text", 512)
    }
    assert [(x.metric_type, x.metric_name, x.metric_value) for x in data.eval_results] == [
        ("perplexity", "Perplexity", 15.0848), ("kl_divergence", "KL divergence from base, nats", 0.01309),
        ("same_top_1", "Same likeliest token as base", 0.9408),
    ]  # fmt: skip
    scores = replace(MEASURED.scores, text="org/texts@0123abcd:test#text", perplexity=Estimate(math.inf, 0))
    of_id = ModelCard(folder_card(plan, "", origin(checkpoint), measured=Measured(scores)).decode()).data
    assert [(x.metric_type, x.dataset_type) for x in of_id.eval_results] == [
        ("kl_divergence", "org/texts"), ("same_top_1", "org/texts"),
    ]  # fmt: skip


def test_two_files_of_one_type_are_told_apart():
    plan = dq.plan(tiny.MINI, gguf="Q8_0")
    split = {f"b-0000{i}-of-00002.gguf": 1 for i in (1, 2)}
    files = [GgufFile(plan, "", {"a.gguf": 1}, MEASURED), GgufFile(plan, "", split, MEASURED)]
    card = gguf_card(files, origin(plan.checkpoint)).decode()
    names = [x.metric_name for x in ModelCard(card).data.eval_results if x.metric_type == "perplexity"]
    assert names == ["Perplexity of a", "Perplexity of b"]
    assert 'hf download OWNER/NAME --include "b-*-of-*.gguf" --local-dir .\n' in card
    assert "--hf-file b-00001-of-00002.gguf\n" in card


def test_weights_that_were_held_against_the_source_are_told(small):
    checkpoint = open_checkpoint(small)
    plan = make_plan(checkpoint, recipe.builtin("fp8-channel"))
    cells = (
        Cell(0, "o_proj", ("fp8-channel",), 1, 9, 8.0, False, 1.0, 31.5, 31.5, 30.25),
        Cell(None, "norm", ("bf16",), 2, 9, 16.0, True),
    )
    card = folder_card(plan, "", origin(checkpoint), measured=Measured(cells=cells)).decode()
    assert "all 3 tensors were decoded as consumers do and held against the source's; signal is 30.25 dB above" in card
    exact = folder_card(plan, "", origin(checkpoint), measured=Measured(cells=cells[1:])).decode()
    assert "held against the source's; none differs (`dsv2quant verify ARTIFACT --source model`)." in exact


def test_the_calibration_and_its_coverage_are_told(wordy, fox, tmp_path, cli):
    few = ("--group-size", "32", "--target", "transformers", "--num-calibration-samples", "2", "--calibration", fox)
    assert cli("convert", wordy, "--int4=experts", *few, "-o", tmp_path / "out", "-q").code == 0
    card = (tmp_path / "out/README.md").read_text()
    text = json.loads((tmp_path / "out/dsv2quant.json").read_text())["calibration"]["text_sha256"]
    assert f"On 64 tokens, 2 windows of 32, of fox.txt (sha256 {text})." in card
    found = re.search(r"A routed expert saw (\d+) to (\d+) tokens; (\d) of them saw none, and (\d) fewer", card)
    fewest, most, unseen, starved = map(int, found.groups())
    assert 0 <= fewest < most <= 64
    assert (unseen > 0) == (fewest == 0)
    assert starved == 4  # of 128 channels


def test_a_gguf_card_has_a_row_of_every_file(tmp_path, cli):
    plan = dq.plan(tiny.MINI, gguf="Q4_K_M")
    larger = dq.plan(tiny.MINI, gguf="Q8_0")
    files = [
        GgufFile(plan, "dsv2quant convert … --gguf Q4_K_M", {"mini-Q4_K_M.gguf": 6_000_000}, MEASURED),
        GgufFile(larger, "dsv2quant convert … --gguf Q8_0", {"mini-Q8_0.gguf": 9_600_000}),
    ]
    card = addressed(gguf_card(files, origin(plan.checkpoint, "me/dsv2-mini")), "me/mini-GGUF").decode()
    front = front_of(card.encode())
    assert (front["library_name"], front["license"], front["tags"]) == (
        "gguf", "mit", ["deepseek_v2", "gguf", "conversational"],
    )  # fmt: skip
    assert re.search(r"\| Q4_K_M +\| 6.00 MB \| +5.36 \| Q4_K 62%, Q6_K 13%, Q5_0 13% +\| \[mini-Q4_K_M.gguf\]", card)
    assert re.search(r"\| mini-Q8_0.gguf +\| 9.60 MB +\|", card)
    assert "llama-server -hf me/mini-GGUF --hf-file mini-Q8_0.gguf\n" in card
    assert "hf download me/mini-GGUF mini-Q8_0.gguf --local-dir .\n" in card
    assert "llama-server -m mini-Q4_K_M.gguf --cpu-moe\n" in card
    assert re.search(r"Q8_0: types by tensor</summary>\n\n\| tensor .*\n.*\n\| output +\| Q8_0 \|", card)
    assert re.search(r"\| Q8_0 +\| +9.60 MB +\| +8.57 \| +\| +\| +\| +\| +\|", card)  # not scored
    assert "Fallbacks of Q4_K_M:" in card


def test_an_importance_matrix_is_told_by_its_text_and_no_path(fox, tmp_path, cli):
    imatrix = tmp_path / "here/fox.imatrix.gguf"
    imatrix.parent.mkdir()
    text = ("--calibration", fox, "--num-calibration-samples", "1", "--max-seq-length", "64")
    assert cli("calibrate", tiny.MINI, *text, "--imatrix", imatrix, "-o", tmp_path / "s.safetensors", "-q").code == 0
    plan = dq.plan(tiny.MINI, gguf="Q4_K_M", imatrix=imatrix)
    lacking = replace(plan, notes=(f"{imatrix} lacks 1 of 9",))
    card = gguf_card([GgufFile(lacking, "", {"m.gguf": 1})], origin(plan.checkpoint))
    assert front_of(card)["tags"][:3] == ["deepseek_v2", "gguf", "imatrix"]
    told = card.decode()
    assert "The importance matrix was measured on 64 tokens of fox.txt." in told
    assert "\n\nfox.imatrix.gguf lacks 1 of 9.\n" in told
    assert str(tmp_path) not in told


def test_a_card_with_another_repository_is_as_unedited_as_before(small, tmp_path):
    checkpoint, path = open_checkpoint(small), tmp_path / "README.md"
    card = folder_card(make_plan(checkpoint, recipe.builtin("fp8-channel")), "", origin(checkpoint))
    path.write_bytes(addressed(card, "me/it"))
    assert not is_persons(path)
    assert b"OWNER/NAME" not in path.read_bytes()
    path.write_bytes(addressed(card + b"and mine", "me/it"))
    assert is_persons(path)
    assert b"vllm serve me/it\n" in path.read_bytes()


def test_a_card_that_a_person_edited_stays(small, tmp_path):
    out, card = tmp_path / "out", tmp_path / "out/README.md"
    plan = make_plan(open_checkpoint(small), recipe.builtin("fp8-channel"))
    convert(plan, out, command="one")
    assert not is_persons(card)
    convert(plan, out, command="two", force=True)
    assert "\ntwo\n" in card.read_text()
    edited = card.read_text().replace("## Use", "## How to use it")
    card.write_text(edited)
    assert is_persons(card)
    convert(plan, out, command="three", force=True)
    convert(make_plan(open_checkpoint(small), recipe.builtin("fp8-tensor")), out, command="four", force=True)
    assert card.read_text() == edited
    assert not write_card(card, b"another")
    assert dq.verify(out).checked.edited == ["README.md"]
    card.unlink()
    assert write_card(card, folder_card(plan, "five", origin(plan.checkpoint)))
    assert dq.verify(out).checked.edited == []  # another card than the manifest's, and a person had no part in it
