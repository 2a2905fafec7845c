"""Tasks of a release without lm_eval: what its answers become in tables, cards and reports, what is kept, and gates.
tests/clients/lm_eval runs it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import tiny
from huggingface_hub import ModelCard
from measured_cases import MEASURED, TASKS
from test_json import documented, keys

import dsv2quant as dq
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.errors import GateError, InputError, UsageError
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.publishing import harness, wanted
from dsv2quant.publishing.tasks import FOLDER
from dsv2quant.report.artifacts import Artifact, Report, report_json
from dsv2quant.report.card import GgufFile, folder_card, gguf_card
from dsv2quant.report.measured import Measured, measured_from, measured_json
from dsv2quant.report.origin import origin
from dsv2quant.report.page import page
from dsv2quant.report.tasks import beside_table, heads, means, recovery, task_table

DONE = replace(MEASURED, tasks=TASKS)
WORSE = replace(TASKS, scores=tuple(replace(s, value=s.value / 2) for s in TASKS.scores))


def lines(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "---" not in line]


def test_of_each_task_one_score_counts():
    assert [(s.task, s.metric, s.filter) for s in heads(TASKS)] == [
        ("arc", "acc_norm", "none"), ("gsm8k", "exact_match", "strict-match"), ("wikitext", "word_perplexity", "none"),
    ]  # fmt: skip


def test_the_mean_is_of_shares_and_what_is_equal_recovers_all():
    assert means(TASKS) == (pytest.approx((0.76 + 0.38) / 2), pytest.approx((0.80 + 0.40) / 2))
    assert recovery(TASKS) == pytest.approx(95)
    for value in (0.1667, 0.3, 0.07):
        equal = replace(TASKS, scores=tuple(replace(s, value=value, reference=value) for s in TASKS.scores))
        assert recovery(equal) == equal.scores[0].recovery == 100
    nothing = replace(TASKS, scores=tuple(replace(s, reference=0.0) for s in TASKS.scores))
    assert (recovery(nothing), nothing.scores[0].recovery, recovery(None)) == (None, None, None)
    bleu = replace(TASKS, scores=(replace(TASKS.scores[0], value=31.0, reference=32.0), *TASKS.scores[2:]))
    assert means(bleu) == (0.38, 0.40)


def test_a_table_of_one_artifact_has_every_metric():
    assert lines(task_table(TASKS, "fp8", markdown=True)) == [
        ["task", "metric", "base", "fp8", "recovery, %"],
        ["arc (25-shot)", "acc", "0.8200 ± 0.0270", "0.8000 ± 0.0280", "97.56"],
        ["arc (25-shot)", "acc_norm", "0.8000 ± 0.0280", "0.7600 ± 0.0300", "95.00"],
        ["gsm8k (5-shot)", "exact_match strict-match", "0.4000 ± 0.0350", "0.3800 ± 0.0340", "95.00"],
        ["gsm8k (5-shot)", "exact_match flexible-extract", "0.4000 ± 0.0350", "0.4400 ± 0.0350", "110.00"],
        ["wikitext (0-shot)", "word_perplexity", "11.0000", "11.5000", ""],
        ["mean", "", "0.6000", "0.5700", "95.00"],
    ]


def test_artifacts_beside_each_other_have_a_row_each():
    assert lines(beside_table([("fp8", TASKS), ("int4", WORSE), ("none", None)], markdown=True)) == [
        ["artifact", "recovery, %", "mean", "arc (25-shot), acc_norm", "gsm8k (5-shot), exact_match strict-match",
         "wikitext (0-shot), word_perplexity"],
        ["reference base", "", "0.6000", "0.8000 ± 0.0280", "0.4000 ± 0.0350", "11.0000"],
        ["fp8", "95.00", "0.5700", "0.7600 ± 0.0300", "0.3800 ± 0.0340", "11.5000"],
        ["int4", "47.50", "0.2850", "0.3800 ± 0.0300", "0.1900 ± 0.0340", "5.7500"],
    ]  # fmt: skip
    assert beside_table([("none", None)]) == ""


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    small = tiny.write_checkpoint(tmp_path_factory.mktemp("tasks") / "model", tiny.LITE | {"num_hidden_layers": 2})
    return make_plan(open_checkpoint(small), recipe.builtin("fp8-channel"))


def test_a_card_has_the_scores_and_how_they_came(plan):
    card = folder_card(plan, "", origin(plan.checkpoint), measured=DONE).decode()
    assert "\n### Tasks\n\n" + task_table(TASKS, "fp8-channel", markdown=True) in card
    assert (
        "arc (version 1.0) 200 of 2,376, gsm8k (version 3.0) 150 of 1,319, wikitext (version 2.0) 62 of 62; ±" in card
    )
    assert "\n```\npython -m dsv2quant.lm_eval --tasks arc,gsm8k,wikitext\n```\n" in card
    assert "\nOther texts and longer contexts were not measured.\n" in card
    without = folder_card(plan, "", origin(plan.checkpoint), measured=MEASURED).decode()
    assert "### Tasks" not in without
    assert "\nTasks, other texts and longer contexts were not measured.\n" in without
    alone = folder_card(plan, "", origin(plan.checkpoint), measured=Measured(tasks=TASKS)).decode()
    assert "## Evaluation\n\n### Tasks" in alone


def test_the_hub_gets_scores_of_its_data_sets(plan):
    data = ModelCard(folder_card(plan, "", origin(plan.checkpoint), measured=DONE).decode()).data
    assert data.metrics == ["perplexity", "acc", "acc_norm", "exact_match", "word_perplexity"]
    arc, normalized, strict, _, text = data.eval_results[3:]
    assert (arc.dataset_type, arc.dataset_config, arc.dataset_split) == ("allenai/ai2_arc", "ARC-Easy", "test")
    assert (arc.dataset_name, arc.dataset_args, arc.metric_args) == (
        "arc", {"num_few_shot": 25}, {"version": "1.0", "samples": 200},
    )  # fmt: skip
    assert (normalized.metric_name, normalized.metric_value) == ("arc, acc_norm", 0.76)
    assert (strict.dataset_type, strict.metric_name) == ("gsm8k", "gsm8k, exact_match, strict-match")
    assert (text.dataset_type, text.metric_value, text.source_name) == ("wikitext", 11.5, "lm_eval 0.4.13")


def test_a_card_of_gguf_files_has_them_beside_each_other():
    plan = dq.plan(tiny.MINI, gguf="Q8_0")
    files = [GgufFile(plan, "", {"a.gguf": 1}, DONE), GgufFile(plan, "", {"b.gguf": 1}, replace(DONE, tasks=WORSE))]
    card = gguf_card(files, origin(plan.checkpoint)).decode()
    assert beside_table([("a", TASKS), ("b", WORSE)], markdown=True) in card
    names = [x.metric_name for x in ModelCard(card).data.eval_results if x.metric_type == "acc"]
    assert names == ["arc, acc of a", "arc, acc of b"]


def test_the_report_has_them():
    assert measured_from(json.loads(json.dumps(measured_json(DONE), allow_nan=False))) == DONE
    told = Report("m", None, (Artifact("<fp8>", 1, 8.0, DONE), Artifact("int4", 1, 4.0, MEASURED)))
    html = page(told)
    assert "<h2>Tasks</h2>" in html
    assert '<tr><td>&lt;fp8&gt;</td><td class="num">95.00</td><td class="num">0.5700</td>' in html
    assert '<td>exact_match flexible-extract</td><td class="num">0.4000 ± 0.0350</td>' in html
    assert "<h2>Tasks</h2>" not in page(Report("m", None, told.artifacts[1:]))
    found = json.loads(json.dumps(report_json(told), allow_nan=False))["artifacts"]
    assert [each["recovery"] for each in found] == [pytest.approx(95), None]
    known = {key for key in documented("release") if key.startswith("artifacts[].tasks")}
    assert set(keys({"artifacts": [{"tasks": found[0]["tasks"]}]}, known)) == known


# As lm_eval 0.4.13 answers, abridged.
ANSWER = {
    "results": {
        "two": {"name": "two", "alias": "two", "sample_len": 30, "acc,none": 0.5, "acc_stderr,none": 0.09,
                "sample_count": {"acc,none": 30}},
        "one_a": {"name": "one_a", "alias": " - a", "sample_len": 10, "acc,none": 0.25, "acc_stderr,none": "N/A",
                  "f1,first": float("nan"), "f1_stderr,first": 1.0},
        "one_b": {"name": "one_b", "alias": " - b", "sample_len": 20, "acc,none": 0.75, "acc_stderr,none": 0.1},
        "all": {"name": "all", "alias": "all"},
    },
    "group_subtasks": {"all": ["two", "one_b"], "two": ["one_a", "one_b"]},
    "configs": {"one_a": {"dataset_path": "o/n", "dataset_name": "c", "test_split": None, "validation_split": "v"},
                "one_b": {"dataset_path": "json", "test_split": "test"}},
    "versions": {"one_a": 1.0, "one_b": "Yaml", "two": "2"},
    "n-shot": {"one_a": 5, "one_b": 0},
    "higher_is_better": {"one_a": {"acc": True}, "one_b": {"acc": False}, "two": {"acc": None}},
    "n-samples": {"one_a": {"original": 99, "effective": 10}, "one_b": {"original": 20, "effective": 20}},
}  # fmt: skip


def test_rows_are_of_a_task_or_of_a_groups_own_scores_or_of_what_is_in_it():
    (row,) = harness.rows_of(ANSWER, "one_a")
    assert row == {
        "task": "one_a", "version": "1.0", "metric": "acc", "filter": "none", "higher_is_better": True, "shots": 5,
        "samples": 10, "total": 99, "dataset": "o/n", "config": "c", "split": "v", "value": 0.25, "stderr": None,
    }  # fmt: skip
    (group,) = harness.rows_of(ANSWER, "two")
    assert (group["task"], group["samples"], group["total"], group["shots"]) == ("two", 30, 119, None)
    assert group["dataset"] is None
    assert [row["task"] for row in harness.rows_of(ANSWER, "all")] == ["two", "one_b"]
    assert [row["task"] for row in harness.rows_of(ANSWER, "a tag")] == ["one_a", "one_b"]


INDEX = {
    "plain": {"task": "plain", "metric_list": [{"metric": "acc"}]},
    "other": {"task": "other"},
    "others": {"group": "others", "task": ["plain", "other"]},
    "humaneval": {"task": "humaneval", "unsafe_code": True},
    "rouge": {"task": "rouge", "metric_list": [{"metric": "acc"}, {"metric": "rouge", "hf_evaluate": True}]},
    "suite": {"group": "suite", "task": ["plain", {"group": "inner", "task": [{"task": "humaneval", "x": 1}]}]},
    "inline": {"group": "inline", "task": [{"task": "new", "unsafe_code": True}]},
    "good": {"group": "good", "task": ["plain", {"task": "plain", "num_fewshot": 5}]},
}


@pytest.fixture
def index(monkeypatch):
    found = {name: SimpleNamespace(cfg=config) for name, config in INDEX.items()}
    found["tagged"] = SimpleNamespace(cfg=None, tags={"rouge", "plain"})
    monkeypatch.setattr(harness, "installed", lambda: "0.4.13")
    monkeypatch.setattr(harness, "_manager", lambda wanted: SimpleNamespace(task_index=found))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plian", "tasks: lm_eval knows no 'plian' (did you mean plain?)"),
        ("zzz", "tasks: lm_eval knows no 'zzz' (`lm-eval ls tasks` lists them)"),
        ("humaneval", "tasks: humaneval runs code that the model writes (leave it out, or run it by lm_eval itself)"),
        ("suite", "tasks: humaneval runs code that the model writes"),
        ("inline", "tasks: new runs code that the model writes"),
        ("tagged", "tasks: rouge is scored by code of the hub"),
        ("others", "tasks: other and others both have other (leave one out)"),
    ],
)
def test_what_cannot_be_asked_is_one_line(name, message, index):
    harness.check(wanted.Tasks((wanted.Task("good"),)))
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        harness.check(wanted.Tasks((wanted.Task("other"), wanted.Task(name))))
    with pytest.raises(InputError, match="/none: is no folder"):
        harness.check(wanted.Tasks((wanted.Task("plain"),), "/none"))


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({}, "tasks need lm_eval, and lm_eval is not installed (pip install 'dsv2quant[lm-eval]')"),
        ({"lm_eval": "0.4.13", "datasets": "3.6.0"}, "tasks need datasets 4 or newer, and 3.6.0 is installed (pip"),
    ],
)
def test_packages_that_are_missing_are_one_line_before_anything_is_written(
    versions, message, wordy, cli, tmp_path, monkeypatch
):
    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(harness.metadata, "version", version)
    path = tmp_path / "release.yaml"
    path.write_text("artifacts: [fp8-channel]\ntasks: {names: [gsm8k]}\n")
    ran = cli("release", wordy, "--recipe", path, "-o", tmp_path / "out", "-q")
    assert (ran.code, ran.err.count("\n"), (tmp_path / "out").exists()) == (2, 1, False)
    assert message in ran.err
    with pytest.raises(UsageError):
        harness.installed()


@pytest.fixture
def asked(monkeypatch):
    """(model, task) of what was done in place of lm_eval; the task that is number `stop` is interrupted."""
    asked = SimpleNamespace(done=[], stop=None)

    def done(wanted, tasks, model, device, dtype, progress):
        name = str(getattr(model, "model", model)).rpartition("/")[2]
        for task in tasks:
            if len(asked.done) == asked.stop:
                raise KeyboardInterrupt
            asked.done.append((name, task.name))
            row = harness.rows_of(ANSWER, "one_a")[0]
            yield task, [{**row, "task": task.name, "value": 0.3 if "INT4" in name else 0.6, "stderr": 0.01}]

    monkeypatch.setattr(harness, "check", lambda wanted: None)
    monkeypatch.setattr(harness, "installed", lambda: "0.4.13")
    monkeypatch.setattr(harness, "done", done)
    return asked


ALL = [(name, task) for name in ("wordy", "wordy-FP8-CHANNEL", "wordy-INT4-PURE-RTN") for task in "ab"]


@pytest.fixture
def release(wordy, fox, asked, tmp_path):
    """Make one of two artifacts, into a folder: `release("out")`; `text` of its file may be changed."""

    def run(out, change=lambda text: text):
        path = tmp_path / "release.yaml"
        path.write_text(change(
            "artifacts: [fp8-channel, {artifact: int4-pure, method: rtn, min-recovery: 60}]\n"
            f"evaluation: {{text: {fox}, ctx: 32, limit: 4}}\ntasks: {{names: [a, b], include: mine}}\n"
            "gates: {min-recovery: 98}\n"
        ))  # fmt: skip
        asked.done.clear()
        return dq.release(wordy, tmp_path / out, wanted.load(path, "wordy"))

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.yaml").write_text("task: a")
    return run


def test_every_artifact_does_them_and_a_gate_that_fails_leaves_the_others_done(release, asked, tmp_path):
    message = "^wordy-INT4-PURE-RTN: the mean over tasks is 50.00% of the model's, less than 60%$"
    with pytest.raises(GateError, match=message):
        release("out").check()
    assert asked.done == ALL
    artifacts = json.loads((tmp_path / "out/report.json").read_text())["artifacts"]
    assert [each["recovery"] for each in artifacts] == [100, 50]
    assert [[x["value"] for x in each["tasks"]["scores"]] for each in artifacts] == [[0.6, 0.6], [0.3, 0.3]]
    assert FOLDER not in (tmp_path / "out/SHA256SUMS").read_text()


def test_what_was_done_is_kept_and_what_is_asked_otherwise_is_done_anew(release, asked, tmp_path):
    release("out")
    release("out")
    assert asked.done == []
    release("out", lambda text: text.replace("[a, b]", "[a, {task: b, fewshot: 3}]"))
    assert asked.done == [(name, task) for name, task in ALL if task == "b"]
    (tmp_path / "mine/a.yaml").write_text("task: another")
    release("out")
    assert asked.done == ALL


def test_interrupted_anywhere_it_goes_on_to_the_same_files(release, asked, tmp_path):
    def files(out):
        found = [path for path in out.rglob("*") if path.is_file() and not path.name.startswith(".")]
        return {str(path.relative_to(out)): path.read_bytes() for path in found if FOLDER not in path.parts}

    release("whole")
    for stop in range(len(ALL)):
        asked.stop = stop
        with pytest.raises(KeyboardInterrupt):
            release(f"out{stop}")
        asked.stop = None
        release(f"out{stop}")
        assert asked.done == ALL[stop:]
        assert files(tmp_path / f"out{stop}") == files(tmp_path / "whole")
