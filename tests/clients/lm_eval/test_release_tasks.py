"""A release with tasks, by lm_eval itself: the scores that `python -m dsv2quant.lm_eval` gives of every artifact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from huggingface_hub import ModelCard
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from local_tasks import written

import dsv2quant.lm_eval  # noqa: F401 - what registers the model

# What dsv2-mini knows: texts of Python's documentation. Some answers are what follows, some what doesn't.
LINES = [
    ("The with statement is used to wrap the execution of a", " block"),
    ("If the list is empty, raise an", " IndexError"),
    ("The import statement binds a", " name"),
    ("A class definition is an executable", " statement"),
    ("Return the number of", " items"),
    ("The try statement specifies exception", " handlers"),
    ("The default value is", " None"),
    ("Changed in", " version"),
    ("This method returns a new", " list"),
    ("The while statement is used for repeated", " execution"),
    ("An object that can be used as a", " key"),
    ("A function is called with its", " arguments"),
]
WORDS = [right for _, right in LINES]
CHOICES = [
    {"question": question, "choices": [right, WORDS[i - 1], WORDS[i - 2], WORDS[i - 3]], "gold": 0}
    for i, (question, right) in enumerate(LINES)
]
CHOICE = {
    "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}], "target_delimiter": "",
    "metadata": {"version": 1.5},
}  # fmt: skip
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "mini_a": (CHOICES, CHOICE),
    "mini_b": (CHOICES[:7], CHOICE | {"num_fewshot": 1}),
    "mini_answer": (CHOICES, {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}",
        "tag": "mini_tag", "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 2, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "ignore_case": True}],
    }),
}  # fmt: skip
GROUP = {
    "group": "mini_group", "task": ["mini_a", "mini_b"], "metadata": {"version": 2},
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}  # fmt: skip
INT4, GGUF = "dsv2-mini-INT4-PURE-RTN", "dsv2-mini-GGUF/dsv2-mini-Q4_K_M.gguf"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    (folder / "tasks").mkdir()
    written(folder / "tasks", TASKS)
    (folder / "tasks/group.yaml").write_text(yaml.safe_dump(GROUP))
    path = folder / "release.yaml"
    path.write_text(
        "artifacts: [{artifact: int4-pure, method: rtn, target: transformers}, Q4_K_M]\n"
        "evaluation: {ctx: 64, limit: 2}\n"
        "tasks: {names: [{task: mini_a, fewshot: 2}, mini_b, mini_answer], include: tasks, limit: 10}\n"
    )
    return path


@pytest.fixture(scope="module")
def released(recipe) -> Path:
    """Made in two processes beside each other."""
    out = recipe.parent / "out"
    words = ["release", tiny.MINI, "--recipe", recipe, "-o", out, "--jobs", 2, "-q", "--json"]
    done = subprocess.run([sys.executable, "-m", "dsv2quant", *map(str, words)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["artifacts"] == report(out)  # and nothing of what lm_eval prints or draws
    assert not any(word in done.stderr for word in ("mini_a", "loglikelihood", "it/s")), done.stderr
    return out


def report(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "report.json").read_text())["artifacts"]
    return found


def commands_scores(recipe: Path, model: Path, folder: Path, task: str, *words: object) -> dict[str, Any]:
    """Of a model, by the command: {metric,filter: number}."""
    given = [
        "--model", "dsv2quant", "--model_args", f"pretrained={model}", "--tasks", task, "--limit", 10, *words,
        "--include_path", recipe.parent / "tasks", "--output_path", folder, "--device", "cpu", "--batch_size", "auto",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "dsv2quant.lm_eval", *map(str, given)], check=True)
    (path,) = folder.rglob("results_*.json")
    return dict(json.loads(path.read_text())["results"][task])


def harness_scores(recipe: Path, model: Path) -> dict[str, dict[str, Any]]:
    """Of a model, by what the command calls: {task: {metric,filter: number}}."""
    manager = TaskManager(include_path=str(recipe.parent / "tasks"))
    settings = {"model_args": f"pretrained={model}", "limit": 10, "batch_size": "auto", "task_manager": manager}
    few = simple_evaluate("dsv2quant", tasks=["mini_a"], num_fewshot=2, **settings)["results"]
    return {**few, **simple_evaluate("dsv2quant", tasks=["mini_b", "mini_answer"], **settings)["results"]}


def test_scores_are_those_of_lm_evals_own_command(recipe, released, tmp_path):
    int4, gguf = report(released)
    of_model = harness_scores(recipe, tiny.MINI)
    of_int4 = {"mini_a": commands_scores(recipe, released / INT4, tmp_path, "mini_a", "--num_fewshot", 2)}
    for each, found in ((int4, harness_scores(recipe, released / INT4) | of_int4),
                        (gguf, harness_scores(recipe, released / GGUF))):  # fmt: skip
        rows = each["tasks"]["scores"]
        assert [(row["task"], row["metric"], row["shots"], row["samples"], row["total"]) for row in rows] == [
            ("mini_a", "acc", 2, 10, 12), ("mini_a", "acc_norm", 2, 10, 12), ("mini_b", "acc", 1, 7, 7),
            ("mini_b", "acc_norm", 1, 7, 7), ("mini_answer", "exact_match", 0, 10, 12),
        ]  # fmt: skip
        for row in rows:
            ours, theirs = found[row["task"]], of_model[row["task"]]
            key, error = f"{row['metric']},none", f"{row['metric']}_stderr,none"
            assert (row["value"], row["stderr"]) == (ours[key], ours[error])
            assert (row["reference"], row["reference_stderr"]) == (theirs[key], theirs[error])
        assert any(row["value"] != row["reference"] for row in rows)  # what is compared is not all alike
        assert rows[-1]["reference"] > 0


def test_cards_show_them(released):
    for each, folder in zip(report(released), (INT4, "dsv2-mini-GGUF"), strict=True):
        card = (released / folder / "README.md").read_text()
        last = each["tasks"]["scores"][-1]
        results = {x.metric_name: x.metric_value for x in ModelCard(card).data.eval_results}
        assert results["mini_answer, exact_match"] == pytest.approx(last["value"])
        assert f"{last['value']:.4f} ± {last['stderr']:.4f}" in card
        assert f"{each['recovery']:.2f}" in card
        assert "--tasks mini_b,mini_answer --batch_size auto --limit 10 --include_path TASKS\n" in card


def test_what_was_done_is_kept_and_another_task_alone_is_done(recipe, released, cli):
    before = {path: path.stat().st_mtime_ns for path in (released / ".tasks").iterdir()}
    assert len(before) == 3 * 3
    more = recipe.with_name("more.yaml")
    more.write_text(
        recipe.read_text().replace("{task: mini_a, fewshot: 2}, mini_b, mini_answer", "mini_group, mini_tag")
    )
    ran = cli("release", tiny.MINI, "--recipe", more, "-o", released, "-q", "--json")
    assert (ran.code, ran.err) == (0, "")
    after = {path: path.stat().st_mtime_ns for path in (released / ".tasks").iterdir()}
    assert after.items() > before.items()
    assert len(after) == 3 * 5
    rows = json.loads(ran.out)["artifacts"][0]["tasks"]["scores"]
    assert [(row["task"], row["version"], row["metric"], row["shots"], row["total"]) for row in rows] == [
        ("mini_group", "2", "acc", None, 19), ("mini_answer", "Yaml", "exact_match", 0, 12),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mini_c", "tasks: lm_eval knows no 'mini_c' (did you mean mini_"),
        ("humaneval", "tasks: humaneval runs code that the model writes"),
        ("lost", "task lost: can't be loaded: "),
    ],
)
def test_what_cannot_be_done_is_one_line_before_any_artifact(name, message, cli, tmp_path):
    (tmp_path / "tasks").mkdir()
    written(tmp_path / "tasks", {"lost": TASKS["mini_a"], "mini_a": TASKS["mini_a"]})
    (tmp_path / "tasks/lost.json").unlink()
    path = tmp_path / "release.yaml"
    path.write_text(f"artifacts: [fp8-channel]\ntasks: {{names: [{name}], include: tasks}}\n")
    ran = cli("release", tiny.MINI, "--recipe", path, "-o", tmp_path / "out", "-q")
    assert (ran.code, ran.err.count("\n")) == (3, 1), ran.err
    assert message in ran.err
    assert not (tmp_path / "out/dsv2-mini-FP8-CHANNEL").exists()
