"""`--int4` on the command line: what it chooses, what it says on stderr, and what the artifact says of itself."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import tiny
from calibrated import manifest
from test_cli import modules_after
from test_convert import contents

from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.text import calibration as text
from dsv2quant.text.text import python_topics

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = ("--group-size", "32", "--target", "transformers", "--num-calibration-samples", "3")
EVAL = ("--ctx", "16", "--limit", "1")


def schemes(folder: Path) -> set[str]:
    return {weight.scheme for weight in open_checkpoint(folder).weights}


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (("--int4", "{model}"), "int4-mixed"),
        (("{model}", "--int4"), "int4-mixed"),
        (("{model}", "--int4", "-q"), "int4-mixed"),
        (("--int4", "pure", "{model}"), "int4-pure"),
        (("{model}", "--int4=experts"), "int4-experts"),
        (("--int3", "{model}"), "int3-mixed"),
        (("{model}", "--int2"), "int2-mixed"),
        (("--int2", "experts", "{model}"), "int2-experts"),
        (("{model}",), "fp8-block"),
    ],
)
@pytest.mark.parametrize("verb", [("plan",), ("convert", "--dry-run")], ids=["plan", "convert"])
def test_int4_may_stand_alone_before_or_after_the_model(verb, args, name, cli):
    ran = cli(*verb, *(word.format(model=tiny.MINI) for word in args))
    assert ran.code == 0
    assert f"recipe {name}, for vllm" in ran.out
    assert ("note: calibration takes" in ran.out) == name.startswith("int")


def test_rounding_needs_no_calibration(tmp_path, cli):
    ran = cli("convert", tiny.MINI, "--int4=pure", "--method", "rtn", "--group-size", "64", "-o", tmp_path / "out")
    assert ran.code == 0
    assert "calibration" not in ran.err
    assert ran.out.count("\n") == 1
    assert schemes(tmp_path / "out") == {"bf16", "int4-g64"}
    assert not {key for key in manifest(tmp_path / "out") if "calibrat" in key}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "dsv2quant convert dsv2-mini --int4=pure --method rtn --group-size 64\n" in card


def test_rounding_does_not_import_torch(wordy, tmp_path):
    args = ("convert", wordy, "--int4", "--method", "rtn", "--group-size", "32", "--target", "transformers", "-q")
    assert "torch" not in modules_after(*map(str, args), "-o", str(tmp_path / "out"))
    assert "int4-g32" in schemes(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "rtn"), "--method and --group-size go with --int4"),
        (("--fp8", "--method", "rtn"), "--method and --group-size go with --int4"),
        (("--group-size", "64"), "--method and --group-size go with --int4"),
        (("--recipe", "x.yaml", "--method", "gptq"), "a recipe names them itself"),
        (("--fp8", "--int4"), "--fp8, --int4, --int3, --int2, --int8, --w4a8 and --recipe exclude each other"),
        (("--int4", "--int2"), "--fp8, --int4, --int3, --int2, --int8, --w4a8 and --recipe exclude each other"),
        (("--int4", "--recipe", "x.yaml"), "--w4a8 and --recipe exclude each other"),
        (("--int3", "--group-size", "channel"), "--int3 has scales per group alone: --group-size 128, 64 or 32"),
        (("--int2", "--method", "awq"), "--int2 has no method awq (take gptq, mse or rtn)"),
        (("--int2", "--format", "gptq"), "--format gptq: gptq and awq go with --int4"),
        (("--int2=pure",), "'pure' is not one of 'mixed', 'experts'"),
        (
            ("--int3", "--target", "sglang"),
            "no int3 for --target sglang: it loads packed integers of 4 and 8 bits alone",
        ),
        (("--fp8", "--calibration", "{fox}"), "--calibration: nothing of this recipe calibrates"),
        (("--int4", "--method", "rtn", "--calibration", "{fox}"), "nothing of this recipe calibrates here"),
        (("--int4=quarter",), "'quarter' is not one of 'mixed', 'pure', 'experts'"),
        (("--int4", "--method", "best"), "'best' is not one of 'rtn', "),
        (("--int4", "--group-size", "48"), "'48' is not one of '128', '64', '32', 'channel'"),
        (("--int4", "--num-calibration-samples", "0"), "0 is not in the range x>=1"),
        (("--int4", "--max-seq-length", "4"), "4 is not in the range x>=8"),
        (("--int4", "--seed", "-1"), "-1 is not in the range x>=0"),
    ],
)
def test_wrong_usage_exits_with_2(options, message, wordy, fox, tmp_path, cli):
    ran = cli("convert", wordy, *(option.format(fox=fox) for option in options), "-o", tmp_path / "out")
    assert ran.code == 2
    assert message in ran.err
    assert ran.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt: can't be read: "),
        ("empty.txt", "", "empty.txt: holds no text (give a file with text)"),
        ("short.txt", "Hello, world.", "tokens don't fill one window of 32 (give a longer text or"),
        ("odd.jsonl", '{"text": "fine"}\n{"txt": 1}\n', "odd.jsonl, line 2: has no text"),
        ("wikitext2", None, "wikitext2: an evaluation text"),
    ],
)
def test_a_calibration_text_that_will_not_do_is_one_line(name, content, message, wordy, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_text(content)
    ran = cli("convert", wordy, "--int4", *FEW, "--calibration", name, "-o", "out")
    assert ran.code == 3
    assert ran.err.startswith("error: ")
    assert message in ran.err
    assert ran.err.count("\n") == 1
    assert ran.out == ""
    assert not Path("out").exists()


def test_without_a_text_it_says_which_one_it_takes(wordy, fox, tmp_path, cli, monkeypatch):
    default = text.standard_library()
    monkeypatch.setattr(text, "standard_library", lambda: default)  # parsing it takes two seconds
    command = ("convert", wordy, "--int4", *FEW)
    ran = cli(*command, "-o", tmp_path / "default")
    assert ran.code == 0
    made = manifest(tmp_path / "default")["calibration"]
    assert (made["source"], made["text_sha256"]) == (default.source, default.sha256)
    assert ran.err == f"no --calibration: using {default.source}; text like what the model will see is better\n"
    assert "--calibration" not in (tmp_path / "default" / "README.md").read_text()
    assert cli("eval-ppl", tmp_path / "default", *EVAL).err == ""  # other text than is scored by default
    assert cli(*command, "-o", tmp_path / "quiet", "-q").err == ""
    assert cli(*command, "-o", tmp_path / "mine", "--calibration", fox).err == ""
    assert contents(tmp_path / "quiet") == contents(tmp_path / "default") != contents(tmp_path / "mine")


def test_fewer_windows_than_asked_for_is_a_warning(wordy, fox, tmp_path, cli):
    asked = ("--group-size", "32", "--target", "transformers", "--num-calibration-samples", "5000")
    ran = cli("convert", wordy, "--int4=experts", *asked, "--calibration", fox, "-o", tmp_path / "out")
    assert ran.code == 0
    made = manifest(tmp_path / "out")["calibration"]["windows"]
    assert 8 < made < 200
    assert ran.err == f"warning: fox.txt fills {made} of 5000 windows of 32 tokens\n"


def test_calibrating_on_what_is_scored_is_a_warning_twice(wordy, fox, tmp_path, cli):
    topics = tmp_path / "topics.txt"
    topics.write_text(python_topics().content)
    out = tmp_path / "out"
    ran = cli("convert", wordy, "--int4=experts", *FEW, "--calibration", topics, "-o", out)
    assert ran.code == 0
    assert ran.err == "warning: 100.0% of the text that eval-ppl scores by default is in it\n"
    flatters = "% of the text's lines were calibrated on: it flatters the model\n"
    assert cli("eval-ppl", out, *EVAL).err == f"warning: 100.0{flatters}"
    assert cli("eval-ppl", out, *EVAL, "-q").err == ""
    assert flatters not in cli("eval-ppl", out, *EVAL, "--text", fox).err
    # A part of it, line for line among others.
    half = tmp_path / "half.txt"
    lines = [line for line in python_topics().content.splitlines(keepends=True) if len(line) > 50]
    other = [f"This line, number {i}, is in no manual of Python whatsoever.\n" for i in range(len(lines))]
    half.write_text("".join(a + b for a, b in zip(lines, other, strict=True)))
    warned = cli("eval-ppl", out, *EVAL, "--text", half).err
    share = float(warned.removeprefix("warning: ").partition("%")[0])
    assert warned.endswith(flatters)
    assert 40 < share < 60  # of some 1,000 sampled lines, whose share is known to 1.6%


def test_json_is_one_object_with_what_calibration_did(wordy, fox, tmp_path, cli):
    command = ("convert", wordy, "--int4=experts", *FEW, "-o", tmp_path / "out", "--json")
    ran = cli(*command, "--calibration", fox)
    assert ran.code == 0
    assert ran.err == ""
    assert ran.out.count("\n") == 1
    result = json.loads(ran.out)
    assert result["schema"] == "dsv2quant.convert/2"
    made = result["calibration"]
    assert made == manifest(tmp_path / "out")["calibrated"]
    roles = ["routed.gate_proj", "routed.up_proj", "routed.down_proj"]
    assert [(e["layer"], e["role"], e["matrices"]) for e in made["errors"]] == [(1, role, 4) for role in roles]
    assert set(made["errors"][0]) == {"layer", "role", "matrices", "error", "rtn_error"}
    (experts,) = made["experts"]
    assert set(experts) == {"layer", "fewest", "median", "most", "variation", "starved", "unseen"}
    # Three windows of 32 tokens, two experts each.
    assert experts["layer"] == 1
    assert experts["fewest"] <= 48 <= experts["most"] <= 96
    assert made["kept_rtn"] == []
    rounding = ("--int4=experts", *FEW[:4], "--method", "rtn")
    rounded = cli("convert", wordy, *rounding, "-o", tmp_path / "rtn", "--json")
    assert json.loads(rounded.out)["calibration"] is None


def test_people_see_a_row_per_role_and_the_experts_tokens(wordy, fox, tmp_path, cli):
    ran = cli("convert", wordy, "--int4=pure", *FEW, "--calibration", fox, "-o", tmp_path / "out")
    *table, layers, rule, coverage, last = ran.out.splitlines()
    assert " ".join(table[0].split()) == "role matrices output error of rounding ratio rounding kept"
    rows = {line.split()[0]: line.split()[1] for line in table[2:]}
    assert rows["kv_b_proj"] == rows["o_proj"] == "2"
    assert rows["routed.down_proj"] == "4"
    assert len(rows) == 13
    assert " ".join(layers.split()) == "layer fewest tokens median most variation below 128 unseen experts"
    assert set(rule) == {"-", " "}
    assert coverage.split()[0] == "1"
    assert " of 4" in coverage
    assert last.startswith(f"{tmp_path / 'out'}: ")


def test_the_card_shows_a_command_that_makes_the_same_artifact(wordy, fox, tmp_path, cli, monkeypatch):
    own = ("--max-seq-length", "24", "--seed", "3", "--calibration", fox, "--max-shard-size", "500KB")
    assert cli("convert", wordy, "--int4=pure", *FEW, *own, "-o", tmp_path / "out", "-q").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    (command,) = [line for line in card.splitlines() if line.startswith("dsv2quant convert ")]
    assert command == (
        "dsv2quant convert wordy --int4=pure --group-size 32 --target transformers --max-shard-size 500KB "
        "--calibration fox.txt --num-calibration-samples 3 --max-seq-length 24 --seed 3"
    )
    told = card + (tmp_path / "out" / "dsv2quant.json").read_text()
    assert not [folder for folder in (tmp_path, wordy.parent, fox.parent) if str(folder) in told]
    (tmp_path / "wordy").symlink_to(wordy)
    (tmp_path / "fox.txt").symlink_to(fox)
    monkeypatch.chdir(tmp_path)
    assert cli(*shlex.split(command)[1:], "-o", "again", "-q").code == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_length_and_seed_choose_the_windows(wordy, tmp_path, cli):
    # Six documents, of which three windows take some: the order matters.
    documents = tmp_path / "six.jsonl"
    words = ("one", "two", "six", "ten", "red", "sky")
    documents.write_text("".join(json.dumps({"text": f"{word} " * 40}) + "\n" for word in words))
    tokens = []
    for i, options in enumerate([(), ("--max-seq-length", "32"), ("--seed", "1"), ("--max-seq-length", "24")]):
        args = ("--calibration", documents, "-o", tmp_path / str(i), "-q")
        assert cli("convert", wordy, "--int4=experts", *FEW, *options, *args).code == 0
        made = manifest(tmp_path / str(i))["calibration"]
        assert (made["windows"], made["ctx"], made["seed"]) == (3, 24 if i == 3 else 32, 1 if i == 2 else 0)
        tokens.append(made["tokens_sha256"])
    assert tokens[0] == tokens[1]  # the model was trained for 32 tokens
    assert len(set(tokens)) == 3
