"""A release's file: what it asks for, and a line for each wrong key."""

from __future__ import annotations

import pytest

from dsv2quant.errors import InputError
from dsv2quant.publishing.wanted import Gates, Task, Tasks, load, named

FULL = """
artifacts:
  - fp8-block
  - {artifact: int4-mixed, method: rtn, target: [vllm, sglang], tp: 2, max-kld: 0.06}
  - {artifact: int4-pure, group-size: channel, kv-scales: true, name: mine}
  - {artifact: q4_k_m, imatrix: m.gguf, tensor-type: ffn_down=Q6_K}
  - {recipe: own.yaml}
calibration: {text: chats.jsonl, samples: 64, length: 512}
evaluation: {ctx: 512, limit: 60}
tasks:
  names: [gsm8k, {task: arc_challenge, fewshot: 25}, {task: mine, limit: 7}]
  include: my-tasks
  limit: 200
  apply-chat-template: true
gates: {max-kld: 0.1, max-ppl-increase: 3, min-recovery: 98.5}
engines: [{engine: vllm, python: venv/bin/python, windows: 4}]
"""


def test_everything_a_file_can_say(tmp_path):
    path = tmp_path / "release.yaml"
    path.write_text(FULL)
    release = load(path, "mini")
    assert [wanted.name for wanted in release.artifacts] == [
        "mini-FP8-BLOCK", "mini-INT4-MIXED-RTN", "mine", "mini-Q4_K_M.gguf", "mini-OWN",
    ]  # fmt: skip
    block, mixed, pure, gguf, own = release.artifacts
    assert block.options == {"scheme": "fp8-block"}
    assert block.gates == Gates(0.1, 3.0, None, 98.5)
    assert mixed.options == {"scheme": "int4-mixed", "method": "rtn", "targets": ["vllm", "sglang"], "tp": 2}
    assert mixed.gates == Gates(0.06, 3.0, None, 98.5)
    assert pure.options == {"scheme": "int4-pure", "group_size": "channel", "kv_scales": True}
    assert gguf.into_gguf
    assert gguf.options == {
        "gguf": "Q4_K_M", "imatrix": str(tmp_path / "m.gguf"), "tensor_types": ["ffn_down=Q6_K"],
    }  # fmt: skip
    assert own.options == {"recipe": str(tmp_path / "own.yaml")}
    assert release.calibration == {"calibration": str(tmp_path / "chats.jsonl"), "samples": 64, "length": 512}
    assert release.evaluation == {"ctx": 512, "limit": 60}
    assert release.engines == ({"engine": "vllm", "engine_python": str(tmp_path / "venv/bin/python"), "windows": 4},)
    each = Task("gsm8k", None, 200), Task("arc_challenge", 25, 200), Task("mine", None, 7)
    assert release.tasks == Tasks(each, str(tmp_path / "my-tasks"), chat=True)
    assert release.text == FULL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("artifact: [fp8-block]", "unknown key 'artifact' (keys: artifacts, calibration, engines, evaluation, gates, "),
        ("artifacts: fp8-block", "`artifacts` must be a list"),
        ("artifacts: []", "`artifacts` must be a list"),
        ("gates: {max-kld: 1}", "names no artifact"),
        ("artifacts: [fp9]", "artifact 1: unknown artifact 'fp9' (there are fp8-block, "),
        ("artifacts: [fp8-block, fp8-block]", "two artifacts are named mini-FP8-BLOCK"),
        ("artifacts: [{artifact: fp8-block, metod: rtn}]", "artifact 1: unknown key 'metod'"),
        ("artifacts: [{artifact: fp8-block, tp: two}]", "artifact 1: `tp` is 'two' (give a number)"),
        ("artifacts: [{artifact: fp8-block, kv-scales: yes}]", "artifact 1: `kv_scales` is 'yes' (true or false)"),
        ("artifacts: [{artifact: fp8-block, name: ../up}]", "`name` '../up' is no file name"),
        ("artifacts: [fp8-block]\ngates: {kld: 1}", "gates: unknown key 'kld'"),
        ("artifacts: [fp8-block]\ngates: {max-kld: low}", "gates: `max-kld` is 'low' (give a number)"),
        ("artifacts: [fp8-block]\nevaluation: {windows: 3}", "evaluation: unknown key 'windows'"),
        ("artifacts: [fp8-block]\nevaluation: {ctx: [3]}", "evaluation: `ctx` is ['3']"),
        ("artifacts: [fp8-block]\nengines: [{engine: tgi}]", "engine 1: unknown engine 'tgi' (vllm, sglang,"),
        ("artifacts: [fp8-block]\ntasks: [gsm8k]", "tasks: not a mapping (keys: apply-chat-template, "),
        ("artifacts: [fp8-block]\ntasks: {}", "tasks: `names` must be a list"),
        ("artifacts: [fp8-block]\ntasks: {names: gsm8k}", "tasks: `names` must be a list"),
        ("artifacts: [fp8-block]\ntasks: {names: [gsm8k], shots: 5}", "tasks: unknown key 'shots'"),
        ("artifacts: [fp8-block]\ntasks: {names: [gsm8k], limit: 0}", "tasks: `limit` is 0 (at least 1)"),
        ("artifacts: [fp8-block]\ntasks: {names: [gsm8k], fewshot: few}", "tasks: `fewshot` is 'few' (give a number)"),
        ("artifacts: [fp8-block]\ntasks: {names: [gsm8k, gsm8k]}", "tasks: gsm8k is there twice (leave one out)"),
        ("artifacts: [fp8-block]\ntasks: {names: [gsm8k, {fewshot: 5}]}", "task 2: `task` is None (give a name)"),
        ("artifacts: [fp8-block]\ntasks: {names: [{task: gsm8k, include: x}]}", "task 1: unknown key 'include'"),
        ("artifacts: [fp8-block]\ntasks: {names: [{task: gsm8k, fewshot: -1}]}", "task 1: `fewshot` is -1 (at least 0"),
        ("artifacts: [fp8-block]\ntasks: {names: [x], apply-chat-template: 1}", "`apply-chat-template` is '1' (true"),
        ("artifacts: [fp8-block]\ngates: {min-recovery: 98}", "`min-recovery` is of tasks, and it has none (name some"),
        ("artifacts: [{artifact: fp8-block, min-recovery: 98}]", "`min-recovery` is of tasks, and it has none"),
        ("artifacts: [&a fp8-block]", "an anchor or alias"),
        ("artifacts: [fp8-block", "not valid YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_its_place(text, message, tmp_path):
    path = tmp_path / "release.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as raised:
        load(path, "mini")
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_artifacts_by_name():
    release = named("fp8-block, DSV2_Q4_K_M", "mini", "chats.jsonl")
    assert [wanted.name for wanted in release.artifacts] == ["mini-FP8-BLOCK", "mini-DSV2_Q4_K_M.gguf"]
    assert release.calibration == {"calibration": "chats.jsonl"}
    with pytest.raises(InputError, match="unknown artifact 'q9'"):
        named("q9", "mini", None)
