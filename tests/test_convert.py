"""Conversion: the right bytes, whatever happens on the way."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dsv2quant.arch.deepseek_v2 import SEQUENCE_CLASSIFICATION
from dsv2quant.checkpoint.open import open_checkpoint
from dsv2quant.conversion import shards
from dsv2quant.conversion.convert import convert
from dsv2quant.errors import InputError
from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning import recipe
from dsv2quant.planning.plan import make_plan
from dsv2quant.storage import engine
from dsv2quant.storage.durable import MANIFEST_FILE, STATE_FILE, StateLog

KILLER = Path(__file__).parent / "killer.py"


def run(model: Path, out: Path, name: str = "fp8-channel", force: bool = False, device: str = "cpu", **options):
    made = make_plan(open_checkpoint(model), recipe.builtin(name), **options)
    return convert(made, out, command="dsv2quant convert", force=force, device=device)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("grid", ["block", "channel", "tensor"])
def test_every_tensor_is_its_codecs_encoding(grid, awkward, tmp_path):
    made = make_plan(
        open_checkpoint(awkward), recipe.builtin(f"fp8-{grid}"), for_targets=["vllm"], max_shard_size=10**7
    )
    convert(made, tmp_path / "out", command="")
    source, written = tensors(awkward), tensors(tmp_path / "out")
    assert set(written) == {o.name for line in made.entries for o in line.outputs}
    for step in made.steps:
        scheme = step.entries[0].scheme
        encoded = CODECS[scheme].encode([bits(source[line.spec.name]) for line in step.entries])
        for line, arrays in zip(step.entries, encoded, strict=True):
            for output, array in zip(line.outputs, arrays.values(), strict=True):
                got = written[output.name]
                assert tuple(got.shape) == output.shape
                assert got.contiguous().view(torch.uint8).numpy().tobytes() == array.tobytes(), output.name


def test_planned_sizes_are_the_files_sizes(awkward, tmp_path):
    made = make_plan(open_checkpoint(awkward), recipe.builtin("fp8-block"), max_shard_size=10**7)
    result = convert(made, tmp_path / "out", command="")
    assert len(made.shards) > 3
    for shard in made.shards:
        assert (tmp_path / "out" / shard.file).stat().st_size == shard.nbytes == result.files[shard.file]["size"]
    assert sum((tmp_path / "out" / s.file).stat().st_size for s in made.shards) == made.bytes_out


def test_the_artifact_is_a_checkpoint_with_what_belongs_to_it(awkward, tmp_path):
    result = run(awkward, tmp_path / "out")
    opened = open_checkpoint(tmp_path / "out")
    assert {w.scheme for w in opened.weights} == {"bf16", "fp8-channel"}
    assert set(contents(tmp_path / "out")) == {
        "README.md", "config.json", "dsv2quant.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (awkward / "tokenizer.json").read_bytes()
    manifest = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    assert manifest["files"] == result.files
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_model_card_names_base_recipe_command_and_sizes(tmp_path, cli):
    assert cli("convert", tiny.MINI, "--fp8=channel", "--target", "vllm", "-o", tmp_path / "out", "-q").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "license: mit\n" in front
    assert "base_model" not in front  # a folder's name is no id of the hub
    for words in (
        "# dsv2-mini, fp8-channel",
        "dsv2quant convert dsv2-mini --fp8=channel --target vllm\n",
        "17.92 MB became 11.26 MB: 10.05 bits per weight",
        "| routed.gate_proj   | fp8-channel |",
        "scheme: fp8-channel}",
    ):
        assert words in card
    assert str(tmp_path) not in card


def test_two_runs_give_the_same_bytes(awkward, tmp_path):
    run(awkward, tmp_path / "a", "fp8-tensor", max_shard_size=10**7)
    run(awkward, tmp_path / "b", "fp8-tensor", max_shard_size=10**7)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("grid", ["block", "channel", "tensor"])
def test_the_torch_path_writes_the_same_artifact(grid, lite, tmp_path):
    run(lite, tmp_path / "a", f"fp8-{grid}", for_targets=["transformers"])
    run(lite, tmp_path / "b", f"fp8-{grid}", for_targets=["transformers"], device="cpu:0")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wider_sources_become_bf16_where_unquantized(dtype, tmp_path):
    source = tiny.random_weights(tiny.LITE, dtype=dtype)
    model = tiny.write_checkpoint(tmp_path / "model", tiny.LITE | {"torch_dtype": str(dtype)[6:]}, source)
    run(model, tmp_path / "out")
    written = tensors(tmp_path / "out")
    name = "model.layers.1.self_attn.o_proj"
    (encoded,) = CODECS["fp8-channel"].encode([source[f"{name}.weight"].float().numpy()])
    assert written[f"{name}.weight"].view(torch.uint8).numpy().tobytes() == encoded["weight"].tobytes()
    assert torch.equal(written["lm_head.weight"], source["lm_head.weight"].to(torch.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_block_fp8_is_copied_where_it_may_stay_and_decoded_where_it_may_not(tmp_path, awkward):
    # A block-FP8 artifact for vLLM alone keeps ragged matrices in FP8; transformers can't read those.
    run(awkward, tmp_path / "vllm", "fp8-block", for_targets=["vllm"])
    run(tmp_path / "vllm", tmp_path / "all", "fp8-block")
    first, second = tensors(tmp_path / "vllm"), tensors(tmp_path / "all")
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8))
    assert torch.equal(first[f"{name}_scale_inv"], second[f"{name}_scale_inv"])
    ragged = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    parts = {"weight": first[ragged], "weight_scale_inv": first[f"{ragged}_scale_inv"]}
    assert torch.equal(second[ragged], CODECS["fp8-block"].decode(parts, torch.bfloat16))
    assert f"{ragged}_scale_inv" not in second
    run(awkward, tmp_path / "tensor", "fp8-tensor")
    with pytest.raises(InputError, match="already quantized"):
        run(tmp_path / "tensor", tmp_path / "again", "fp8-channel")


def test_a_classifiers_head_stays_as_it_is(tmp_path):
    raw = tiny.LITE | {"architectures": [SEQUENCE_CLASSIFICATION]}
    model = tiny.write_checkpoint(tmp_path / "model", raw)
    run(model, tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["score.weight"], tensors(model)["score.weight"])
    assert "score" in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]


def test_nan_in_copied_fp8_codes_is_found(tmp_path, awkward):
    run(awkward, tmp_path / "fp8", "fp8-block")
    written = tensors(tmp_path / "fp8")
    name = "model.layers.1.self_attn.o_proj.weight"
    written[name].view(torch.uint8)[3, 9] = 0xFF
    raw = json.loads((tmp_path / "fp8" / "config.json").read_text())
    tiny.write_checkpoint(tmp_path / "bad", raw, written)
    with pytest.raises(InputError, match=r"o_proj\.weight is NaN.*\[3, 9\]"):
        run(tmp_path / "bad", tmp_path / "out", "fp8-block")


def test_shards_written_side_by_side_have_the_same_bytes(lite, tmp_path, monkeypatch):
    made = make_plan(open_checkpoint(lite), recipe.builtin("fp8-channel"), max_shard_size=60_000)
    assert len(made.shards) > 4
    start, orders = engine._Writing.start, {}
    for count in (1, 3):
        order = orders[count] = []
        monkeypatch.setattr(shards, "lanes", lambda count=count: count)
        monkeypatch.setattr(
            engine._Writing, "start", lambda self, job, order=order: (order.append(job.file), start(self, job))
        )
        convert(made, tmp_path / str(count), command="")
    assert orders[1] == sorted(orders[1]) == sorted(orders[3])
    assert orders[3][:6] == [0, 1, 2, 0, 1, 2]
    assert max(len({*orders[3][:i]} & {*orders[3][i:]}) for i in range(len(orders[3]))) == 3
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


# Interruptions


def killed(n: int, model: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(KILLER), str(n), "convert", str(model), "--fp8=tensor", "-o", str(out), "-q"]
    return subprocess.run([*command, "--max-shard-size", "40KB"], capture_output=True, text=True, check=False)


def test_killed_at_20_moments_and_resumed_the_bytes_are_the_same(lite, tmp_path):
    whole = killed(0, lite, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    changes = int(whole.stdout.splitlines()[-1])
    expected = contents(tmp_path / "whole")
    assert len([name for name in expected if name.startswith("model-")]) > 3
    for n in sorted(random.Random(0).sample(range(1, changes + 1), 20)):
        out = tmp_path / f"out-{n}"
        assert killed(n, lite, out).returncode == -signal.SIGKILL
        if (out / "config.json").exists():
            # Only the last steps come after config.json: all else must already be there.
            assert expected.items() <= contents(out).items()
        else:
            with pytest.raises(InputError):
                open_checkpoint(out)
        finished = {p.name for p in out.glob("model-*.safetensors")} if out.exists() else set()
        assert all((out / name).read_bytes() == expected[name] for name in finished)
        again = killed(0, lite, out)
        assert again.returncode == 0, again.stderr
        assert contents(out) == expected
        shutil.rmtree(out)


def interrupt_late(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ctrl-C at the 60th weight that is encoded; one item for each that was, and will be."""
    encode, calls = CODECS["fp8-channel"].encode, []

    def fail_late(weights, device, method, inputs):
        calls.append(1)
        if len(calls) == 60:
            raise KeyboardInterrupt
        return encode(weights, device, method, inputs)

    monkeypatch.setattr(CODECS["fp8-channel"], "encode", fail_late)
    return calls


def test_resuming_keeps_finished_shards(lite, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "lanes", lambda: 1)  # side by side, these three would end together
    made = make_plan(open_checkpoint(lite), recipe.builtin("fp8-channel"), max_shard_size=120_000)
    interrupt_late(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        convert(made, tmp_path / "out", command="")
    assert (tmp_path / "out" / STATE_FILE).exists()
    assert not list((tmp_path / "out").glob("*.partial"))
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.safetensors")}
    assert kept
    result = convert(made, tmp_path / "out", command="")
    assert result.resumed == len(kept)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == when for name, when in kept.items())
    assert not (tmp_path / "out" / STATE_FILE).exists()
    run(lite, tmp_path / "whole", max_shard_size=120_000)
    assert (
        json.loads((tmp_path / "whole" / MANIFEST_FILE).read_text())["files"].items()
        >= {name: result.files[name] for name in kept}.items()
    )


def test_resuming_goes_on_amid_a_shard(lite, tmp_path, monkeypatch):
    made = make_plan(open_checkpoint(lite), recipe.builtin("fp8-channel"))
    convert(made, tmp_path / "whole", command="")
    monkeypatch.setattr(engine, "RECORD_EVERY", 1)
    monkeypatch.setattr(shards, "KEPT_EVERY", 20_000)
    calls = interrupt_late(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        convert(made, tmp_path / "out", command="")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.safetensors.partial", STATE_FILE}
    continued = convert(made, tmp_path / "out", command="")
    assert continued.resumed == 0  # of shards
    assert 60 < len(calls) < 60 + sum(line.scheme == "fp8-channel" for line in made.entries) - 20
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_verbose_says_what_is_continued(lite, tmp_path, cli, monkeypatch, caplog):
    command = ("convert", lite, "--fp8=channel", "-o", tmp_path / "out", "--max-shard-size", "120KB", "-v")
    with monkeypatch.context() as m:
        m.setattr(
            "dsv2quant.conversion.convert._write_small_files", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert cli(*command).code == 130
    ran = cli(*command)
    assert ran.code == 0
    assert "continuing: 3 of 3 shards are finished" in caplog.messages
    assert "recipe fp8-channel" in ran.err


def test_ctrl_c_exits_130_with_one_line(lite, tmp_path, cli, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(CODECS["fp8-channel"], "encode", interrupt)
    ran = cli("convert", lite, "--fp8=channel", "-o", tmp_path / "out", "-q")
    assert ran.code == 130
    assert ran.err.strip() == "interrupted"


def test_an_unfinished_folder_refuses_another_plan_or_a_changed_source(lite, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(lite, model)
    out = tmp_path / "out"
    with monkeypatch.context() as m:
        m.setattr(
            "dsv2quant.conversion.convert._write_small_files", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            run(model, out)
    with pytest.raises(InputError, match="unfinished conversion with another plan or source"):
        run(model, out, "fp8-tensor")
    os.utime(model / "model.safetensors", ns=(1, 1))
    with pytest.raises(InputError, match="another plan or source"):
        run(model, out)
    run(model, out, "fp8-tensor", force=True)
    assert {w.scheme for w in open_checkpoint(out).weights} >= {"fp8-tensor"}


def test_a_folder_that_is_not_empty_is_left_alone(lite, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty"):
        run(lite, out)
    assert contents(out) == {"notes.txt": b"mine"}
    run(lite, out, force=True)
    assert (out / "notes.txt").read_text() == "mine"
    run(lite, out, "fp8-tensor", force=True, max_shard_size=150_000)
    assert not (out / "model.safetensors").exists()
    assert len(list(out.glob("model-*.safetensors"))) > 1


def test_a_finished_artifact_is_recognised(lite, tmp_path):
    first = run(lite, tmp_path / "out")
    assert not first.already_complete
    before = contents(tmp_path / "out")
    again = run(lite, tmp_path / "out")
    assert again.already_complete
    assert again.files == first.files
    assert contents(tmp_path / "out") == before
    with pytest.raises(InputError, match="is not empty"):
        run(lite, tmp_path / "out", "fp8-tensor")


def test_shards_that_end_together_are_all_recorded(tmp_path):
    log = StateLog(tmp_path / "state", tmp_path)
    log.start({})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(log.append, ({"file": n} for n in range(400))))
    log.close()
    recorded = [json.loads(line) for line in (tmp_path / "state").read_text().splitlines()]
    assert sorted(line["file"] for line in recorded[1:]) == list(range(400))


def test_two_runs_into_one_folder_do_not_mix(lite, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with (out / STATE_FILE).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing to it"):
            run(lite, out)


# Full disks


def test_space_is_checked_before_the_first_byte(lite, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"needs [\d,]+ bytes, the disk has 100,000 free"):
        run(lite, tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def test_the_space_check_counts_the_small_files(lite, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(lite, model)
    (model / "tokenizer.json").write_bytes((lite / "tokenizer.json").read_bytes() + b" " * (8 << 20))
    made = make_plan(open_checkpoint(model), recipe.builtin("fp8-channel"))
    usage = shutil.disk_usage(tmp_path)._replace(free=made.bytes_out + (8 << 20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match="the disk has"):
        convert(made, tmp_path / "out", command="")


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_file_size_limit_ends_in_one_line_and_a_resumable_state(lite, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dsv2quant", "convert", str(lite), "--fp8=channel", "-o", str(out), "-q"]
    ran = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit_file_size, check=False)
    assert ran.returncode == 3
    assert ran.stderr.count("\n") == 1
    assert (
        "model.safetensors: can't be written: File too large (free space and run the same command again" in ran.stderr
    )
    assert {p.name for p in out.iterdir()} == {STATE_FILE}
    subprocess.run(command, check=True)
    run(lite, tmp_path / "whole")
    written, whole = contents(out), contents(tmp_path / "whole")
    assert written["model.safetensors"] == whole["model.safetensors"]


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_disk_that_fills_up_ends_in_one_line_and_resumes(call, lite, tmp_path, cli, monkeypatch):
    original, count = getattr(os, call), []

    def full(*args):
        count.append(1)
        if len(count) > (30 if call == "pwrite" else 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    command = ("convert", lite, "--fp8=channel", "-o", tmp_path / "out", "-q", "--max-shard-size", "120KB")
    with monkeypatch.context() as m:
        m.setattr(os, call, full)
        ran = cli(*command)
    assert ran.code == 3
    assert "can't be written: No space left on device" in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out" / "config.json").exists()
    assert not list((tmp_path / "out").glob("*.partial"))
    assert cli(*command).code == 0
    run(lite, tmp_path / "whole", max_shard_size=120_000)
    ours, whole = contents(tmp_path / "out"), contents(tmp_path / "whole")
    assert {n: b for n, b in ours.items() if n.startswith("model")} == {
        n: b for n, b in whole.items() if n.startswith("model")
    }


def test_convert_command_prints_one_object(lite, tmp_path, cli):
    ran = cli("convert", lite, "--fp8=channel", "--target", "vllm", "-o", tmp_path / "out", "--json", "-q")
    result = json.loads(ran.out)
    assert ran.err == ""
    assert result["schema"] == "dsv2quant.convert/2"
    assert result["files"]["model.safetensors"]["size"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    dry = json.loads(cli("convert", lite, "--fp8", "--dry-run", "--json").out)
    assert dry["schema"] == "dsv2quant.plan/2"
