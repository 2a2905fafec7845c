"""lm_eval's own harness over the runtime, beside its model `hf` in transformers: the same tokens, log-likelihoods and
continuations. `make test-lm-eval` installs it and runs this."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from local_tasks import written

import dsv2quant.lm_eval  # noqa: F401 - what registers the model
from dsv2quant.api import convert

QUESTIONS = [
    {"question": "A list is", "choices": [" a sequence of items.", " green", " an object", "."], "gold": 0},
    {"question": "def f(x):\n    return", "choices": [" x", " None", " the", " 深度"], "gold": 1},
    {"question": "", "choices": ["The module defines", "Foxes"], "gold": 0},
]
TEXTS = [{"text": "The quick brown fox jumps over the lazy dog. " * 6}, {"text": "深度求索\n\n  1.\tOne"}]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "mini_choice": (QUESTIONS, {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc"}],
    }),
    "mini_text": (TEXTS, {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }),
    "mini_answer": ([q for q in QUESTIONS if q["question"]], {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of tasks over files."""
    return written(tmp_path_factory.mktemp("tasks"), TASKS)


@pytest.fixture
def answers(tasks):
    """What a model answers to each request of all tasks: {task: responses}."""

    def run(model: str, **options: Any) -> dict[str, list[Any]]:
        arguments = options.pop("arguments")
        found = simple_evaluate(
            model=model, model_args=arguments, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks)),
            bootstrap_iters=0, **options,
        )  # fmt: skip
        return {
            task: [one for sample in sorted(samples, key=lambda s: s["doc_id"]) for one in sample["resps"]]
            for task, samples in found["samples"].items()
        }

    return run


def numbers(responses: list[Any]) -> list[float]:
    return [float(first[0] if isinstance(first, (list, tuple)) else first) for (first,) in responses]


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"apply_chat_template": True}], ids=str)
def test_answers_are_those_of_lm_evals_model_in_transformers(options, answers) -> None:
    arguments = f"pretrained={tiny.MINI},dtype=float32"
    ours = answers("dsv2quant", arguments=arguments, **options)
    theirs = answers("hf", arguments=arguments, **options, device="cpu")
    for task in ("mini_choice", "mini_text"):
        assert numbers(ours[task]) == pytest.approx(numbers(theirs[task]), abs=1e-4)
    greedy = [[first[1] for (first,) in found["mini_choice"]] for found in (ours, theirs)]
    assert greedy[0] == greedy[1]
    assert ours["mini_answer"] == theirs["mini_answer"]


def test_long_texts_are_cut_into_the_same_windows(answers) -> None:
    arguments = f"pretrained={tiny.MINI},dtype=float32,max_length=24"
    ours, theirs = (answers(model, arguments=arguments, device="cpu") for model in ("dsv2quant", "hf"))
    for task in ("mini_choice", "mini_text"):
        assert numbers(ours[task]) == pytest.approx(numbers(theirs[task]), abs=1e-4)
    assert ours["mini_answer"] == theirs["mini_answer"]


def test_a_gguf_file_and_the_command(tasks, answers, tmp_path) -> None:
    path = tmp_path / "mini.gguf"
    convert(tiny.MINI, path, gguf="Q8_0")
    words = [
        "--model", "dsv2quant", "--model_args", f"pretrained={path}", "--tasks", "mini_choice", "--include_path", tasks,
        "--output_path", tmp_path / "out", "--log_samples", "--device", "cpu", "--batch_size", "auto",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "dsv2quant.lm_eval", *map(str, words)], capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "out").rglob("samples_mini_choice_*.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    found = [float(one[0][0]) for sample in sorted(logged, key=lambda s: s["doc_id"]) for one in sample["resps"]]
    unquantized = numbers(answers("dsv2quant", arguments=f"pretrained={tiny.MINI}")["mini_choice"])
    assert found == pytest.approx(unquantized, rel=0.05)
    assert found != unquantized
